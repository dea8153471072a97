"""Descend and its guard: what it refuses, what it gives back when a run breaks, what it must not disturb."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge import Classification, Descend, Guard, Refused, RunFailed, chain, methods, split, unlearn
from expunge.combine import PCGrad, Weighted
from expunge.core import Batch, Case, Request
from expunge.objectives import NLL, NPO, Ascent
from expunge.optim import SGD, Adam
from expunge.oracle import On

TASK = Classification(3)


def model(*layers: nn.Module) -> nn.Module:
    """A small net, `layers` in its middle; the same weights every time, no draw from the global stream."""
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Linear(4, 8), *(layers or (nn.Tanh(),)), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return net


def request(dtype: torch.dtype = torch.float32) -> Request:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(60, 4, generator=generator).to(dtype)
    return split((x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), forget=list(range(6)))


def run(net: nn.Module, stage: Any, *, data: Request | None = None, copy: bool = True) -> Any:
    return unlearn(net, data or request(), task=TASK, method=stage, copy=copy)


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


class SteepAtZero(nn.Module):
    """Its outputs are finite, its gradient is not: a square root at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.root = model(), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + 0.0 * self.root.abs().sqrt()


def test_gradients_left_on_the_model_are_not_added_to_the_first_step() -> None:
    clean, stale = model(), model()
    for parameter in stale.parameters():
        parameter.grad = torch.ones_like(parameter)
    step = Descend(retain=NLL(), optimizer=SGD(0.1, 0.0), steps=1)
    assert torch.equal(weights(run(clean, step, copy=False).model), weights(run(stale, step, copy=False).model))


def test_a_step_that_failed_half_way_does_not_reach_the_next_stage() -> None:
    class Breaks(Ascent):
        def __call__(self, case: Case, batch: Batch) -> Tensor:
            return super().__call__(case, batch) * torch.nan

    broken = Descend(retain=NLL(), others={"b": On("forget", Breaks())}, steps=2, guard=Guard())
    after = Descend(retain=NLL(), optimizer=SGD(0.1, 0.0), steps=1)
    idle = Descend(retain=NLL(), steps=0)
    assert torch.equal(
        weights(run(model(), chain(broken, after)).model), weights(run(model(), chain(idle, after)).model)
    )


@pytest.mark.parametrize("stage", [methods.surgery(steps=4), methods.random_label(steps=4)], ids=lambda s: s.name)
def test_a_gradient_that_is_not_finite_ends_in_the_kept_state(stage: Any) -> None:
    net = SteepAtZero()
    done = run(net, stage)
    assert torch.equal(weights(done.model), weights(net))
    assert "the state of step 0 was kept" in done.notes[0]


def test_without_data_to_watch_nothing_is_claimed_to_be_kept() -> None:
    """A guard that watched nothing has no good state: the run fails, and does not hand back a broken model."""
    stage = Descend(forget=Ascent(), optimizer=SGD(1e38), steps=9, guard=Guard())
    with pytest.raises(RunFailed, match="no data for the guard to watch"):
        run(model(nn.ReLU()), stage, data=Request(forget=request().forget))


def test_a_broken_weight_that_the_probe_does_not_use_is_not_kept() -> None:
    """The retain loss is finite all along, since only the forget loss uses the weight that overflows at the second step."""

    class Pushes(NLL):
        def __call__(self, case: Case, batch: Batch) -> Tensor:
            door: Any = case.model.door
            return super().__call__(case, batch) + door.sum()

    net = model()
    net.door = nn.Parameter(torch.ones(1))
    optimizer = SGD(1e-3, groups={"door": 3e38})
    done = run(net, Descend(forget=Pushes(), optimizer=optimizer, steps=2, guard=Guard(checks=2)))
    assert bool(torch.isfinite(weights(done.model)).all())
    assert "the state of step 1 was kept" in done.notes[0]


def test_roles_of_one_source_keep_their_own_batch_sizes() -> None:
    seen: dict[str, int] = {}

    class Counts(NLL):
        def __init__(self, name: str):
            object.__setattr__(self, "name", name)

        def draw(self, case: Case, batch: Batch, rng: Any) -> Batch:
            seen[self.name] = len(batch["id"])  # type: ignore[attr-defined]
            return batch

    near = {"near": On("retain", Counts("near"))}
    run(model(), Descend(retain=Counts("retain"), others=near, batch={"retain": 32, "near": 8}, steps=1))
    assert seen == {"retain": 32, "near": 8}


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"batch": 0}, "batch of role 'retain' must be at least 1"),
        ({"batch": {"retian": 8}}, "batch names role 'retian'"),
        ({"accumulate": 0}, "accumulate"),
        ({"steps": -1}, "steps"),
        ({"watch": -1}, "watch"),
        ({"norm_stats": "Live"}, "norm_stats must be"),
        ({"retain": NPO}, r"give an instance: NPO\(\)"),
        ({"retain": "npo"}, "objective of role 'retain' is 'npo'"),
        ({"combine": PCGrad}, r"give an instance: PCGrad\(\)"),
        ({"combine": Weighted({"retian": 2.0})}, "Weighted names role 'retian'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(Refused, match=word):
        run(model(), Descend(**{"retain": NLL(), "steps": 1, **settings}))


def test_watching_changes_nothing_in_live_mode(poisoned_randomness: Any) -> None:
    """Neither running statistics nor dropout's draws nor the global stream."""
    done = [
        run(
            model(nn.BatchNorm1d(8), nn.Dropout(), nn.Tanh()),
            Descend(retain=NLL(), steps=3, norm_stats="live", watch=watch),
        )
        for watch in (0, 1)
    ]
    assert "retain_realised" in done[1].record["history"][0]
    states = [outcome.model.state_dict() for outcome in done]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_predicted_change_is_that_of_the_clipped_step() -> None:
    stage = methods.surgery(tolerance=-1.0, max_norm=1e-2, lr=1e-2, steps=3).stage
    done = run(model().double(), Descend(**{**vars(stage), "watch": 1}), data=request(torch.float64))
    for row in done.record["history"]:
        assert row["retain_realised"] == pytest.approx(row["retain_predicted"], rel=1e-2)


def test_adam_in_float16_is_refused_not_run_into_nan() -> None:
    half = split((torch.ones(9, 4, dtype=torch.float16), torch.zeros(9).long()), forget=[0])
    with pytest.raises(Refused, match="float32 or bfloat16"):
        run(model().half(), Descend(retain=NLL(), optimizer=Adam(), steps=1), data=half)


class _Noisy(nn.Module):
    """Draws in eval mode too, as a sampling layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.1 * torch.randn_like(x))


def test_a_model_that_draws_by_itself_leaves_the_global_stream_and_repeats_to_the_bit() -> None:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    request = split((x, torch.arange(40) % 3), forget=range(10))
    model = _Noisy()
    found = []
    for poison in (1, 2):
        torch.manual_seed(poison)
        before = torch.get_rng_state()
        done = unlearn(model, request, task=Classification(3), method="salun", seed=3)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(done.record["result"])
    assert found[0] == found[1]


def test_live_normalisation_of_single_examples_is_refused() -> None:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    request = split((x, torch.arange(40) % 3), forget=range(10))
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    stage = Descend(retain=NLL(), steps=2, batch=1, norm_stats="live")
    with pytest.raises(Refused, match="one example per batch"):
        unlearn(model, request, task=Classification(3), method=stage)
