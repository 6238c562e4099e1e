"""The public names of moekit and where each of them is defined."""

from .analysis.balance import (
    balance_table as balance_table,
)
from .analysis.plots import (
    plot_bars as plot_bars,
)
from .analysis.plots import (
    plot_coactivation as plot_coactivation,
)
from .analysis.plots import (
    plot_domain_distance as plot_domain_distance,
)
from .analysis.plots import (
    plot_domain_specialization as plot_domain_specialization,
)
from .analysis.plots import (
    plot_expert_load as plot_expert_load,
)
from .analysis.plots import (
    plot_learning_curves as plot_learning_curves,
)
from .analysis.plots import (
    plot_packing as plot_packing,
)
from .analysis.plots import (
    plot_rates as plot_rates,
)
from .analysis.plots import (
    plot_routing as plot_routing,
)
from .analysis.plots import (
    plot_scores as plot_scores,
)
from .analysis.plots import (
    plot_sharding as plot_sharding,
)
from .analysis.plots import (
    plot_specialization as plot_specialization,
)
from .analysis.plots import (
    plot_task_specialization as plot_task_specialization,
)
from .analysis.plots import (
    plot_token_specialization as plot_token_specialization,
)
from .analysis.plots import (
    save_figure as save_figure,
)
from .analysis.plots import (
    show as show,
)
from .analysis.specialization import (
    domain_specialization as domain_specialization,
)
from .analysis.specialization import (
    saturation as saturation,
)
from .analysis.specialization import (
    task_specialization as task_specialization,
)
from .analysis.specialization import (
    token_specialization as token_specialization,
)
from .analysis.trace import (
    RouterTrace as RouterTrace,
)
from .analysis.trace import (
    text_prompts as text_prompts,
)
from .analysis.trace import (
    trace_routing as trace_routing,
)
from .config import (
    PRESETS as PRESETS,
)
from .config import (
    ModelConfig as ModelConfig,
)
from .config import (
    TrainConfig as TrainConfig,
)
from .config import (
    preset as preset,
)
from .data.batch import (
    Batch as Batch,
)
from .data.batch import (
    batches as batches,
)
from .data.batch import (
    pad_prompts as pad_prompts,
)
from .data.batch import (
    unigram_entropy as unigram_entropy,
)
from .data.flan import (
    flan_mixture as flan_mixture,
)
from .data.mixture import (
    Mixture as Mixture,
)
from .data.sources import (
    corpus as corpus,
)
from .data.span_corruption import (
    Corpus as Corpus,
)
from .data.span_corruption import (
    Document as Document,
)
from .data.span_corruption import (
    restore as restore,
)
from .data.span_corruption import (
    span_corruption as span_corruption,
)
from .data.suites import (
    Suite as Suite,
)
from .data.suites import (
    suite as suite,
)
from .data.suites import (
    suites as suites,
)
from .data.tasks import (
    Example as Example,
)
from .data.tasks import (
    Prompt as Prompt,
)
from .data.tasks import (
    Task as Task,
)
from .data.tasks import (
    Template as Template,
)
from .data.tasks import (
    format_prompt as format_prompt,
)
from .data.tokenizer import (
    ByteTokenizer as ByteTokenizer,
)
from .data.tokenizer import (
    SentencePieceTokenizer as SentencePieceTokenizer,
)
from .data.tokenizer import (
    load_tokenizer as load_tokenizer,
)
from .data.tokenizer import (
    train_sentencepiece as train_sentencepiece,
)
from .evaluation.evaluator import (
    evaluate as evaluate,
)
from .evaluation.evaluator import (
    evaluation_callback as evaluation_callback,
)
from .evaluation.evaluator import (
    rank_options as rank_options,
)
from .evaluation.lm_harness import (
    MoekitLM as MoekitLM,
)
from .evaluation.lm_harness import (
    harness as harness,
)
from .evaluation.scores import (
    NormalisedAverage as NormalisedAverage,
)
from .evaluation.scores import (
    Scores as Scores,
)
from .evaluation.scores import (
    compare as compare,
)
from .evaluation.scores import (
    normalised_average as normalised_average,
)
from .evaluation.scores import (
    report as report,
)
from .model.decoding import (
    generate as generate,
)
from .model.transformer import (
    EncoderDecoder as EncoderDecoder,
)
from .model.transformer import (
    with_config as with_config,
)
from .moe.layer import (
    LayerStats as LayerStats,
)
from .moe.layer import (
    MoE as MoE,
)
from .moe.layer import (
    TokenRouting as TokenRouting,
)
from .moe.routing import (
    ExpertChoice as ExpertChoice,
)
from .moe.routing import (
    GShard as GShard,
)
from .moe.routing import (
    Hash as Hash,
)
from .moe.routing import (
    LossFree as LossFree,
)
from .moe.routing import (
    Random as Random,
)
from .moe.routing import (
    Routing as Routing,
)
from .moe.routing import (
    Switch as Switch,
)
from .moe.routing import (
    TopK as TopK,
)
from .moe.routing import (
    assign as assign,
)
from .planning.step_plan import (
    Plan as Plan,
)
from .planning.step_plan import (
    plan as plan,
)
from .sharding import (
    make_mesh as make_mesh,
)
from .studies import (
    Lab as Lab,
)
from .studies import (
    StudyConfig as StudyConfig,
)
from .studies import (
    finetune as finetune,
)
from .studies import (
    instruction_tune as instruction_tune,
)
from .studies import (
    pretrain as pretrain,
)
from .studies import (
    study as study,
)
from .training.checkpoint import (
    load as load,
)
from .training.checkpoint import (
    save as save,
)
from .training.loop import (
    Run as Run,
)
from .training.loop import (
    train as train,
)
from .training.metrics import (
    Metrics as Metrics,
)
from .training.step import (
    auxiliary_losses as auxiliary_losses,
)

__version__: str
