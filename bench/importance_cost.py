"""What importance per example costs: ours beside the cheapest ways known, in one process, on one trained network's shape.

    EXPUNGE_DATA=... python bench/importance_cost.py

Importance is the sum over examples of the squared gradient of each (``curvature.squares``, which SSD rests on). Four ways to
the same numbers, checked to agree, and two that mark the range:

- ours: ``curvature.squares`` as SSD calls it, with preparation, scope, weights and meter.
- vmap: ``torch.func.vmap`` of ``torch.func.grad`` and nothing else.
- second_moments: one batched backward pass, of which each layer's inputs and output gradients give the squares (BackPACK's
  way): (g^2)^T a^2 of a linear layer, and of a convolution the squared products per example of g with its patches.
- one_by_one: a backward pass for each example, as the authors' code does with batches of one.
- batch: one backward pass per batch and the square of its mean gradient: the authors' published way, another quantity.

Rounds take turns; the numbers are medians of processor microseconds per example. Writes ``results/importance_cost.json``.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.core import Case, Data, Key, Request
from expunge.curvature import squares
from expunge.data import builtin
from expunge.data.sources import collect
from expunge.journal import write_bytes
from expunge.objectives import NLL
from expunge.scope import Scope
from expunge.version import revision

OUT = Path(__file__).parent / "results" / "importance_cost.json"
EXAMPLES, CHUNK, ROUNDS = 512, 64, 7
Named = dict[str, Tensor]


def ours(model: nn.Module, data: Data, suite: builtin.Suite) -> Named:
    """As SSD calls it."""
    case = Case(model, Request(forget=data), suite.task, Scope.all(model), rng=Key(0))
    return squares(case, data, NLL(), CHUNK, Key(0))[0]


def vmap(model: nn.Module, x: Tensor, y: Tensor) -> Named:
    """Per-example gradients, batched by torch."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: Named, one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, values, (one[None],)), label[None])

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        for name, grad in grads(weights, part, labels).items():
            total[name] += grad.square().sum(0)
    return total


def second_moments(model: nn.Module, x: Tensor, y: Tensor) -> Named:
    """From one batched backward pass; linear layers and plain convolutions, each used once."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _m, inputs, output: seen.__setitem__(name, (inputs[0].detach(), output))

    hooks = [m.register_forward_hook(keep(name)) for name, m in layers.items()]
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        loss = F.cross_entropy(model(part), labels, reduction="sum")
        grads = torch.autograd.grad(loss, [output for _, output in seen.values()])
        for (name, (inputs, _)), grad in zip(list(seen.items()), grads, strict=True):
            weight, bias = _moments(layers[name], inputs, grad)
            total[f"{name}.weight"] += weight
            total[f"{name}.bias"] += bias
    for hook in hooks:
        hook.remove()
    return total


def _moments(layer: nn.Linear | nn.Conv2d, inputs: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(layer, nn.Linear):
        return grad.square().T @ inputs.square(), grad.square().sum(0)
    patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    flat = grad.flatten(2)
    each = torch.bmm(flat, patches.transpose(1, 2))
    return each.square_().sum(0).view_as(layer.weight), flat.sum(2).square_().sum(0)


def in_batches(model: nn.Module, x: Tensor, y: Tensor, size: int) -> Named:
    """Squares of the gradients of batch means, summed."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for part, labels in zip(x.split(size), y.split(size), strict=True):
        model.zero_grad()
        F.cross_entropy(model(part), labels).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.square()  # type: ignore[union-attr]
    return total


def main() -> None:
    """Time each way and write the medians."""
    torch.set_num_threads(1)
    suite = builtin.suite("fashion_mnist")
    torch.manual_seed(0)
    model = suite.make().eval()
    data = suite.train.select(torch.arange(EXAMPLES))
    batch = collect(data)
    x, y = batch["x"], batch["y"]
    ways: dict[str, Callable[[], Named]] = {
        "ours": lambda: ours(model, data, suite),
        "vmap": lambda: vmap(model, x, y),
        "second_moments": lambda: second_moments(model, x, y),
        "one_by_one": lambda: in_batches(model, x, y, 1),
        "batch": lambda: in_batches(model, x, y, CHUNK),
    }
    found = {name: way() for name, way in ways.items()}  # also the warm-up
    for name in ("vmap", "second_moments", "one_by_one"):
        for parameter, value in found["ours"].items():
            torch.testing.assert_close(found[name][parameter], value, rtol=1e-3, atol=1e-6 * float(value.max()))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.process_time()
            way()
            taken[name].append(time.process_time() - start)
    result = {
        "microseconds_per_example": {n: 1e6 * statistics.median(t) / EXAMPLES for n, t in taken.items()},
        "rounds": {n: [1e6 * t / EXAMPLES for t in times] for n, times in taken.items()},
        "examples": EXAMPLES,
        "chunk": CHUNK,
        "parameters": sum(p.numel() for p in model.parameters()),
        "suite": suite.name,
        "revision": revision(),
        "machine": {"torch": torch.__version__, "python": platform.python_version(), "threads": 1},
    }
    write_bytes(OUT, (json.dumps(result, indent=1) + "\n").encode())
    for name, value in result["microseconds_per_example"].items():  # type: ignore[attr-defined]
        print(f"{name:16s} {value:8.0f} us per example")


if __name__ == "__main__":
    main()
