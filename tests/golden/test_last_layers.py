"""CF-k and EU-k against plain torch; which layers are the last ones."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.core import Case, Refused
from expunge.data.networks import ResNet
from expunge.data.sources import MapStyle, as_data
from expunge.layers import last_layers, retain_nll
from expunge.objectives import NLL
from expunge.optim import Restarts
from expunge.registry import methods as registered
from expunge.scope import Scope
from tests.fixtures import odd, tiny
from tests.golden.by_hand import ALL, furthest, whole
from tests.golden.forgetting import accuracy, digits, small

torch.set_num_threads(1)
TASK = ex.Classification(3)


def deep() -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net


@pytest.mark.parametrize(("k", "first"), [(1, 4), (2, 2), (3, 0)])
def test_cf_k_is_sgd_on_the_last_layers(k: int, first: int) -> None:
    model, request = deep(), small()[1]
    x, y = whole(request.data("retain"))
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected[first:].parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(expected(x), y).backward()
        optimizer.step()
    done = ex.unlearn(model, request, task=TASK, method=methods.cf_k(k=k, lr=0.05, steps=5, batch=ALL))
    assert furthest(done.model, expected) < 1e-12
    assert furthest(done.model[:first], model[:first]) == 0.0 if first else True
    assert done.case is not None
    assert len(done.case.scope.masks) == 6, "the scope is not given back"


@pytest.mark.parametrize(("k", "first"), [(1, 4), (2, 2)])
def test_eu_k_is_adam_from_fresh_last_layers(k: int, first: int) -> None:
    model, request = deep(), small()[1]
    x, y = whole(request.data("retain"))
    expected = ex.unlearn(model, request, task=TASK, method=methods.eu_k(k=k, epochs=0)).model
    assert furthest(expected[:first], model[:first]) == 0.0
    for old, new in zip(model[first:].parameters(), expected[first:].parameters(), strict=True):
        assert not torch.isclose(old, new).any()
        assert float(new.detach().abs().max()) <= 6**-0.5, "torch draws linear layers within 1 / sqrt(inputs)"
    optimizer = torch.optim.Adam(expected[first:].parameters(), 0.01)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(expected(x), y).backward()
        optimizer.step()
    done = ex.unlearn(model, request, task=TASK, method=methods.eu_k(k=k, lr=0.01, epochs=6, batch=ALL))
    assert furthest(done.model, expected) < 1e-12


def test_what_eu_k_trains_does_not_depend_on_what_the_last_layers_were() -> None:
    """Drawn anew, and once: at every epoch, as in one release, six epochs would end where one does."""
    model, request = deep(), small()[1]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[4].weight.zero_()
    one, two = (ex.unlearn(m, request, task=TASK, method=methods.eu_k(k=1, epochs=3)).model for m in (model, other))
    assert furthest(one, two) == 0.0
    x, y = whole(request.data("retain"))
    trained = [ex.unlearn(model, request, task=TASK, method=methods.eu_k(k=1, epochs=e)).model for e in (0, 1, 20)]
    losses = [float(F.cross_entropy(net(x), y).detach()) for net in trained]
    assert losses[0] > losses[1] > losses[2] + 0.1


AUTHORS = "shash42/Evaluating-Inexact-Unlearning @ a45fe023216f407e947b0c87c3ea2c8229f1d5e5"
PUBLISHED = {"k": 2, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-5, "cycles": 3, "lr_floor": 0.05, "batch": ALL}


def norms(model: nn.Module) -> list[float]:
    return [float(p.detach().norm()) for p in model.parameters()]


def test_cf_k_ends_where_the_authors_code_does() -> None:
    """Their cat_forget_finetune, seven epochs of one batch, cosine with restarts from 0.1 to 0.005; see AUTHORS."""
    model, request = deep(), small()[1]
    done = ex.unlearn(model, request, task=TASK, method=methods.cf_k(**PUBLISHED, steps=7))
    expected = [
        5.975071214158455,
        2.389515293718546,
        6.088729079713656,
        1.526674285679508,
        3.762680560824096,
        1.892038953116812,
    ]
    assert norms(done.model) == pytest.approx(expected, rel=1e-12)


def kaiming() -> nn.Module:
    """As the authors draw it: the last layer first, weights by Kaiming's normal law, zero biases; of seed 0."""
    model, generator = deep(), torch.Generator().manual_seed(0)
    for layer in (model[4], model[2]):
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    return model


