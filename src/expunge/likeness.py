"""What a classifier's representations are like: those that small autoencoders know, and those of the original model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.boundary import logits_layer
from expunge.core import Batch, Case, Data, Key, Refused, Request, fork, lent_stream
from expunge.data.sources import as_data
from expunge.descend import Descend
from expunge.objectives import NLL
from expunge.optim import Adam
from expunge.oracle import On, prepared
from expunge.scope import Scope

KL = 0.025  # of the divergence beside the reconstruction error, as released


class Autoencoder(nn.Module):
    """A variational autoencoder of vectors: width, 128, 32, latent and back, the output through a sigmoid.

    Args:
        width: of a vector. latent: of what it is coded in.
    """

    def __init__(self, width: int, latent: int):
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
        self.mean, self.spread = nn.Linear(32, latent), nn.Linear(32, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, 32), nn.ReLU(), nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, width), nn.Sigmoid()
        )

    def forward(self, vectors: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction [b, width], mean and standard deviation of the code [b, latent]); the code is mean + noise sd."""
        hidden = self.encoder(vectors)
        mean, sd = self.mean(hidden), torch.exp(0.5 * self.spread(hidden))
        return self.decoder(mean + sd * noise), mean, sd


def head_name(case: Case) -> str:
    """The linear layer whose input is the representation: the one that gives the logits.

    By the name that it has without an adapter, which both the model in an adapter and a teacher without one know.
    """
    head = logits_layer(case)
    found = next(name for name, module in case.model.named_modules() if module is head)
    return found.removesuffix(".base_layer")


def representations(
    case: Case, model: nn.Module, batch: Batch, head: str, hear: Callable[[Tensor], None] | None = None
) -> Tensor:
    """[b, d] input of the module called `head`, in float32 at least; `hear` is told the outputs of the same pass."""
    seen: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        outputs = case.task.outputs(model, batch)
    finally:
        hook.remove()
    if hear is not None:
        hear(outputs)
    found = seen[-1].flatten(1)
    return found if found.dtype == torch.float64 else found.float()


def _with_noise(batch: Batch, latent: int, rng: Key) -> Batch:
    drawn = torch.randn(len(batch["id"]), latent, generator=rng.generator(), dtype=torch.float64)
    return {**batch, "noise": drawn}


@dataclass(frozen=True)
class Evidence:
    """Loss of an ``Autoencoder`` that is the Case's model, on column ``x``: squared error plus 0.025 KL, both summed."""

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with the noise of its codes."""
        model: Any = case.model
        return _with_noise(batch, model.latent, rng)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        vectors = batch["x"]
        made, mean, sd = case.model(vectors, batch["noise"].to(vectors.dtype))
        divergence = -0.5 * (torch.log(sd.square() + 1e-8) + 1 - mean.square() - sd.square()).sum(1)
        return (made - vectors).square().sum(1) + KL * divergence


def fitted(case: Case, data: Data, head: str, latent: int, epochs: int, batch: int, key: Key) -> Autoencoder:
    """An autoencoder of the representations of `data` under the model as it stands, frozen. No label is read.

    Args:
        head: see ``head_name``. latent: of the code. epochs: of Adam at 1e-3. batch: vectors per step.
        key: of its first weights, of the order of the data and of the noise.
    """
    parts = []
    with torch.no_grad(), case.meter.watch(case.model):
        for part in prepared(case, data, 256, key):
            parts.append(representations(case, case.model, part, head))
    vectors = torch.cat(parts)
    with lent_stream(key.at("weights")):
        model = Autoencoder(vectors.shape[1], latent)
    model = model.to(vectors)
    inner = fork(case, model=model, request=Request(retain=as_data({"x": vectors.cpu()})), scope=Scope.all(model))
    Descend(others={"vectors": On("retain", Evidence())}, optimizer=Adam(1e-3), epochs=epochs, batch=batch)(inner)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Strange:
    """exp(s / (s + 1)), s the squared error of an autoencoder on an example's representation; minus it where `away`.

    Bounded, in [1, e). Its gradient fades as s grows, so an example that is strange already is left alone.

    Args:
        autoencoder: frozen. head: see ``head_name``. away: whether to make the examples stranger.
    """

    autoencoder: Autoencoder = field(repr=False)
    head: str
    away: bool = False

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with the noise of its codes."""
        return _with_noise(batch, self.autoencoder.latent, rng)

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        vectors = representations(case, case.model, batch, self.head)
        made, _, _ = self.autoencoder(vectors, batch["noise"].to(vectors.dtype))
        error = (made - vectors).square().sum(1)
        value = torch.exp(error / (error + 1))
        return -value if self.away else value


@dataclass(frozen=True)
class Turned:
    """c, or exp(c / temperature): c = 1 - cosine of an example's representation with that of the original model.

    Args:
        head: see ``head_name``. temperature: > 0, or None for c itself.
    """

    head: str
    temperature: float | None = None
    teacher: Literal["original"] = "original"

    @property
    def column(self) -> str:
        """Of the data, where the original's representations were kept (``told.told``)."""
        return f"was/{self.teacher}"

    def told(self, case: Case, batch: Batch) -> Tensor:
        """[b, d] the original's representations."""
        with case.teacher(self.teacher) as model:
            return representations(case, model, batch, self.head)

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with the original's representations, asked for now or kept from before."""
        kept = batch.get(self.column)
        return {**batch, "was": self.told(case, batch) if kept is None else kept}

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        now = representations(case, case.model, batch, self.head)
        turned = 1.0 - F.cosine_similarity(now, batch["was"], dim=1)
        return turned if self.temperature is None else torch.exp(turned / self.temperature)


def alignment(losses: dict[str, Tensor]) -> Tensor:
    """mean over retain of c - log of the mean over forget of exp(c / T): the released loss per retain example, to a constant."""
    return losses["aligned"] - losses["apart"].log()


@dataclass(frozen=True)
class Repair:
    """Fine-tune the last linear layer alone on a few labelled retain examples (LAF+R): the rest does not move.

    Args:
        steps: of Adam, >= 0; 0 does nothing. lr: its learning rate. batch: examples per step.
        labelled: share of the retain examples that are read, drawn once, rounded up, in (0, 1].
    """

    steps: int
    lr: float
    labelled: float
    batch: int

    def on(self, case: Case, head: str) -> Case:
        """The Case with the layer called `head` fine-tuned."""
        if self.steps == 0:
            return case
        names = [name for name in case.scope.masks if name.startswith(f"{head}.")]  # its own, or its adapter's
        if not names:
            raise Refused(f"the repair trains the last layer, {head!r}, and the scope leaves it out: set repair to 0")
        key, _ = case.rng.take()
        data = case.request.data("retain")
        count = math.ceil(self.labelled * len(data))
        few = data.select(torch.randperm(len(data), generator=key.at("labelled").generator())[:count].sort().values)
        scope = case.scope & Scope(dict.fromkeys(names, True), case.scope.universe)
        inner = replace(case, request=replace(case.request, retain=few), scope=scope)
        done = Descend(retain=NLL(), optimizer=Adam(self.lr), steps=self.steps, batch=self.batch)(inner)
        return replace(done, request=case.request, scope=case.scope)
