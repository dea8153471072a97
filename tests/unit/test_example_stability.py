"""The stability example: its sensitivities are right, and its samples keep their bound."""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from expunge.criteria import surgery

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "stability_samples.py"
    spec = importlib.util.spec_from_file_location("stability_samples", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def chosen(weights: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """A rule that picks one gradient."""
    return weights


@pytest.mark.parametrize("gains", [(2.0, 0.5), (6.0, 2.0), (8.0, 0.4)])
def test_sensitivities_equal_finite_differences(example: ModuleType, gains: tuple[float, float]) -> None:
    x = torch.tensor(gains, dtype=torch.float64).log()

    def at(shift: torch.Tensor) -> torch.Tensor:
        return torch.stack(list(example.criteria(x + shift, 3.0).values()))

    h = 1e-5
    unit = torch.eye(2, dtype=torch.float64)
    jacobian = torch.stack([(at(h * u) - at(-h * u)) / (2 * h) for u in unit], 1)  # [criterion, gain]
    for row, weights in zip(jacobian, unit, strict=True):
        step = surgery(partial(example.criteria, duration=3.0), x, partial(chosen, weights), mode="forward")
        assert torch.allclose(step.update, row, rtol=1e-6, atol=1e-9)
    assert torch.allclose(step.gramian, jacobian @ jacobian.T, rtol=1e-6, atol=1e-9)


def test_the_integrator_solves_the_equations(example: ModuleType) -> None:
    """Fourth order: against a step four times as fine, for the step's own size."""
    gains = torch.tensor([4.0, 2.0], dtype=torch.float64)
    coarse = example.simulate(gains, 2.0)[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "STEP", example.STEP / 4)
        fine = example.simulate(gains, 2.0)[-1]
    assert (coarse - fine).norm() < 1e-3 * fine.norm()


def test_samples_keep_the_bound_and_lower_the_excursion(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    bound = -0.4
    walks = example.main(walkers=2, steps=6, bound=bound, duration=4.0, seed=1)
    assert "Samples with decay" in capsys.readouterr().out
    assert len(walks) == 2
    samples = [sample for walk in walks for sample in walk]
    assert len(samples) >= 4
    assert all(sample.decay <= bound for sample in samples)
    for walk in walks:
        excursions = [sample.excursion for sample in walk]
        assert excursions == sorted(excursions, reverse=True)
    for sample in samples[:2]:  # the record is what the motion does
        gains = torch.tensor([sample.stiffness, sample.damping], dtype=torch.float64)
        found = example.criteria(gains.log(), 4.0)
        assert float(found["decay"]) == pytest.approx(sample.decay, rel=1e-6)
        assert math.exp(float(found["excursion"])) == pytest.approx(sample.excursion, rel=1e-6)
