"""Configurations: config.json and generation_config.json of transformers, and our `ModelConfig`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.config import ModelConfig
from moekit.errors import unknown
from moekit.generation_config import GenerationSettings
from moekit.moe.routing import TopK

T5 = "t5"
SWITCH = "switch_transformers"
ARCHITECTURES = {
    T5: "T5ForConditionalGeneration",
    SWITCH: "SwitchTransformersForConditionalGeneration",
}
# our fields -> keys of config.json, in both directions
FIELDS = {
    "d_model": "d_model",
    "d_ff": "d_ff",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "encoder_layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "vocab_size": "vocab_size",
    "relative_buckets": "relative_attention_num_buckets",
    "relative_max_distance": "relative_attention_max_distance",
    "dropout": "dropout_rate",
}
SWITCH_FIELDS = {
    "num_experts": "num_experts",
    "expert_capacity": "expert_capacity",
    "router_z_loss": "router_z_loss_coef",
    "balance_loss": "router_aux_loss_coef",
}
# what a missing key means
DEFAULTS = {
    T5: {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
    },
    SWITCH: {
        "vocab_size": 32128,
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 2048,
        "expert_capacity": 64,
        "num_layers": 12,
        "num_sparse_encoder_layers": 3,
        "num_decoder_layers": 12,
        "num_sparse_decoder_layers": 3,
        "num_heads": 12,
        "num_experts": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "router_z_loss_coef": 0.001,
        "router_aux_loss_coef": 0.001,
    },
}
# keys of which we have one value only; a missing key or null is that value
ONLY = {
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
SWITCH_ONLY = {
    "dense_act_fn": "relu",
    "is_gated_act": False,
    "router_bias": False,
    "router_dtype": "float32",
}
ACTIVATIONS = {"relu": "relu", "gated-gelu": "gated_gelu"}
SWITCH_ROUTERS = (TopK(k=1), TopK(k=1, priority="choice"))
NEW_TOKENS = 20  # that transformers generates unless a length is set


def config_from_transformers(
    values: Mapping[str, Any],
    source: Path,
    *,
    tied: bool,
    tokenizer: str | None = None,
    generation: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """The configuration of a model of transformers.

    Args:
      values: config.json.
      source: the folder, which gives the name.
      tied: whether the output logits use the embedding.
      tokenizer: for the configuration.
      generation: generation_config.json.

    Raises:
      ValueError: another model family, or a setting that we do not have.
    """
    family = values.get("model_type")
    if family not in tuple(ARCHITECTURES):
        raise ValueError(
            f"{source} holds a model of the type {family!r}: only "
            f"{' and '.join(ARCHITECTURES)} can be loaded"
        )
    is_switch = family == SWITCH
    known = DEFAULTS[family] | {key: value for key, value in values.items() if value is not None}
    known.setdefault("num_decoder_layers", known["num_layers"])
    _check_only(known, ONLY | (SWITCH_ONLY if is_switch else {}), source)
    _check_numbers(known, DEFAULTS[family], source)
    keys = FIELDS | (SWITCH_FIELDS if is_switch else {})
    fields = {field: known[key] for field, key in keys.items()}
    if is_switch:
        fields["expert_dropout"] = known["dropout_rate"]
        fields["activation"] = "relu"
        fields |= _sparse_fields(known, source)
    else:
        fields["activation"] = _activation(known, source)
    scaled = known.get("tie_word_embeddings") is not False
    if not is_switch:
        scaled = known.get("scale_decoder_outputs", scaled)
    try:
        return ModelConfig(
            name=source.name,
            tied_logits=tied,
            scaled_logits=None if scaled == tied else scaled,
            tokenizer=tokenizer,
            generation=generation_from_transformers(generation or {}),
            **fields,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source / 'config.json'}: {error}") from None


def _check_only(values: Mapping[str, Any], only: Mapping[str, Any], source: Path) -> None:
    wrong = []
    for key, expected in only.items():
        found = values.get(key, expected)
        if found not in (expected, [expected]):
            wrong.append(f"{key} is {found} instead of {expected}")
    if wrong:
        raise ValueError(f"{source / 'config.json'}: moekit has no model whose {'; '.join(wrong)}")


def _check_numbers(
    values: Mapping[str, Any], defaults: Mapping[str, int | float], source: Path
) -> None:
    """Raise ValueError for values that are not numbers, or less than 0, or not whole where the
    default is whole."""
    wrong = []
    for key in sorted(defaults.keys() | {"num_decoder_layers"}):
        types = int | float if isinstance(defaults.get(key), float) else int
        value = values[key]
        if isinstance(value, bool) or not isinstance(value, types) or value < 0:
            kind = "whole number" if types is int else "number"
            wrong.append(f"{key} is {value!r} instead of a {kind}")
    if wrong:
        raise ValueError(f"{source / 'config.json'}: {'; '.join(wrong)}")


def _activation(values: Mapping[str, Any], source: Path) -> str:
    projection = values.get("feed_forward_proj", "relu")
    if projection not in tuple(ACTIVATIONS):
        raise ValueError(f"{source}: {unknown('feed_forward_proj', projection, ACTIVATIONS)}")
    return ACTIVATIONS[projection]


def sparse_layers(num_layers: int, num_sparse: int) -> list[int]:
    """The sparse layers of a stack in transformers' Switch."""
    step = num_layers // num_sparse if num_sparse > 0 else num_layers
    if step == 0:
        return []
    return [layer for layer in range(num_layers) if layer % step == 1 or step == 1]


