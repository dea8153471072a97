"""Samples between two stability criteria of a controlled pendulum, by one-sided gradient surgery.

A pendulum is held upright by a motor that lags behind its command::

    angle' = rate,   rate' = sin(angle) + torque,   torque' = (-stiffness angle - damping rate - torque) / lag

Two criteria of the simulated motion depend on the two gains, each in its own way:

- ``decay``: the growth rate of the late motion. Negative is asymptotically stable; too little and too much
  gain both destroy it, the second because of the lag.
- ``excursion``: the largest angle on the way (smoothed, logarithm). Low is stable in the practical sense.

From random gains, each step lowers the excursion while it protects the decay: with tolerance ``(bound -
decay) / rate`` the decay may rise by what is left below its bound, and must fall where it is above. A
proposal that keeps the bound in fact, not just to first order, is a sample. The samples so lie between the
criterion that is bounded and the one that is pursued, many of them along the bound itself.

Sensitivities are solved together with the motion: ``surgery(mode="forward")`` carries a tangent through the
integrator, one pass per gain, and stores no trajectory's graph.

Run: ``python examples/stability_samples.py``
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from expunge.criteria import surgery
from expunge.gramian import one_sided

LAG = 0.15
START = (0.3, 0.5, 0.0)  # angle, rate, torque
STEP = 0.1
LONGEST = 0.25  # of one move, in logarithmic gains


@dataclass(frozen=True)
class Sample:
    """Two gains, and what the motion does there; `excursion` is an angle."""

    stiffness: float
    damping: float
    decay: float
    excursion: float

    def __str__(self) -> str:
        return f"{self.stiffness:.2f}, {self.damping:.2f} | {self.decay:.3f} | {self.excursion:.3f}"


def criteria(log_gains: Tensor, duration: float = 8.0) -> dict[str, Tensor]:
    """``excursion`` (free) and ``decay`` (protected) of the motion under gains ``exp(log_gains)``."""
    states = simulate(log_gains.exp(), duration)
    third = len(states) // 3
    energy = states.square().sum(1)
    sharpness = 10.0
    return {
        "excursion": (sharpness * (states[:, 0].square() + 1e-12).log()).logsumexp(0) / (2 * sharpness),
        "decay": (energy[-third:].mean().log() - energy[:third].mean().log()) / (2 * duration * 2 / 3),
    }


def simulate(gains: Tensor, duration: float) -> Tensor:
    """The motion [steps + 1, 3] by the classical Runge-Kutta method, differentiable in the gains [2]."""
    zero, one = gains.new_zeros(()), gains.new_ones(())
    motor = torch.stack([-gains[0], -gains[1], -one]) / LAG
    linear = torch.stack([torch.stack([zero, one, zero]), torch.stack([zero, zero, one]), motor])
    gravity = gains.new_zeros(3, 3)
    gravity[1, 0] = 1.0  # the rate gains sin(angle)

    def slope(state: Tensor) -> Tensor:
        return torch.addmv(gravity @ state.sin(), linear, state)

    state = gains.new_tensor(START)
    states = [state]
    for _ in range(round(duration / STEP)):
        first = slope(state)
        second = slope(state.add(first, alpha=STEP / 2))
        third = slope(state.add(second, alpha=STEP / 2))
        fourth = slope(state.add(third, alpha=STEP))
        state = state.add(first + fourth, alpha=STEP / 6).add(second + third, alpha=STEP / 3)
        states.append(state)
    return torch.stack(states)


def walk(start: Tensor, steps: int, bound: float, rate: float, duration: float) -> list[Sample]:
    """Follow surgery steps from logarithmic gains `start`; keep the points that meet the bound."""
    samples: list[Sample] = []
    here, decay = start, float(criteria(start, duration)["decay"])
    for _ in range(steps):
        room = (bound - decay) / rate  # what the decay may rise (>= 0) or must fall (< 0), per unit of rate
        rule = partial(one_sided, tolerance=room)
        step = surgery(lambda gains: criteria(gains, duration), here, rule, mode="forward")
        proposal = here - step.update * min(rate, LONGEST / max(float(step.update.norm()), 1e-12))
        found = {name: float(value) for name, value in criteria(proposal, duration).items()}
        inside = found["decay"] <= bound
        if room >= 0 and not inside:  # the first-order promise did not hold this far: try nearer
            rate = rate / 2
            continue
        here, decay = proposal, found["decay"]
        if inside:
            stiffness, damping = here.exp().tolist()
            samples.append(Sample(stiffness, damping, decay, math.exp(found["excursion"])))
    return samples


def main(
    walkers: int = 5,
    steps: int = 10,
    bound: float = -0.5,
    rate: float = 1.0,
    duration: float = 6.0,
    seed: int = 0,
) -> list[list[Sample]]:
    """Walk from random gains, print one line for each walker, return the samples of each."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (torch.tensor(gains, dtype=torch.float64).log() for gains in ((1.2, 0.3), (8.0, 3.0)))
    table = Table(title=f"Samples with decay <= {bound}: stiffness, damping | decay | largest angle")
    for column in ("walker", "start", "samples", "first sample", "last sample"):
        table.add_column(column, no_wrap=True)
    everything = []
    for walker in range(walkers):
        start = low + (high - low) * torch.rand(2, generator=generator, dtype=torch.float64)
        samples = walk(start, steps, bound, rate, duration)
        values = {name: float(value) for name, value in criteria(start, duration).items()}
        stiffness, damping = start.exp().tolist()
        begun = Sample(stiffness, damping, values["decay"], math.exp(values["excursion"]))
        ends = [str(samples[0]), str(samples[-1])] if samples else ["none", "none"]
        table.add_row(str(walker), str(begun), str(len(samples)), *ends)
        everything.append(samples)
    Console(width=116).print(table)
    return everything


if __name__ == "__main__":
    main()
