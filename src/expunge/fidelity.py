"""What each input channel contributes to a layer's output, and how well some of them make up the whole (arXiv:2511.19566).

The output of a linear or convolutional layer, less its bias, is a sum of contributions, Y = sum_c A_c: A_c is what the
layer makes of input channel c alone. All that is asked of them here is in the matrix of their inner products, G_cd =
E<A_c, A_d>, which one forward pass gives for every layer at once. No gradient, no loss, no label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.core import Case, Data, Key, Refused, RunFailed, only_looked_at
from expunge.oracle import prepared

Layer = nn.Linear | nn.Conv2d
LEAST = 1e-10  # singular values below this share of the largest are taken for rounding


@dataclass
class Contributions:
    """The inner products of one weight's input channels, in the order in which layers are called.

    Attributes:
        layer: that owns the weight, or one of several that share it.
        gram: [C, C] float64, sum over examples and places of <A_c, A_d>.
        end: whether it is the first or the last layer that the model calls, in scope or not.
    """

    layer: Layer = field(repr=False)
    gram: Tensor
    end: bool = False

    @property
    def alone(self) -> Tensor:
        """[C] fidelity of each channel on its own: <A_c, Y>^2 / (|A_c|^2 |Y|^2); 0 where A_c or Y is 0."""
        below = self.gram.diagonal() * self.gram.sum()
        found = self.gram.sum(1).square() / torch.where(below > 0, below, torch.ones_like(below))
        return torch.where(below > 0, found, torch.zeros_like(found))

    def compensation(self, chosen: Tensor) -> Tensor:
        """[k] delta, the least-squares weights of the chosen channels: min E|Y - sum_c delta_c A_c|^2.

        Where several do equally well, the shortest. All channels: 1 each, to rounding, unless some are redundant.

        Args:
            chosen: int64 [k].
        """
        part, target = self.gram[chosen][:, chosen].cpu(), self.gram.sum(1)[chosen].cpu()
        found = torch.linalg.lstsq(part, target[:, None], rcond=LEAST, driver="gelsd").solution
        return found[:, 0].to(self.gram.device)

    def fidelity(self, chosen: Tensor) -> float:
        """1 - min_delta E|Y - sum_{c chosen} delta_c A_c|^2 / E|Y|^2, in [0, 1]; 0 where Y is 0 or nothing is chosen."""
        whole = float(self.gram.sum())
        if whole <= 0 or len(chosen) == 0:
            return 0.0
        part = float(self.gram.sum(1)[chosen] @ self.compensation(chosen))
        return min(1.0, max(0.0, part / whole))

    def smallest(self, order: Tensor, target: float) -> Tensor:
        """The shortest beginning of `order` whose fidelity is at least `target`; all of it where none reaches that.

        A longer beginning is never worse, so it is found by halving.

        Args:
            order: int64 [m] channels, best first. target: in [0, 1].
        """
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if self.fidelity(order[:middle]) >= target - LEAST:
                high = middle
            else:
                low = middle + 1
        return order[:low]

    def times(self, weight: Tensor, factors: Tensor) -> Tensor:
        """The weight with all that reads channel c times factors[c]; where that is 1, to the bit.

        Args:
            weight: [out, C / groups, ...]. factors: [C].
        """
        groups = getattr(self.layer, "groups", 1)
        blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], *weight.shape[2:])
        shape = (groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
        return (blocks * factors.to(weight).reshape(shape)).reshape(weight.shape)


def contributions(case: Case, data: Data, chunk: int = 64, key: Key = Key(0)) -> dict[str, Contributions]:
    """parameter name -> inner products of what its input channels contribute, on `data`, each example counting once.

    Of every linear and two-dimensional convolutional layer that the model calls, whose weight is in scope and belongs to
    such layers only, in the order of their first calls. A weight that is called several times, or shared, has the sum
    over its calls. Eval mode, metered. Memory: (channels x kernel places)^2 numbers for a layer.

    Args:
        data: the examples. chunk: examples per pass; equal for any, to rounding. key: of what the task draws.

    Raises:
        RunFailed: where what a layer is given is not finite.
    """
    names, found, called = _names(case), dict[str, Contributions](), dict[int, str]()

    def keep(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, Layer)  # hooks are put on these alone
        name = called.setdefault(id(layer.weight), names.get(id(layer.weight), ""))
        if not name:
            return
        gram = _gram(layer, args[0].detach())
        if name in found:
            found[name].gram += gram
        else:
            found[name] = Contributions(layer, gram)

    hooks = [m.register_forward_pre_hook(keep) for m in case.model.modules() if isinstance(m, Layer)]
    try:
        with torch.no_grad(), only_looked_at(case.model), case.meter.watch(case.model):
            for batch in prepared(case, data, chunk, key):
                case.task.outputs(case.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    order = list(called.values())
    for name in {*order[:1], *order[-1:]} & found.keys():
        found[name].end = True
    for name, one in found.items():
        if not bool(torch.isfinite(one.gram).all()):
            raise RunFailed(f"the inputs of {name!r} are not finite, or too large to be squared: scale the data down")
    return found


def between(found: Mapping[str, Contributions], ends: bool) -> dict[str, Contributions]:
    """Those layers that may be edited: all with `ends`, else neither the first nor the last that is called.

    Raises:
        Refused: where none is left.
    """
    names = [name for name, one in found.items() if ends or not one.end]
    if not names:
        raise Refused(
            f"{len(found)} linear or convolutional layers with a weight in scope are called, and none is left to edit: "
            + (
                "widen the scope"
                if ends
                else "expected three or more, or ends=True, which edits the first and last too"
            )
        )
    return {name: found[name] for name in names}


def _names(case: Case) -> dict[int, str]:
    """id of a weight in scope -> its name; not of one that some module of another kind owns too."""
    names = {id(p): name for name, p in case.scope.parameters(case.model).items()}
    for module in case.model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not (isinstance(module, Layer) and leaf == "weight"):
                names.pop(id(parameter), None)
    return names


def _gram(layer: Layer, given: Tensor) -> Tensor:
    """[C, C] inner products of contributions, summed over examples and places, in float64."""
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Linear):
        rows = given.reshape(-1, given.shape[-1]).double()
        return (weight.T @ weight) * (rows.T @ rows)
    groups, inner = layer.groups, weight.shape[1] * weight[0, 0].numel()
    patches = F.unfold(_padded(layer, given).double(), layer.kernel_size, layer.dilation, 0, layer.stride)
    rows = patches.reshape(len(patches), groups, inner, -1).permute(1, 2, 0, 3).flatten(2)
    filters = weight.reshape(groups, -1, inner)
    both = (filters.transpose(1, 2) @ filters) * (rows @ rows.transpose(1, 2))
    channels = weight.shape[1]
    summed = both.reshape(groups, channels, inner // channels, channels, inner // channels).sum((2, 4))
    return torch.block_diag(*summed)


def _padded(layer: nn.Conv2d, given: Tensor) -> Tensor:
    """What the kernel runs over: a batch of images with the layer's own padding."""
    images = given if given.ndim == 4 else given[None]
    sides: list[int] = []
    for axis in (1, 0):  # F.pad begins at the last
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0, 0] if isinstance(layer.padding, str) else [int(layer.padding[axis])] * 2
    return F.pad(images, sides, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def sample(data: Data, most: int, key: Key) -> Data:
    """At most so many of the examples, drawn without replacement."""
    if len(data) <= most:
        return data
    order = torch.randperm(len(data), generator=key.generator())
    return data.select(order[:most].sort().values)


def ranked(scores: Tensor, least: float = 0.0) -> Tensor:
    """int64 [m]: the channels that score above `least`, highest first; ties in their order."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[scores[order] > least]


def factors(size: int, chosen: Tensor, values: Tensor | float, other: float = 1.0) -> Tensor:
    """[size] float64: `values` at the chosen places, `other` elsewhere."""
    found = torch.full((size,), other, dtype=torch.float64, device=chosen.device)
    found[chosen] = torch.as_tensor(values, dtype=torch.float64, device=chosen.device)
    return found


def weights_of(case: Case, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of these weights."""
    parameters = dict(case.model.named_parameters())
    return {name: parameters[name].detach().clone() for name in names}
