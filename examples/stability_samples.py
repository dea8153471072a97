"""Samples between two stability criteria of a controlled pendulum, by one-sided gradient surgery.

A pendulum is held upright by a motor that lags behind its command::

    angle' = rate,   rate' = sin(angle) + torque,   torque' = (-stiffness angle - damping rate - torque) / lag

Two criteria of the simulated motion depend on the two gains, each in its own way:

- ``decay``: the growth rate of the late motion. Negative is asymptotically stable; too little and too much gain both
  destroy it, the second because of the lag.
- ``excursion``: the largest angle on the way (smoothed, logarithm). Low is stable in the practical sense.

From random gains, each step lowers the excursion while it protects the decay: with ``tolerance = (bound - decay) / rate``
the decay may rise by what is left below its bound, and must fall where it is above. One number, one sign, both
cases. A proposal that keeps the bound in fact, not just to first order, is a sample; the samples then lie
between the criterion that is bounded and the one that is pursued.

Sensitivities are solved together with the motion: ``surgery(mode="forward")`` carries a tangent through the
integrator, one pass per gain, and stores no trajectory.

Run: ``python examples/stability_samples.py``
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from expunge.gramian import one_sided
from expunge.surgery import surgery

LAG = 0.15
START = (0.3, 0.5, 0.0)  # angle, rate, torque
STEP = 0.1


@dataclass(frozen=True)
class Sample:
    """An accepted point: the gains, and both criteria there."""

    walker: int
    stiffness: float
    damping: float
    decay: float
    excursion: float


def criteria(log_gains: Tensor, duration: float = 8.0) -> dict[str, Tensor]:
    """``excursion`` (free) and ``decay`` (protected) of the motion under gains ``exp(log_gains)``, both minimised."""
    states = simulate(log_gains.exp(), duration)
    sharpness = 20.0
    angles = states[:, 0].square() + 1e-12
    late = states[2 * len(states) // 3 :].square().sum(1)
    early = states[: len(states) // 3].square().sum(1)
    return {
        "excursion": (sharpness * angles.log() / 2).logsumexp(0) / sharpness,
        "decay": (late.mean().log() - early.mean().log()) / (2 * duration * 2 / 3),
    }


def simulate(gains: Tensor, duration: float) -> Tensor:
    """The motion [steps + 1, 3] by the classical Runge-Kutta method, differentiable in the gains [2]."""
    zero, one = torch.zeros((), dtype=gains.dtype), torch.ones((), dtype=gains.dtype)
    motor = torch.stack([-gains[0], -gains[1], -one]) / LAG
    matrix = torch.stack([torch.stack([zero, one, zero]), torch.stack([zero, zero, one]), motor])
    push = torch.tensor([0.0, 1.0, 0.0], dtype=gains.dtype)

    def slope(state: Tensor) -> Tensor:
        return matrix @ state + push * state[0].sin()

    state = torch.tensor(START, dtype=gains.dtype)
    states = [state]
    for _ in range(round(duration / STEP)):
        first = slope(state)
        second = slope(state + STEP / 2 * first)
        third = slope(state + STEP / 2 * second)
        fourth = slope(state + STEP * third)
        state = state + STEP / 6 * (first + 2 * (second + third) + fourth)
        states.append(state)
    return torch.stack(states)


def walk(walker: int, log_gains: Tensor, steps: int, bound: float, rate: float, duration: float) -> list[Sample]:
    """Follow surgery steps from one point; keep those that meet the bound."""
    samples: list[Sample] = []
    for _ in range(steps):
        here = criteria(log_gains, duration)
        room = (bound - float(here["decay"])) / rate
        step = surgery(
            lambda x: criteria(x, duration), log_gains, lambda gramian: one_sided(gramian, room), mode="forward"
        )
        length = float(step.update.norm())
        move = step.update * min(rate, 0.25 / (length + 1e-12))  # within a quarter of a logarithmic unit
        proposal = log_gains - move
        there = criteria(proposal, duration)
        inside = float(there["decay"]) <= bound
        if not inside and room > 0:  # the first order promised too much: half as far
            proposal = log_gains - move / 2
            there = criteria(proposal, duration)
            inside = float(there["decay"]) <= bound
            if not inside:
                rate = rate / 2
                continue
        log_gains = proposal
        if inside:
            stiffness, damping = log_gains.exp().tolist()
            samples.append(Sample(walker, stiffness, damping, float(there["decay"]), float(there["excursion"])))
    return samples


def main(walkers: int = 6, steps: int = 12, bound: float = -0.5, rate: float = 1.0, duration: float = 8.0,
         seed: int = 0) -> list[Sample]:
    """Walk from `walkers` random points, print a table, return every accepted sample."""
    generator = torch.Generator().manual_seed(seed)
    table = Table("walker", "stiffness, damping", "decay", "samples", "last stiffness, damping", "decay", "peak angle",
                  title=f"samples with decay <= {bound}, excursion pursued")
    samples: list[Sample] = []
    for walker in range(walkers):
        low, high = torch.tensor([1.2, 0.3]).double().log(), torch.tensor([8.0, 3.0]).double().log()
        start = low + (high - low) * torch.rand(2, generator=generator, dtype=torch.float64)
        before = criteria(start, duration)
        found = walk(walker, start, steps, bound, rate, duration)
        samples += found
        begun = "{:.2f}, {:.2f}".format(*start.exp().tolist())
        last = found[-1] if found else None
        table.add_row(
            str(walker), begun, f"{float(before['decay']):.3f}", str(len(found)),
            f"{last.stiffness:.2f}, {last.damping:.2f}" if last else "-",
            f"{last.decay:.3f}" if last else "-",
            f"{float(before['excursion'].exp()):.3f} to {torch.tensor(last.excursion).exp():.3f}" if last else "-",
        )
    Console().print(table)
    return samples


if __name__ == "__main__":
    main()
