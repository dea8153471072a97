"""The same question put to the model before, the model after, and a retrained one: what a person looks at first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exchange:
    """One question and what several models answer, greedily.

    Attributes:
        part: "forget", "retain" or "test". question: as it was put; for running text its beginning. truth: the answer in
            the data. said: name of a model -> its answer.
    """

    part: str
    question: str
    truth: str
    said: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {"part": self.part, "question": self.question, "truth": self.truth, "said": dict(self.said)}

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Exchange:
        """The inverse of ``to_json``."""
        return Exchange(tree["part"], tree["question"], tree["truth"], dict(tree["said"]))