def test_eu_k_ends_where_the_authors_code_does() -> None:
    """Their retrain_lastK after torch.manual_seed(0), the same schedule; see AUTHORS."""
    model, request = deep(), small()[1]
    done = ex.unlearn(
        model, request, task=TASK, method=methods.eu_k(**PUBLISHED, optimizer="sgd", epochs=7, make=kaiming)
    )
    expected = [
        5.975071214158455,
        2.389515293718546,
        3.494550150121430,
        0.218857644026143,
        2.325544230063753,
        0.181530090366751,
    ]
    assert norms(done.model) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cycles", [1, 2, 4])
def test_restarts_are_those_of_torch_once_per_epoch(cycles: int) -> None:
    epochs, per_epoch = 2**cycles - 1, 71
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=1, T_mult=2, eta_min=0.005)
    ours = Restarts(cycles, 0.05)
    for epoch in range(epochs):
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            assert 0.1 * ours.factor(step / (epochs * per_epoch)) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()
    assert ours.factor(1.0) == ours.factor(1.0 - 1e-6)


def test_the_last_layers_are_those_of_the_authors() -> None:
    """What their resetFinalResnet leaves to be trained of ResNet-20; normalisation goes with its convolution."""
    model = ResNet()
    data = as_data({"x": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), "y": torch.arange(2)})
    task, request = ex.Classification(10), ex.split(data, [0])
    found = {k: names(model, request, task, k) for k in (1, 2, 8, 20)}
    assert found[1] == {"linear.weight", "linear.bias"}
    assert found[2] == found[1] | {"layer3.2.conv2.weight", "layer3.2.bn2.weight", "layer3.2.bn2.bias"}
    assert {k: len(part) for k, part in found.items()} == {1: 2, 2: 5, 8: 23, 20: 59}


