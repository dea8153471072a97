"""What the baselines' defaults do to a small network of digits: a class goes, the rest stays, for little work."""

from __future__ import annotations

import pytest

import expunge as ex
from tests.golden.forgetting import accuracy, digits

NAMES = ("gradient_ascent", "grad_diff", "random_label", "l1_sparse", "salun", "scrub", "bad_teacher", "npo")


@pytest.mark.parametrize("label", [3, 8])
@pytest.mark.parametrize("name", NAMES)
def test_a_class_is_forgotten_and_the_rest_stays(name: str, label: int) -> None:
    """A retrained network knows nothing of the class: accuracy 0. 5,000 rows are a tenth of 70 epochs over 700."""
    model, request = digits(label)
    done = ex.unlearn(model, request, task=ex.Classification(10), method=name)
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(done.model, request.forget) < 0.3
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.05
    assert done.record["cost"]["backward"] <= 5000
