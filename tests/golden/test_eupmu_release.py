"""surgery and famo beside `igs` and `famo` of the release of EUPMU, whose mixed batches of equal shares weigh each loss by 1/2.

The numbers were computed by ``ImplicitGradientSurgery`` and ``FAMO`` of ``weighted_methods/weight_methods.py`` of
anseryuer/EUPMU-Efficient-Utility-Preserving-Machine-Unlearning @ 115655a6, in float64, eight steps of SGD on the network below.
"""

from __future__ import annotations

import pytest
import torch

import expunge as ex
from expunge import methods
from expunge.core import Stage
from tests.golden.by_hand import ALL, thirty

torch.set_num_threads(1)
SURGERY = [5.410674048268348, 1.716324288504138, 1.3432546753618644, 0.2129482008348167]
FAMO = [5.396537717476036, 1.726206003786107, 1.3368422944724547, 0.21252625937873396]


def norms(method: Stage) -> list[float]:
    net, request = thirty()
    outcome = ex.unlearn(net, request, task=ex.Classification(2), method=method)
    assert len(outcome.record["history"]) == 8
    return [float(p.detach().norm()) for p in outcome.model.parameters()]


def test_surgery_steps_as_igs_does() -> None:
    """Theirs: rate 0.1, momentum 0.9, decay 0.01, epsilon -0.08, which acts in all 8 steps, norm at most 0.25, in 2."""
    doubled = {"tolerance": 4 * -0.08, "max_norm": 2 * 0.25, "weight_decay": 2 * 0.01}
    found = norms(methods.surgery(**doubled, lr=0.1 / 2, momentum=0.9, steps=8, batch=ALL))
    assert found == pytest.approx(SURGERY, rel=1e-6)  # theirs adds 1e-8 to a denominator


def test_famo_steps_as_theirs_does() -> None:
    """Theirs: rate 0.1, momentum 0.9, decay 0.01; weights at 0.025, their decay 1e-5; its clip is void."""
    stage = methods.famo(decay=1e-5, max_norm=1e9, lr=0.1 / 2, momentum=0.9, weight_decay=2 * 0.01, steps=8, batch=ALL)
    assert norms(stage) == pytest.approx(FAMO, rel=1e-6)
