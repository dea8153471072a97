"""From a model to TOFU's numbers: it reads the answers of the four sets, writes its own, and is scored.

For each item the model reads the true answer, what the truth ratio takes for right (the paraphrased answer, where the set has
one) and each wrong answer, all after the question itself, and writes greedily up to 200 new tokens, whose ROUGE-L recall
against the true answer is taken. ``said`` gives these per item; ``evaluate`` makes the scores of them, beside those of a
retrained model, with intervals.

Every answer counts with its end token, as in the release. Sharded over processes and resumable: see ``asking``.

Paper: Maini et al. 2024 (arXiv:2401.06121). Departures: new tokens are counted, as in open-unlearning, where the first
release counted the prompt among its 200; no set is cut to 300 items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from expunge.benchmarks.asking import Asking, Row
from expunge.benchmarks.tofu import Item, Tofu
from expunge.benchmarks.tofu_compare import ForgetQuality, Score, forget_quality, scores
from expunge.benchmarks.tofu_scores import SETS, Form, Said, rouge_l_recall
from expunge.core import Key, Refused
from expunge.data.json_lines import Example
from expunge.registry import did_you_mean

NEW_TOKENS = 200


@dataclass(frozen=True)
class Evaluation:
    """A model's TOFU numbers.

    Attributes:
        scores: three metrics of each set, and "model_utility", each with an interval and beside the retrained model's.
        quality: forget quality; None without a retrained model or without the forget set.
        form: of the truth ratio in both.
    """

    scores: tuple[Score, ...]
    quality: ForgetQuality | None
    form: Form

    @property
    def utility(self) -> Score | None:
        """Model utility, where its three sets were given."""
        return next((score for score in self.scores if score.name == "model_utility"), None)


def sets(tofu: Tofu) -> dict[str, tuple[Item, ...]]:
    """Set -> the items that the scores are over."""
    parts = (tofu.forget_perturbed, tofu.retain_perturbed, tofu.real_authors, tofu.world_facts)
    return dict(zip(SETS, parts, strict=True))


def said(
    asking: Asking, items: Mapping[str, Sequence[Item]], *, new_tokens: int = NEW_TOKENS, only: Iterable[str] = SETS
) -> dict[str, Said]:
    """What a model says of each set.

    Args:
        asking: the model with its template. items: set (of ``SETS``) -> questions with wrong answers; ``sets(tofu)``, or
            the invented ones of mini-TOFU. new_tokens: most that it writes. only: sets to ask, where not all.

    Raises:
        Refused: for an unknown set, an item without wrong answers, or items with different numbers of them.
    """
    wanted = list(only)
    for name in [*items, *wanted]:
        if name not in SETS:
            raise Refused(f"TOFU has no set {name!r} to score{did_you_mean(name, SETS)}; it has {', '.join(SETS)}")
    return {name: _said(asking, name, items[name], new_tokens) for name in SETS if name in items and name in wanted}


def evaluate(
    model: Mapping[str, Said],
    retrained: Mapping[str, Said] | None = None,
    *,
    form: Form = "geometric",
    draws: int = 1000,
    key: Key = Key(0),
) -> Evaluation:
    """The scores of what was said; forget quality where a retrained model was asked the forget set too.

    Args:
        model, retrained: as ``said`` gives them. form: "geometric" (released) or "arithmetic" (paper); it goes with every
            number that has a truth ratio in it. draws, key: of the bootstrap.
    """
    judged = scores(model, retrained, form, draws, key)
    both = retrained is not None and "forget" in retrained and "forget" in model
    quality = forget_quality(model["forget"], retrained["forget"], form, draws, key) if both and retrained else None
    return Evaluation(judged, quality, form)


def _said(asking: Asking, name: str, items: Sequence[Item], new_tokens: int) -> Said:
    counts = {len(item.wrong) for item in items}
    if len(counts) != 1 or 0 in counts:
        raise Refused(
            f"the items of {name} have {', '.join(map(str, sorted(counts))) or 'no'} wrong answers: the truth ratio needs one "
            f"or more, the same number in each"
        )
    template, k = asking.written, counts.pop()
    examples = [_example(item, item.answer) for item in items]
    told = [answer for item in items for answer in (item.answer, item.correct, *item.wrong)]
    asked = [example for example in examples for _ in range(k + 2)]
    rows: list[Row] = [template.ids(e.answered(answer)) for e, answer in zip(asked, told, strict=True)]
    nll, units = asking.losses(rows, f"reading {name}")
    loss = (nll / units).reshape(len(items), k + 2)
    prompts = [template.prompt_ids(example) for example in examples]
    written = asking.texts(prompts, new_tokens=new_tokens, what=f"answering {name}")
    rouge = rouge_l_recall([item.answer for item in items], written)
    return Said(
        tuple(item.question for item in items), loss[:, 0], loss[:, 1], np.ascontiguousarray(loss[:, 2:]), rouge
    )


def _example(item: Item, answer: str) -> Example:
    return Example(({"role": "user", "content": item.question},), answer, f"TOFU item {item.id}")
