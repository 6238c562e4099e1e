"""How a model generates unless the caller says otherwise: a frozen dataclass, without jax."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from moekit.checks import (
    bad_field,
    check_choice,
    check_integers,
    check_not_negative,
    check_positive,
)
from moekit.errors import unknown

LENGTH_NORMALIZATIONS = ("t5", "transformers")


@dataclass(frozen=True)
class GenerationSettings:
    """Default settings of `generate`; a checkpoint of Hugging Face brings its own.

    Args:
      max_new_tokens: longest answer in tokens.
      temperature: 0 decodes greedily; above 0, tokens are sampled from
        softmax(logits / temperature).
      top_k: sample from the k most probable tokens only; 0 is off.
      top_p: sample from the smallest set of tokens whose probabilities add up to this; 1 is off.
      num_beams: beams of beam search; 1 is off.
      length_penalty: exponent of the length by which beam search divides a log-probability.
      length_normalization: that length, for n tokens: "t5" is (5 + n) / 6 (Wu 2016, T5),
        "transformers" is n.

    Raises:
      ValueError: a value is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 0.6
    length_normalization: str = "t5"

    def __post_init__(self) -> None:
        owner = "GenerationSettings"
        check_integers(self, owner, minimum=1, fields=("max_new_tokens", "num_beams"))
        check_integers(self, owner, minimum=0, fields=("top_k",))
        check_not_negative(self, owner, "temperature")
        check_positive(self, owner, "top_p")
        if self.top_p > 1:
            raise bad_field(self, owner, "top_p", "use a probability above 0, at most 1")
        if not abs(self.length_penalty) < float("inf"):
            raise bad_field(self, owner, "length_penalty", "use a finite number, for example 0.6")
        check_choice(self, "length_normalization", LENGTH_NORMALIZATIONS)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GenerationSettings":
        """The inverse of `to_dict`; ValueError for an unknown field."""
        known = {field.name for field in fields(cls)}
        for field in values:
            if field not in known:
                raise unknown("field of GenerationSettings", field, known)
        return cls(**values)