class Whole(nn.Module):
    """The same network in a module of the user's own, of which nothing is remembered."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("norm_stats", ["frozen", "live"])
@pytest.mark.parametrize("name", ["cf_k", "eu_k"])
def test_what_frozen_layers_say_is_computed_once(name: str, norm_stats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row passes the first layer at most twice (a batch with one unknown row runs whole); the result is the same."""
    request, rows, real = small()[1], [0], nn.Linear.forward

    def counted(layer: nn.Linear, x: Tensor) -> Tensor:
        rows[0] += len(x) if layer.in_features == 5 else 0
        return real(layer, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    length = {"steps": 40} if name == "cf_k" else {"epochs": 6.0}
    stage = registered()[name].build(k=2, lr=0.01, batch=12, norm_stats=norm_stats, **length)
    ends, read = [], []
    for make in (lambda: deep(), lambda: Whole(deep())):
        rows[0] = 0
        done = ex.unlearn(make(), request, task=TASK, method=stage, seed=3)
        ends.append(done)
        read.append(rows[0])
    assert furthest(ends[0].model, ends[1].model.net) < 1e-12
    costs = [{kind: end.record["cost"][kind] for kind in ("forward", "backward")} for end in ends]
    assert costs[0] == costs[1]
    looked = ends[0].record["cost"]["checks"]
    assert read[1] >= costs[1]["forward"] + looked
    assert read[0] <= 9 + looked + 2 * len(request.data("retain")), "beside it, only the call's own few checks"


def test_layers_that_draw_or_are_listened_to_are_not_remembered() -> None:
    request, data = small()[1], small()[1].data("retain")
    noisy = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    listened, whole_listened = deep(), deep()
    for module in (listened[0], whole_listened):
        module.register_forward_hook(lambda module, args, output: None)
    for model, mode, remembered in [
        (noisy, "live", False),
        (noisy, "frozen", True),
        (listened, "frozen", False),
        (whole_listened, "frozen", False),
        (Backwards().double(), "frozen", False),
        (deep(), "live", True),
    ]:
        case = Case(model, request, TASK, Scope.all(model))
        inside, objective = retain_nll(replace(case, scope=last_layers(case, 1)), mode)
        assert (objective != NLL()) == remembered
        assert (inside.request.data("retain") is not data) == remembered


def test_data_that_may_be_augmented_are_read_anew() -> None:
    request, data = small()[1], small()[1].data("retain")
    rows = [tuple(data.batch(torch.tensor([i]))[name][0] for name in ("x", "y")) for i in range(len(data))]
    read = ex.Data(MapStyle(rows, ("x", "y")), torch.arange(len(rows)), data.ids)
    model = deep()
    case = Case(model, replace(request, retain=read), TASK, Scope.all(model))
    inside, objective = retain_nll(replace(case, scope=last_layers(case, 1)), "frozen")
    assert objective == NLL()
    assert inside.request.data("retain") is read


class Backwards(nn.Module):
    """Defined in another order than called; one layer has normalisation, one is never called, one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.idle = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.twice = nn.Linear(8, 8)
        self.enter = nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(torch.tanh(self.enter(x)))
        hidden = self.norm(self.attention(hidden[:, None], hidden[:, None], hidden[:, None])[0][:, 0])
        return self.head(self.twice(hidden))


def names(model: nn.Module, request: ex.Request, task: ex.core.Task, k: int, scope: Scope | None = None) -> set[str]:
    return set(last_layers(Case(model, request, task, scope or Scope.all(model)), k).masks)


def test_layers_are_counted_in_the_order_of_the_calls() -> None:
    model, request = Backwards().double(), small()[1]
    head = {"head.weight", "head.bias"}
    assert names(model, request, TASK, 1) == head
    attention = {f"attention.{n}" for n, _ in model.attention.named_parameters()}
    assert names(model, request, TASK, 2) == head | {"norm.weight", "norm.bias"} | attention
    assert names(model, request, TASK, 3) == names(model, request, TASK, 2) | {"twice.weight", "twice.bias"}
    everything = {n for n, _ in model.named_parameters() if not n.startswith("idle")}
    assert names(model, request, TASK, 4) == everything
    with pytest.raises(Refused, match="and 4 with a weight of their own"):
        names(model, request, TASK, 5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_shared_weight_is_no_layer_of_its_own() -> None:
    """The odd model's last layers: a head, two linear maps of one weight, a layer called twice, two inputs."""
    found = odd()
    assert names(found.model, found.request, found.task, 1) == {"head.weight"}, "its bias is frozen"
    second = names(found.model, found.request, found.task, 2) - {"head.weight"}
    assert second == {next(n for n, p in found.model.named_parameters() if p is found.model.mix.weight)}
    lm = tiny("causal_lm")
    assert names(lm.model, lm.request, lm.task, 1) == {"lm_head.weight"}
    lm.model.lm_head.weight = lm.model.model.embed_tokens.weight
    assert names(lm.model, lm.request, lm.task, 1) == {"model.layers.1.mlp.down_proj.weight", "model.norm.weight"}


def test_layers_are_counted_inside_the_scope() -> None:
    model, request = deep(), small()[1]
    inside = Scope.match(model, "2.weight", "0.*")
    assert names(model, request, TASK, 1, inside) == {"2.weight"}
    with pytest.raises(Refused, match="and 2 with a weight of their own"):
        names(model, request, TASK, 3, inside)


@pytest.mark.parametrize("name", ["cf_k", "eu_k"])
def test_a_class_is_forgotten_and_the_rest_stays(name: str) -> None:
    model, request = digits(8)
    done = ex.unlearn(model, request, task=ex.Classification(10), method=name)
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(done.model, request.forget) < 0.3
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.05
