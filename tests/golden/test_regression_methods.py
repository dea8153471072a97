"""Blindspot, Gaussian-Amnesiac and fine-tuning of regressors (arXiv:2210.08196) beside the authors' loop and plain torch.

The numbers of ``FOLLOWED`` were computed by ``unlearn.fit_one_forget_cycle`` of ayu987/deep-regression-unlearning on the
network, the proxy and the one batch below, in float64 (three epochs at 0.01, AT_beta 50).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge import deviation, methods
from expunge.core import Key, Refused
from expunge.methods.gaussian_amnesiac import _drawn
from tests.fixtures import retrained, tiny
from tests.golden.by_hand import ALL, furthest, whole

torch.set_num_threads(1)
TASK = ex.Regression()
START = [2.0436542075439696, 1.0727990765248048, 5.174446413811762, 1.2141218202130655, 2.391639974291999]
FOLLOWED = [
    2.037301458011445,
    1.0366825341949815,
    5.169434433673799,
    1.2463797658575408,
    2.361395487135306,
    0.12238508213577103,
]
LOSS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"absolute": F.l1_loss, "squared": F.mse_loss}
both = pytest.mark.parametrize("distance", ["absolute", "squared"])


def images() -> tuple[nn.Module, nn.Module, ex.Request]:
    """A convolutional network, another of its kind, and ten images with a target, of which the first four go."""
    generator = torch.Generator().manual_seed(17)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def net() -> nn.Module:
        made = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)
        ).double()
        with torch.no_grad():
            for p in made.parameters():
                p.copy_(0.5 * normal(*p.shape))
        return made

    x, y = normal(10, 1, 6, 6), 3 * normal(10, 1)
    return net(), net(), ex.split((x, y), forget=[0, 1, 2, 3])


def norms(model: nn.Module) -> list[float]:
    return [float(p.detach().norm()) for p in model.parameters()]


def test_blindspot_follows_its_proxy_as_the_authors_loop_does() -> None:
    net, proxy, request = images()
    assert norms(net)[:5] == pytest.approx(START, rel=1e-12), "not the network of the numbers"
    stage = methods.blindspot(layers="1, 3", proxy_steps=0, lr=1e-2, steps=3, batch=ALL, make=lambda: proxy)
    done = ex.unlearn(net, request, task=TASK, method=stage)
    assert norms(done.model) == pytest.approx(FOLLOWED, rel=1e-9)
    assert done.case is not None
    assert "blindspot" not in done.case.teachers


@both
def test_the_proxy_is_trained_on_retain_data_alone(distance: str) -> None:
    """By hand: three steps of a fresh network on the retain data, two steps of the model after it; maps by loop."""
    net, fresh, request = images()
    (xf, _), (xr, yr) = whole(request.data("forget")), whole(request.data("retain"))
    loss, proxy, expected = LOSS[distance], copy.deepcopy(fresh), copy.deepcopy(net)
    optimizer = torch.optim.Adam(proxy.parameters(), 0.02)
    for _ in range(3):
        optimizer.zero_grad()
        loss(proxy(xr), yr).backward()
        optimizer.step()

    def maps(model: nn.Module) -> list[list[Tensor]]:
        found, x = [], xf
        for layer in list(model)[:3]:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                found.append([(m := sum(c * c for c in row) / len(row)) / (m * m).sum().sqrt() for row in x])
        return found

    optimizer = torch.optim.Adam(expected.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.no_grad():
            told, there = proxy(xf), maps(proxy)
        here = maps(expected)
        attention = sum(
            ((a - b) ** 2).mean() / len(xf)
            for one, other in zip(here, there, strict=True)
            for a, b in zip(one, other, strict=True)
        )
        total = 0.3 * (loss(expected(xf), told) + 7.0 * attention) + 0.7 * loss(expected(xr), yr)
        total.backward()
        optimizer.step()
    stage = methods.blindspot(
        distance=distance,
        attention=7.0,
        share=0.3,
        proxy_lr=0.02,
        proxy_steps=3,
        lr=1e-2,
        steps=2,
        batch=ALL,
        make=lambda: copy.deepcopy(fresh),
    )
    assert furthest(ex.unlearn(net, request, task=TASK, method=stage).model, expected) < 1e-12


def test_neither_forget_targets_nor_the_model_reach_the_proxy() -> None:
    net, _, request = images()
    told: list[Tensor] = []

    def call(model: nn.Module, batch: ex.core.Batch) -> Tensor:
        said = model(batch["x"])
        if not torch.is_grad_enabled() and len(said) == 4:
            told.append(said.clone())
        return said

    def run(model: nn.Module, part: ex.Request) -> Tensor:
        told.clear()
        stage = methods.blindspot(proxy_steps=4, steps=1, batch=ALL)
        ex.unlearn(model, part, task=ex.Regression(call=call), method=stage, seed=5)
        return told[-1]

    xf, yf = whole(request.data("forget"))
    xr, yr = whole(request.data("retain"))
    other = ex.split((torch.cat([xf, xr]), torch.cat([yf + 100, yr])), forget=[0, 1, 2, 3])
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1.5)
    assert torch.equal(run(net, request), run(net, other))
    assert torch.equal(run(net, request), run(moved, request))


def test_a_layer_without_positions_has_no_map_and_a_pattern_must_match() -> None:
    _, _, request = images()
    flat = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    results = [
        norms(ex.unlearn(flat, request, task=TASK, method=methods.blindspot(attention=a, layers=n, steps=2)).model)
        for a, n in ((0.0, None), (50.0, None), (50.0, "1"))
    ]
    assert results[0] == results[1] == results[2]
    with pytest.raises(Refused, match="matches no module"):
        ex.unlearn(flat, request, task=TASK, method=methods.blindspot(layers="conv*", steps=1))
    wide = deviation.attention_map(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64))
    assert wide.tolist()[0] == pytest.approx([5 / 125**0.5, 10 / 125**0.5])


def test_maps_of_a_layer_that_is_written_over_are_of_what_it_gave() -> None:
    net, _, request = images()
    over = copy.deepcopy(net)
    over[1], over[3] = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
    stage = methods.blindspot(steps=2, proxy_steps=1)
    first, second = (ex.unlearn(m, request, task=TASK, method=stage, seed=2).model for m in (net, over))
    assert furthest(first, second) < 1e-12


@both
def test_fine_tuning_steps(distance: str) -> None:
    net, _, request = images()
    x, y = whole(request.data("retain"))
    expected = copy.deepcopy(net)
    optimizer = torch.optim.Adam(expected.parameters(), 1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        LOSS[distance](expected(x), y).backward()
        optimizer.step()
    stage = methods.fine_tune_regression(distance=distance, steps=5, batch=ALL)
    assert furthest(ex.unlearn(net, request, task=TASK, method=stage).model, expected) < 1e-12


SEEN: list[Tensor] = []


class Looking(ex.Regression):
    """Keeps the targets that the model is trained on, in the order of ids."""

    def outputs(self, model: nn.Module, batch: ex.core.Batch) -> Tensor:
        if torch.is_grad_enabled():
            SEEN.append(batch["y"][batch["id"].argsort()].clone())
        return super().outputs(model, batch)


@both
def test_gaussian_amnesiac_steps(distance: str) -> None:
    """The targets of the forget data are other ones, the same at every step; then plain steps on all data together."""
    net, _, request = images()
    (xf, yf), (xr, yr) = whole(request.data("forget")), whole(request.data("retain"))
    SEEN.clear()
    stage = methods.gaussian_amnesiac(distance=distance, steps=4, batch=ALL)
    done = ex.unlearn(net, request, task=Looking(), method=stage, seed=3)
    shown = [y for y in SEEN if len(y) == 10]
    assert len(shown) == 4
    assert all(torch.equal(y, shown[0]) for y in shown)
    assert torch.equal(shown[0][4:], yr)
    assert bool((shown[0][:4] != yf).all())
    expected = copy.deepcopy(net)
    optimizer = torch.optim.Adam(expected.parameters(), 1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        LOSS[distance](expected(torch.cat([xf, xr])), shown[0]).backward()
        optimizer.step()
    assert furthest(done.model, expected) < 1e-12
    assert done.case is not None
    assert "redrawn" not in done.case.request.extra


def test_drawn_targets_have_the_mean_and_deviation_of_all_targets() -> None:
    """Each target column with its own; n - 1 in the deviation, as a data frame's std has it."""
    x = torch.zeros(6, 1)
    y = torch.tensor([[1.0, 40.0], [2.0, 10.0], [6.0, 20.0], [3.0, 30.0], [7.0, 90.0], [5.0, 50.0]])
    request = ex.split((x, y), forget=[0, 1])
    mean, std = torch.tensor([4.0, 40.0]), torch.tensor([5.6, 800.0]).sqrt()
    drawn = torch.stack(
        [_drawn(TASK, request.data("forget"), request.data("retain"), Key(seed)) for seed in range(4000)]
    )
    z = ((drawn - mean) / std).double()
    assert drawn.shape == (4000, 2, 2)
    assert drawn.dtype == torch.float32
    assert float((z.mean((0, 1)) * 8000**0.5).abs().max()) < 4, "four standard errors"
    assert float(((z.square().mean((0, 1)) - 1) * 4000**0.5).abs().max()) < 4
    correlation = float((z[..., 0] * z[..., 1]).mean())
    assert abs(correlation) * 8000**0.5 < 4
    whole_numbers = ex.split((x, y[:, 0].long()), forget=[0, 1])
    assert _drawn(TASK, whole_numbers.data("forget"), whole_numbers.data("retain"), Key(0)).dtype == torch.float32


@pytest.mark.parametrize(("name", "nearer"), [("blindspot", 0.75), ("gaussian_amnesiac", 0.95)])
def test_predictions_of_forgotten_examples_come_nearer_to_a_retrained_models(name: str, nearer: float) -> None:
    """The group of highest body mass in the diabetes data; fine-tuning alone hardly moves."""
    found, goal = tiny("regression"), retrained("regression")
    done = ex.unlearn(found.model, found.request, task=found.task, method=name)

    def said(model: nn.Module, data: ex.Data) -> Tensor:
        with torch.no_grad():
            return model(whole(data)[0])

    forget, retain = found.request.data("forget"), found.request.data("retain")
    before, after = (float((said(m, forget) - said(goal, forget)).abs().mean()) for m in (found.model, done.model))
    assert after < nearer * before
    error = [float((said(m, retain) - whole(retain)[1]).abs().mean()) for m in (found.model, done.model)]
    assert error[1] < error[0] + 0.05
