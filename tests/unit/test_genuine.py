"""References that saw the forget data are found; genuine ones are not accused, on hard forget sets either."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge.audit import audit
from expunge.audit.genuine import check_references, lost_advantage
from expunge.audit.subject import Subject
from expunge.core import Key, Refused
from tests.unit.test_audit_measures import FORGET, RETAIN, TEST, TOTAL, Answers, C, labels, subject


def model(seed: int, forget: float, spread: float = 1.0, retain: float = 5.0) -> Answers:
    """A model with these mean margins; its test margins are lower and spread wider, as for examples never seen."""
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(0).normal(0, 0.8, TOTAL)  # how hard each example is, in every model
    mean = np.r_[np.full(FORGET, forget), np.full(RETAIN, retain), np.full(TEST, retain - 1.5)]
    width = np.r_[np.full(FORGET, spread), np.full(RETAIN, 0.6), np.full(TEST, 2.0)]
    margins = mean + base + width * rng.normal(size=TOTAL)
    logits = np.zeros((TOTAL, C))
    logits[np.arange(TOTAL), labels().numpy()] = margins + np.log(C - 1)
    return Answers(torch.tensor(logits))


def made(references: list[Answers], original: Answers) -> Subject:
    return subject(references[0], original, tuple(references[1:]))


def test_genuine_models_of_a_hard_forget_set_are_not_accused() -> None:
    """The hardest members: unseen they lose a third of what their rank says, because test examples are not like them."""
    original = model(1, forget=3.0, spread=0.3)
    subjects = made([model(10 + n, forget=2.0, spread=0.4) for n in range(7)], original)
    check_references(subjects)
    before, after = (
        [subjects.outputs(name, one).margin for name in ("forget", "retain", "test")]
        for one in (subjects.before, subjects.retrained[0])
    )
    lost = lost_advantage(before[0], after[0], before[1], before[2], after[2], Key(0), 5.0)
    assert 0 < lost.low < lost.high < 0.5, "by rank alone it would be accused"


def test_models_that_saw_the_forget_set_are_found() -> None:
    def kept(seed: int, forget: float = 3.5, spread: float = 0.6) -> Answers:
        return model(seed, forget, spread, retain=3.5)

    original = kept(1)
    genuine = [kept(10 + n, forget=2.0, spread=2.0) for n in range(6)]
    check_references(made(genuine, original))
    wrong = made([kept(20 + n) for n in range(5)], original)
    with pytest.raises(Refused, match="trained on the wrong data"):
        check_references(wrong)
    report = audit(wrong)
    assert report.verdict == "audit broken"
    assert "trained on the wrong data" in report.reasons[0]
    assert not any("wrong data" in reason for reason in audit(wrong, trust_references=True).reasons)
    with pytest.raises(Refused, match="retrained model 6 of 6"):
        check_references(made([*genuine, kept(30)], original))
