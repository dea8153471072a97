"""CF-k and EU-k against plain torch; which layers are the last ones."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.core import Case, Refused
from expunge.layers import last_layers
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
