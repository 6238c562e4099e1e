"""The public names of moekit and where each of them is defined."""

from .analysis.balance import (
    balance_table as balance_table,
)
from .analysis.plots import (
    LivePlot as LivePlot,
    plot_bars as plot_bars,
    plot_coactivation as plot_coactivation,
    plot_domain_distance as plot_domain_distance,
    plot_domain_specialization as plot_domain_specialization,
    plot_expert_load as plot_expert_load,
    plot_learning_curves as plot_learning_curves,
    plot_packing as plot_packing,
    plot_rates as plot_rates,
    plot_routing as plot_routing,
    plot_scores as plot_scores,
    plot_seeds as plot_seeds,
    plot_sharding as plot_sharding,
    plot_specialization as plot_specialization,
    plot_task_specialization as plot_task_specialization,
    plot_token_specialization as plot_token_specialization,
    save_figure as save_figure,
    show as show,
)
from .analysis.specialization import (
    domain_specialization as domain_specialization,
    saturation as saturation,
    task_specialization as task_specialization,
    token_specialization as token_specialization,
)
from .analysis.token_view import (
    TokenView as TokenView,
    plot_tokens as plot_tokens,
)
from .analysis.trace import (
    RouterTrace as RouterTrace,
    text_prompts as text_prompts,
    trace_routing as trace_routing,
)
from .config import (
    ModelConfig as ModelConfig,
)
from .data.batch import (
    Batch as Batch,
    pad_prompts as pad_prompts,
    unigram_entropy as unigram_entropy,
)
from .data.corpora import (
    corpus as corpus,
)
from .data.flan import (
    flan_mixture as flan_mixture,
)
from .data.loader import (
    batches as batches,
)
from .data.mixture import (
    Mixture as Mixture,
)
from .data.own import (
    task as task,
)
from .data.own_mixture import (
    mixture as mixture,
)
from .data.span_corruption import (
    restore as restore,
    span_corruption as span_corruption,
)
from .data.suites import (
    Suite as Suite,
    suite as suite,
    suites as suites,
)
from .data.tasks import (
    Example as Example,
    Prompt as Prompt,
    Task as Task,
    Template as Template,
    format_prompt as format_prompt,
)
from .data.text import (
    Corpus as Corpus,
    Document as Document,
)
from .data.tokenizer import (
    ByteTokenizer as ByteTokenizer,
    SentencePieceTokenizer as SentencePieceTokenizer,
    load_tokenizer as load_tokenizer,
    train_sentencepiece as train_sentencepiece,
)
from .evaluation.evaluator import (
    evaluate as evaluate,
    evaluation_callback as evaluation_callback,
)
from .evaluation.likelihood import (
    rank_options as rank_options,
)
from .evaluation.lm_harness import (
    MoekitLM as MoekitLM,
    harness as harness,
)
from .evaluation.scores import (
    NormalisedAverage as NormalisedAverage,
    Scores as Scores,
    compare as compare,
    normalised_average as normalised_average,
    report as report,
)
from .experiment.report import (
    StudyReport as StudyReport,
    study as study,
)
from .generation_config import (
    GenerationSettings as GenerationSettings,
)
from .model.convert import (
    export as export,
)
from .model.decoding import (
    generate as generate,
)
from .model.transformer import (
    EncoderDecoder as EncoderDecoder,
    with_config as with_config,
)
from .moe.layer import (
    MoE as MoE,
)
from .moe.routing import (
    ExpertChoice as ExpertChoice,
    GShard as GShard,
    Hash as Hash,
    LossFree as LossFree,
    Random as Random,
    Routing as Routing,
    Switch as Switch,
    TopK as TopK,
    assign as assign,
)
from .moe.stats import (
    LayerStats as LayerStats,
    TokenRouting as TokenRouting,
)
from .planning.compile_step import (
    plan as plan,
)
from .planning.step_plan import (
    Plan as Plan,
)
from .presets import (
    PRESETS as PRESETS,
    preset as preset,
)
from .sharding import (
    make_mesh as make_mesh,
)
from .studies import (
    StudyConfig as StudyConfig,
    StudySetup as StudySetup,
    finetune as finetune,
    instruction_tune as instruction_tune,
    pretrain as pretrain,
)
from .train_config import (
    TrainConfig as TrainConfig,
)
from .training.loggers import (
    TensorBoard as TensorBoard,
    WandB as WandB,
)
from .training.loop import (
    Run as Run,
    train as train,
)
from .training.metrics import (
    Metrics as Metrics,
)
from .training.model_files import (
    load as load,
    save as save,
)
from .training.step import (
    auxiliary_losses as auxiliary_losses,
)
from .training.upcycle import (
    upcycle as upcycle,
)

__version__: str