def _sparse_fields(values: Mapping[str, Any], source: Path) -> dict[str, int | None]:
    """Which layers are sparse, as repeated blocks of layers; ValueError where it is none."""
    fields: dict[str, int | None] = {"sparse_layer": None}
    for stack, key in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        num_layers = values[key]
        found = sparse_layers(num_layers, values[f"num_sparse_{stack}_layers"])
        fields[f"{stack}_moe_layers"] = len(found)
        if not found:
            continue
        block = num_layers // len(found)
        if found != list(range(found[0], num_layers, block)) or num_layers % len(found):
            raise ValueError(
                f"{source / 'config.json'}: the sparse {stack} layers are {found} of {num_layers}, "
                "which do not repeat in equal blocks, as moekit needs them to"
            )
        if block > 1 and found[0] != block - 1:
            fields["sparse_layer"] = found[0]
    return fields


def _num_sparse(cfg: ModelConfig, stack: str) -> int | None:
    """The number of sparse layers with which transformers places them as we do; None if there is no
    such number."""
    num_layers = cfg.num_layers(stack)
    index = cfg.sparse_layer_of(stack)
    wanted = []
    if index is not None:
        wanted = list(range(index, num_layers, num_layers // cfg.moe_layers(stack)))
    for number in (cfg.moe_layers(stack), *range(num_layers + 2)):
        if sparse_layers(num_layers, number) == wanted:
            return number
    return None


def config_to_transformers(cfg: ModelConfig) -> dict[str, Any]:
    """config.json of a model.

    Raises:
      ValueError: fields that transformers cannot express.
    """
    _check_expressible(cfg)
    is_switch = cfg.num_experts > 0
    family = SWITCH if is_switch else T5
    values: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "model_type": family}
    for field, key in FIELDS.items():
        values[key] = getattr(cfg, field)
    values |= ONLY
    is_scaled = cfg.logits_scale != 1
    if is_switch:
        for field, key in SWITCH_FIELDS.items():
            values[key] = getattr(cfg, field)
        values |= SWITCH_ONLY
        if cfg.dispatch == "dropless":
            values["expert_capacity"] = cfg.max_length  # no expert gets more tokens of a row
        for stack in ("encoder", "decoder"):
            values[f"num_sparse_{stack}_layers"] = _num_sparse(cfg, stack)
        values["tie_word_embeddings"] = is_scaled
    else:
        projections = {activation: key for key, activation in ACTIVATIONS.items()}
        values["feed_forward_proj"] = projections[cfg.activation]
        values["tie_word_embeddings"] = cfg.tied_logits
        values["scale_decoder_outputs"] = is_scaled
    values["dtype"] = "float32"
    return values


def _check_expressible(cfg: ModelConfig) -> None:
    problems = []
    if cfg.generation.num_beams > 1 and cfg.generation.length_normalization != "transformers":
        problems.append('generation (beams need length_normalization="transformers")')
    if cfg.num_experts > 0:
        problems += _switch_problems(cfg)
    if problems:
        raise ValueError(
            f"transformers cannot express these fields of {cfg.name}: {'; '.join(problems)}. "
            "Nothing was written; mk.with_config changes fields that change no parameters"
        )


def _switch_problems(cfg: ModelConfig) -> list[str]:
    problems = []
    if cfg.activation != "relu":
        problems.append(f"activation={cfg.activation} (Switch has relu)")
    for stack in ("encoder", "decoder"):
        router = cfg.stack_router(stack)
        if cfg.moe_layers(stack) and router not in SWITCH_ROUTERS:
            problems.append(f"router={router} in the {stack} (Switch has TopK(k=1))")
        if _num_sparse(cfg, stack) is None:
            problems.append(f"sparse_layer={cfg.sparse_layer} in the {stack} (Switch has 1)")
    if cfg.extra_d_ff is not None:
        problems.append(f"extra_d_ff={cfg.extra_d_ff} (Switch has none)")
    if cfg.expert_d_ff not in (None, cfg.d_ff):
        problems.append(f"expert_d_ff={cfg.expert_d_ff} (Switch has d_ff={cfg.d_ff})")
    if cfg.dispatch == "capacity" and cfg.expert_capacity is None:
        problems.append(
            f"capacity_factor={cfg.capacity_factor} and eval_capacity_factor="
            f"{cfg.eval_capacity_factor} (set expert_capacity, or dispatch to dropless)"
        )
    if cfg.tied_logits and cfg.logits_scale == 1:
        problems.append("scaled_logits=False with tied logits (Switch scales them)")
    return problems


def generation_from_transformers(values: Mapping[str, Any]) -> GenerationSettings:
    """The settings of generation_config.json; repetition penalties and the like are ignored.

    As in transformers, answers have at most 20 tokens where no length is set, and `max_length`
    counts the decoder's start token.

    Raises:
      ValueError: a value is out of range.
    """
    known = {key: value for key, value in values.items() if value is not None}
    max_new_tokens = known.get("max_new_tokens")
    if max_new_tokens is None:
        max_new_tokens = known.get("max_length", NEW_TOKENS + 1) - 1
    is_sampled = known.get("do_sample", False)
    return GenerationSettings(
        max_new_tokens=max(1, max_new_tokens),
        temperature=known.get("temperature", 1.0) if is_sampled else 0.0,
        top_k=known.get("top_k", 50) if is_sampled else 0,
        top_p=known.get("top_p", 1.0) if is_sampled else 1.0,
        num_beams=known.get("num_beams", 1),
        length_penalty=known.get("length_penalty", 1.0),
        length_normalization="transformers",
    )


def generation_to_transformers(settings: GenerationSettings) -> dict[str, Any]:
    """generation_config.json of our settings."""
    values: dict[str, Any] = {
        "decoder_start_token_id": ONLY["decoder_start_token_id"],
        "eos_token_id": ONLY["eos_token_id"],
        "pad_token_id": ONLY["pad_token_id"],
        "max_new_tokens": settings.max_new_tokens,
        "num_beams": settings.num_beams,
    }
    if settings.length_normalization == "transformers":
        values["length_penalty"] = settings.length_penalty
    if not math.isclose(settings.temperature, 0):
        values["do_sample"] = True
        values["temperature"] = settings.temperature
        values["top_k"] = settings.top_k
        values["top_p"] = settings.top_p
    return values
