"""LAF (Shen et al., ICLR 2024): forget without labels, by what representations look like."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from expunge.combine import OfMeans
from expunge.compose import Alternate, Turn
from expunge.core import Case, Stage, eval_mode
from expunge.descend import Descend
from expunge.likeness import Repair, Strange, Turned, alignment, fitted, head_name
from expunge.optim import Adam
from expunge.oracle import On
from expunge.registry import AtLeastOne, Count, Positive, Range, method
from expunge.told import told
from expunge.turns import InTurns

_PAIR = "(min(batch, n_forget) + min(batch, n_retain))"
_ASKED = " + ".join(f"min(steps * min(batch, {n}), {n})" for n in ("n_forget", "n_retain"))
_FIT = (
    "(steps > 0) * epochs * ("
    + " + ".join(f"ceil({n} / min(batch, {n})) * min(batch, {n})" for n in ("n_forget", "n_retain"))
    + ")"
)
_REPAIR = "(steps > 0) * repair * min(batch, ceil(labelled * n_retain))"


@method(
    labels=False,
    status="reproduced",
    paper="Shen et al., Label-Agnostic Forgetting, ICLR 2024",
    tasks=("classification",),
    needs={"forget", "retain", "teacher:original"},
    dose="steps",
    cost={
        "forward": f"(steps > 0) * (n_forget + n_retain) + {_FIT} + 2 * steps * {_PAIR} + {_ASKED} + {_REPAIR}",
        "backward": f"{_FIT} + 2 * steps * {_PAIR} + {_REPAIR}",
    },
    departures={
        "retain": "the autoencoder of what is kept knows the retain data; the released notebook fits it to all data",
        "means": "losses are means over a batch, where the released code sums: the same for Adam, up to its epsilon",
        "lr": "larger by default than published, for fewer steps",
        "repair": "steps, on examples drawn once; the released code passes over the retain batches beside the forget ones",
    },
)
def laf(
    *,
    lr: Positive = 1e-3,
    align_lr: Positive = 1e-3,
    temperature: Positive = 20.0,
    latent: AtLeastOne = 8,
    epochs: AtLeastOne = 100,
    steps: Count = 75,
    batch: AtLeastOne = 32,
    norm_stats: Literal["frozen", "live"] = "frozen",
    repair: Count = 0,
    repair_lr: Positive = 1e-3,
    labelled: Annotated[float, Range(0, 1, open_low=True)] = 0.1,
) -> Stage:
    """Move the forget data's representations away from what they look like, and the retain data's not; no label is read.

    Two small variational autoencoders are fitted to the representations (the input of the last linear layer), one to
    the forget and one to the retain data. Then, in turns on the same batches: a step that makes forget data strange to
    the first and keeps retain data familiar to the second, and a step that keeps the retain data's representations in
    the direction that the original model gives them, and not the forget data's. Labels are neither read nor needed,
    so nothing watches the retain loss. It does not promise that what is forgotten is the answer. With `repair` (LAF+R)
    the last linear layer alone is then fine-tuned on a few retain examples, whose labels are read.

    Formula, c = 1 - cos(e, e_o), s = |VAE(e) - e|^2: mean over B_r of exp(s_r / (s_r + 1)) - mean over B_f of
    exp(s_f / (s_f + 1)); then mean over B_r of c - log sum over B_f of exp(c / temperature).

    Args:
        lr: learning rate of Adam for the first kind of step, > 0.
        align_lr: of the Adam of the second kind, which has its own moments, > 0.
        temperature: T, > 0.
        latent: dimensions of the autoencoders' codes, >= 1.
        epochs: passes over the representations that each autoencoder is fitted in, by Adam at 1e-3, >= 1.
        steps: pairs of steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.
        norm_stats: "frozen" (eval mode) or "live" (train mode) normalisation and dropout.
        repair: steps of repair, >= 0; 0 reads no label.
        repair_lr: learning rate of Adam in the repair, > 0.
        labelled: share of the retain examples, drawn once, that the repair reads, rounded up, in (0, 1].

    Raises:
        Refused: where the model's last layer is not linear, or the repair finds it out of scope.

    Published settings: convolutional network on MNIST, latent 8, 10 epochs of fitting, 20 epochs, lr 5e-5, align_lr 1e-4,
    temperature 5 (random examples) or 20 (a class); ResNet-18 on CIFAR-10, latent 16, 40 epochs, 1e-5, 4e-5, 20.
    """
    mend = Repair(repair, float(repair_lr), float(labelled), batch)
    return _Forget(float(lr), float(align_lr), float(temperature), latent, epochs, steps, batch, norm_stats, mend)


@dataclass(frozen=True)
class _Forget:
    lr: float
    align_lr: float
    temperature: float
    latent: int
    epochs: int
    steps: int
    batch: int
    norm_stats: Literal["frozen", "live"]
    repair: Repair

    def __call__(self, case: Case) -> Case:
        key, rng = case.rng.take()
        if self.steps == 0:
            return replace(case, rng=rng)
        with case.meter.checking():
            head = head_name(case)
        with eval_mode(case.model):
            known = {
                name: fitted(case, case.request.data(name), head, self.latent, self.epochs, self.batch, key.at(name))
                for name in ("forget", "retain")
            }
        turns = (Turn(("forget", "retain")), Turn(("aligned", "apart"), combine=OfMeans(alignment)))
        descend = Descend(
            forget=Strange(known["forget"], head, away=True),
            retain=Strange(known["retain"], head),
            others={
                "aligned": On("retain", Turned(head)),
                "apart": On("forget", Turned(head, self.temperature)),
            },
            combine=Alternate(turns),
            optimizer=InTurns((Adam(self.lr), Adam(self.align_lr))),
            steps=2 * self.steps,
            batch=self.batch,
            norm_stats=self.norm_stats,
        )
        turned, read = Turned(head), {"forget": self.steps, "retain": self.steps}
        asked = {n: (turned, k * min(self.batch, len(case.request.data(n)))) for n, k in read.items()}
        done = descend(told(replace(case, rng=rng), asked))
        return self.repair.on(replace(done, request=case.request), head)
