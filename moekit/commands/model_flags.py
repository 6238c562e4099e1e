"""The flags that change a preset: --set FIELD=VALUE, --router, --tokenizer."""

import typing
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moekit.commands.routers import find_router
from moekit.errors import unknown

if TYPE_CHECKING:
    from moekit.config import ModelConfig

SetFlag = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        name="set",
        help="Change a field of the model's configuration, as num_experts=16; may be given "
        "several times.",
    ),
]
BOOLEANS = {"true": True, "false": False}
EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    NoneType: "none",
}


def model_config(
    preset: str, settings: Sequence[str] = (), router: str = "", tokenizer: str = ""
) -> "ModelConfig":
    """A preset with changed fields, another router and another tokenizer.

    Raises:
      ValueError: an unknown preset, field, router or value, or fields that do not fit together.
      FileNotFoundError: no such tokenizer, or no such file of a router.
    """
    import moekit as mk

    cfg = mk.preset(preset)
    changes = read_settings(settings)
    if router:
        changes["router"] = find_router(router)
    if tokenizer:
        changes["tokenizer"] = tokenizer
        changes["vocab_size"] = mk.load_tokenizer(tokenizer).vocab_size
    return cfg.replace(**changes)


def read_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Fields of a `ModelConfig` and their values, from texts such as num_experts=16.

    Raises:
      ValueError: an unknown field, or a value that is not of the field's type.
    """
    from moekit.config import ModelConfig

    types_of_field = typing.get_type_hints(ModelConfig)
    changes = {}
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: write FIELD=VALUE, for example num_experts=16")
        if field not in types_of_field:
            raise unknown("field of ModelConfig", field, types_of_field)
        if field == "generation":
            raise ValueError(
                "--set generation: the settings of `generate` are changed in Python, with "
                "cfg.replace(generation=mk.GenerationSettings(..)), or by the flags of "
                "`moekit generate`"
            )
        changes[field] = _read_value(field, text, types_of_field[field])
    return changes


def _read_value(field: str, text: str, field_type: Any) -> Any:
    """A value of a field's type; "none" where it may be None."""
    types = typing.get_args(field_type) or (field_type,)
    if NoneType in types and text.lower() == "none":
        return None
    if field in ("router", "decoder_router"):
        return find_router(text)
    if str in types:
        return text
    try:
        if bool in types:
            return BOOLEANS[text.lower()]
        return int(text) if int in types else float(text)
    except (KeyError, ValueError):
        expected = " or ".join(EXPECTED[each] for each in types)
        raise ValueError(f"--set {field}={text[:60]}: {field} must be {expected}") from None
