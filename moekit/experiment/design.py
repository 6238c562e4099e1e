"""The design of a study, read from a TOML file: what is run, measured and compared.

A study is a table of cells: a model x a setup x a seed. `pretrained` is the setup that every other
one starts from. The file is written, and committed, before the cells are run.
"""

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moekit.config import ModelConfig, digest
from moekit.data.paths import require_file, require_file_name
from moekit.errors import unknown
from moekit.presets import preset
from moekit.train_config import TrainConfig

SOURCES = ("builtin", "local")
STAGES = ("tune", "finetune")
PRETRAINED = "pretrained"
# the setups that the paper's three findings are about
DIRECT, TUNED, TUNED_THEN_FINETUNED = "direct", "tuned", "tuned-finetuned"
MAX_BYTES = 1 << 20  # of a design file


@dataclass(frozen=True)
class HeldOut:
    """The tasks that no model is trained on before they are measured, by cluster.

    Args:
      choosing: clusters that settings may be chosen on.
      reporting: clusters that the findings are computed from.
      final: clusters that are evaluated once, at the end (`moekit study FILE --final`).
      questions: questions of a task, at most.
      shots: numbers of exemplars in the prompts.
    """

    choosing: tuple[str, ...]
    reporting: tuple[str, ...]
    final: tuple[str, ...] = ()
    questions: int = 100
    shots: tuple[int, ...] = (0,)

    @property
    def clusters(self) -> tuple[str, ...]:
        return (*self.choosing, *self.reporting, *self.final)


@dataclass(frozen=True)
class Setup:
    """How a model is trained after pretraining, or after another setup.

    Args:
      stage: "tune" (the instruction mixture) or "finetune" (one task, a training for each).
      after: the setup whose models it starts from.
      training: of the stage.
      tasks: the tasks to finetune on.
      mixture_tasks: number of tasks of the instruction mixture, 0 for all.
      shuffled_targets: whether every task's targets are shuffled among its examples, which leaves
        their format and takes the task away.
      model: changed fields of the model's configuration, such as dropout.
    """

    name: str
    stage: str
    training: TrainConfig
    after: str = PRETRAINED
    tasks: tuple[str, ...] = ()
    mixture_tasks: int = 0
    shuffled_targets: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyModel:
    """A model, and which cells of it are run.

    Args:
      config: without tokenizer and size of vocabulary, which the data determine.
      seeds: number of seeds.
    """

    name: str
    config: ModelConfig
    seeds: int
    setups: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """A sparse model and its dense twin."""

    sparse: str
    dense: str


@dataclass(frozen=True)
class Design:
    """What a study runs, measures and compares.

    Args:
      title: name of the study, and of the folder of its results.
      source: "builtin" or "local" (the data folder, MOEKIT_DATA).
      vocab_size: of the tokenizer, which is trained on the study's text.
      pretrain: training of the setup "pretrained".
      setups: the other setups, each after the one that it starts from.
      comparisons: pairs of models; the first is the study's main one.
      side_by_side: seeds that are trained in one program, which is faster on accelerators.
      first_seed: of all models; a pilot's seeds are others than those of its study.
      smallest_effect: the smallest effect of interest, in nats; findings say how many seeds would
        show it. None: they do not.
      pilot: title of the study that weights the tasks; its file lies beside this one.
    """

    title: str
    source: str
    vocab_size: int
    held_out: HeldOut
    pretrain: TrainConfig
    setups: Mapping[str, Setup]
    models: Mapping[str, StudyModel]
    comparisons: tuple[Comparison, ...]
    side_by_side: int = 1
    first_seed: int = 0
    smallest_effect: float | None = None
    pilot: str = ""

    def seeds(self, model: str) -> range:
        """The seeds of a model."""
        return range(self.first_seed, self.first_seed + self.models[model].seeds)

    def check_names(self, names: Iterable[str]) -> None:
        """Raise ValueError for a name that is neither a model's nor a setup's."""
        known = (PRETRAINED, *self.models, *self.setups)
        for name in names:
            if name not in known:
                raise unknown("model or setup", name, known)

    def chain(self, setup: str) -> list[Setup]:
        """The setups from pretraining (left out) to a setup, in the order of training."""
        found: list[Setup] = []
        while setup != PRETRAINED:
            found.insert(0, self.setups[setup])
            setup = self.setups[setup].after
        return found

    def digest(self, model: str, setup: str) -> str:
        """Twelve hexadecimal digits of all that the numbers of a cell depend on.

        Settings at their default are left out, so that new settings do not change it.
        """
        chain = []
        for each in self.chain(setup):
            trained = {"stage": each.stage, "training": _described(each.training)}
            trained |= {"tasks": each.tasks, "mixture_tasks": each.mixture_tasks}
            trained |= {"shuffled": each.shuffled_targets, "model": dict(each.model)}
            chain.append(trained)
        described = {
            "data": [self.source, self.vocab_size],
            "held_out": asdict(self.held_out),
            "model": _described(self.models[model].config.replace(name="")),
            "pretrain": _described(self.pretrain),
            "chain": chain,
        }
        return digest(described)


