"""Small models in float64 and the plain torch that the golden tests of methods compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from tests.golden.forgetting import fitted, small

ALL = 10_000
"""A batch size that takes every source whole, so that a step does not depend on the order of examples."""


def two_classes() -> tuple[nn.Module, ex.Request]:
    """As ``small``, with two classes: the wrong label of an example is then no matter of chance."""
    _, request = small()
    x, y = (torch.cat([whole(data)[i] for data in (request.forget, request.retain)]) for i in (0, 1))
    y = (y > 0).long()
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    net = fitted(net, x.float(), y, 100, 3e-2, torch.Generator().manual_seed(1)).double()
    return net, ex.split((x, y), forget=list(range(20)))


def thirty() -> tuple[nn.Module, ex.Request]:
    """An untrained network and thirty examples of two classes, so that the wrong label of an example is no matter of chance."""
    generator = torch.Generator().manual_seed(31)
    x, y = torch.randn(30, 4, generator=generator, dtype=torch.float64), torch.arange(30) % 2
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net, ex.split((x, y), forget=list(range(10)))


def normalised() -> tuple[nn.Module, ex.Request]:
    """A network with BatchNorm, its running statistics those of the data, over the examples of ``small``."""
    _, request = small()
    x, y = whole(request.retain)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    model = fitted(model, x.float(), y, 50, 1e-2, torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        model.train()(x)
    return model.eval(), request


def whole(data: ex.Data) -> tuple[Tensor, Tensor]:
    """All inputs and all labels."""
    batch = data.batch(torch.arange(len(data)))
    return batch["x"], batch["y"]


def descended(model: nn.Module, losses: Iterable[Callable[[nn.Module], Tensor]], lr: float) -> nn.Module:
    """A copy of the model after one step of torch's Adam on each of the losses."""
    net = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for loss in losses:
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()
    return net


def kl(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(target || model), summed over classes, mean over examples, times the temperature squared: torch's own."""
    p = F.softmax(target / temperature, 1)
    return F.kl_div(F.log_softmax(logits / temperature, 1), p, reduction="batchmean") * temperature**2


def furthest(a: nn.Module, b: nn.Module) -> float:
    """The largest difference between any two weights."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """name -> gradient."""
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
