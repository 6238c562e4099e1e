"""moekit: FLAN-MoE in JAX. Sharded Mixture-of-Experts layers, FLAN mixtures, routing analysis.

Dimension letters everywhere: B batch, L length (T target length where both occur), D d_model,
F d_ff, E experts, K choices per token, C capacity, G groups, S tokens in a group, N heads, H head
dimension, V vocabulary. Names are imported when first used, so `import moekit` costs nothing.
"""

import importlib
import sys
import types

__version__ = "0.1.0"

_HOMES = {
    "analysis.balance": "balance_table",
    "analysis.figures": "plot_bars plot_coactivation plot_domain_distance "
    "plot_domain_specialization plot_expert_load plot_learning_curves plot_packing plot_rates "
    "plot_routing plot_scores plot_sharding plot_specialization "
    "plot_task_specialization plot_token_specialization save_figure show",
    "analysis.specialization": "domain_specialization saturation task_specialization "
    "token_specialization",
    "analysis.trace": "RouterTrace trace_routing text_prompts",
    "checkpoint": "load save",
    "config": "PRESETS ModelConfig TrainConfig preset",
    "data.corruption": "Corpus Document restore span_corruption",
    "data.flan": "flan_mixture",
    "data.mixture": "Mixture",
    "data.pipeline": "Batch batches pad_prompts unigram_entropy",
    "data.sources": "corpus",
    "data.suites": "Suite suite suites",
    "data.tasks": "Example Prompt Task Template format_prompt",
    "data.tokenizer": "ByteTokenizer SentencePieceTokenizer load_tokenizer train_sentencepiece",
    "evaluate": "evaluate evaluation_callback rank_options",
    "generate": "generate",
    "harness": "MoekitLM harness",
    "metrics": "Metrics",
    "model.transformer": "EncoderDecoder with_config",
    "moe.layer": "LayerStats MoE TokenRouting",
    "moe.routing": "ExpertChoice GShard Hash LossFree Random Routing Switch TopK assign",
    "plan": "Plan plan",
    "recipes": "Lab StudyConfig finetune instruction_tune pretrain study",
    "scores": "NormalisedAverage Scores compare normalised_average report",
    "sharding": "make_mesh",
    "step": "auxiliary_losses",
    "train": "Run train",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'moekit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"moekit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


class _Package(types.ModuleType):
    """Keeps `mk.train` the function when Python binds the submodule of the same name."""

    def __setattr__(self, name, value):
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__():
    return sorted({*globals(), *_HOME})