def _described(config: TrainConfig | ModelConfig) -> dict[str, Any]:
    """The settings that have no default, and those that are not at it."""
    required = {}
    for each in fields(config):
        if each.default is MISSING and each.default_factory is MISSING:
            required[each.name] = getattr(config, each.name)
    defaults = type(config)(**required).to_dict()
    changed = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    return required | changed


def read_design(path: str | Path) -> Design:
    """The design in a TOML file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no TOML, or an entry is missing, unknown or out of range. The message
        names the file and the entry.
    """
    path = Path(path)
    require_file(path, MAX_BYTES)
    try:
        return _design(tomllib.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:  # tomllib's errors are ValueErrors
        raise ValueError(f"{path}: {error}") from None


def _design(values: dict[str, Any]) -> Design:
    entries = ("title", "source", "vocab_size", "side_by_side", "first_seed", "pilot")
    entries += ("smallest_effect",)
    tables = ("batch", "held_out", "stages", "setups", "models", "comparisons")
    _check_entries("the file", values, entries + tables)
    _require("the file", values, ("title", "held_out", "stages", "models", "comparisons"))
    require_file_name(values["title"], "the study's title")
    source = values.get("source", "builtin")
    if source not in SOURCES:
        raise unknown("source", source, SOURCES)
    stages = _stages(values["stages"], values.get("batch", {}))
    setups = _setups(values.get("setups", {}), stages)
    models = {
        name: _model(name, entry, setups) for name, entry in _tables("models", values["models"])
    }
    design = Design(
        title=values["title"],
        source=source,
        vocab_size=_count("vocab_size", values.get("vocab_size", 1024)),
        held_out=_held_out(values["held_out"]),
        pretrain=stages["pretrain"],
        setups=setups,
        models=models,
        comparisons=tuple(_comparison(entry, models) for entry in values["comparisons"]),
        side_by_side=_count("side_by_side", values.get("side_by_side", 1)),
        first_seed=_count("first_seed", values.get("first_seed", 0), minimum=0),
        smallest_effect=_positive("smallest_effect", values.get("smallest_effect")),
        pilot=values.get("pilot", ""),
    )
    if not design.comparisons:
        raise ValueError("comparisons is empty: compare a sparse model with a dense one")
    return design


def _stages(tables: dict[str, Any], batch: dict[str, Any]) -> dict[str, TrainConfig]:
    """The training of each stage; `batch` holds what all stages share."""
    names = ("pretrain", *STAGES)
    _check_entries("stages", tables, names)
    _require("stages", tables, ("pretrain",))
    stages = {}
    for name in names:
        changes = batch | tables.get(name, {})
        stages[name] = _train_config(TrainConfig(), changes)
    return stages


def _train_config(base: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    if "seed" in changes:
        raise ValueError("seed: a study sets the seed of every cell; leave it out")
    changes = dict(changes)
    if "freeze" in changes:
        changes["freeze"] = _texts("freeze", changes["freeze"])
    _check_types(base, changes)
    return base.replace(**changes)


def _check_types(base: TrainConfig | ModelConfig, changes: Mapping[str, Any]) -> None:
    """Check that numbers are numbers and texts are texts; `replace` checks their values."""
    for name, value in changes.items():
        default = getattr(base, name, None)
        if isinstance(default, str):
            fits = isinstance(value, str)
        elif isinstance(default, bool):
            fits = isinstance(value, bool)
        elif isinstance(default, int):
            fits = isinstance(value, int) and not isinstance(value, bool)
        elif isinstance(default, float):
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        else:
            continue
        if not fits:
            raise ValueError(f"{name} is {value!r}: use a value such as {default!r}")


def _setups(tables: dict[str, Any], stages: Mapping[str, TrainConfig]) -> dict[str, Setup]:
    """The setups, in an order in which each comes after the one that it starts from."""
    entries = ("stage", "after", "training", "tasks", "mixture_tasks", "shuffled_targets", "model")
    setups: dict[str, Setup] = {}
    for name, table in _tables("setups", tables):
        where = f"setups.{name}"
        if name == PRETRAINED:
            raise ValueError(f"{where}: every study has this setup; leave it out")
        require_file_name(name, "the name of a setup")
        _check_entries(where, table, entries)
        _require(where, table, ("stage",))
        if table["stage"] not in STAGES:
            raise unknown(f"stage of {where}", table["stage"], STAGES)
        setups[name] = Setup(
            name=name,
            stage=table["stage"],
            training=_train_config(stages[table["stage"]], table.get("training", {})),
            after=table.get("after", PRETRAINED),
            tasks=_texts(f"{where}.tasks", table.get("tasks", [])),
            mixture_tasks=table.get("mixture_tasks", 0),
            shuffled_targets=table.get("shuffled_targets", False),
            model=table.get("model", {}),
        )
        if (table["stage"] == "finetune") != bool(setups[name].tasks):
            raise ValueError(f"{where}: finetuning needs tasks = [..], and only finetuning has it")
    for setup in setups.values():
        if setup.after != PRETRAINED:
            _check_parent(setup, setups)
    return dict(sorted(setups.items(), key=lambda item: _depth(item[1], setups)))


def _check_parent(setup: Setup, setups: Mapping[str, Setup]) -> None:
    if setup.after not in setups:
        raise unknown(f"setup that {setup.name} comes after", setup.after, (PRETRAINED, *setups))
    if setups[setup.after].stage == "finetune":
        raise ValueError(
            f"setups.{setup.name}: it comes after {setup.after}, which trains a model for each "
            "task; start from a setup of the stage tune"
        )
    _depth(setup, setups)


def _depth(setup: Setup, setups: Mapping[str, Setup]) -> int:
    """Number of setups before this one."""
    depth = 0
    while setup.after != PRETRAINED:
        depth += 1
        if depth > len(setups):
            raise ValueError(f"setups.{setup.name}: setups come after each other in a circle")
        setup = setups[setup.after]
    return depth


def _model(name: str, table: dict[str, Any], setups: Mapping[str, Setup]) -> StudyModel:
    where = f"models.{name}"
    require_file_name(name, "the name of a model")
    _check_entries(where, table, ("preset", "changes", "seeds", "setups"))
    _require(where, table, ("preset", "seeds"))
    chosen = _texts(f"{where}.setups", table.get("setups", list(setups)))
    for setup in chosen:
        if setup not in setups:
            raise unknown(f"setup of {where}", setup, setups)
        after = setups[setup].after
        if after not in (PRETRAINED, *chosen):
            raise ValueError(f"{where}: setup {setup} comes after {after}; add {after} to setups")
    base, changes = preset(table["preset"]), table.get("changes", {})
    _check_types(base, changes)
    config = base.replace(**changes)
    # in the order of training
    ordered = tuple(setup for setup in setups if setup in chosen)
    return StudyModel(
        name, config.replace(name=name), _count(f"{where}.seeds", table["seeds"]), ordered
    )


def _held_out(table: dict[str, Any]) -> HeldOut:
    where = "held_out"
    _check_entries(where, table, ("choosing", "reporting", "final", "questions", "shots"))
    _require(where, table, ("reporting",))
    held_out = HeldOut(
        choosing=_texts(f"{where}.choosing", table.get("choosing", [])),
        reporting=_texts(f"{where}.reporting", table["reporting"]),
        final=_texts(f"{where}.final", table.get("final", [])),
        questions=_count(f"{where}.questions", table.get("questions", 100)),
        shots=tuple(table.get("shots", [0])),
    )
    repeated = {name for name in held_out.clusters if held_out.clusters.count(name) > 1}
    if repeated:
        raise ValueError(f"{where}: {', '.join(sorted(repeated))} is in more than one set")
    if not held_out.reporting or not held_out.shots:
        raise ValueError(f"{where}: reporting and shots must not be empty")
    return held_out


def _comparison(table: dict[str, Any], models: Mapping[str, StudyModel]) -> Comparison:
    _check_entries("comparisons", table, ("sparse", "dense"))
    _require("comparisons", table, ("sparse", "dense"))
    for name in table.values():
        if name not in models:
            raise unknown("model of comparisons", name, models)
    return Comparison(**table)


def _tables(where: str, tables: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{where}.{name} is {table!r}: write a table, [{where}.{name}]")
        yield name, table


def _check_entries(where: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} is {table!r}: write a table")
    for name in table:
        if name not in known:
            raise unknown(f"entry of {where}", name, known)


def _require(where: str, table: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if name not in table:
            raise ValueError(f"{where} has no {name}: add it")


def _count(where: str, value: Any, minimum: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{where} is {value!r}: use a whole number of {minimum} or more")
    return value


def _positive(where: str, value: Any) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"{where} is {value!r}: use a number above 0")
    return float(value)


def _texts(where: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f'{where} is {values!r}: write a list of names, such as ["owned"]')
    return tuple(values)
