"""Zeroth-order unlearning (DeepZero, Chen et al., ICLR 2024): any loss, any combiner, and no backward pass."""

from __future__ import annotations

from typing import Annotated

from expunge.combine import Weighted
from expunge.core import Combiner, Objective, Stage
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, RandomLabel
from expunge.optim import SGD
from expunge.registry import AtLeastOne, Count, NonNegative, Positive, Range, method
from expunge.zeroth import Coordinates

_BATCHES = "(min(batch, n_forget) + min(batch, n_retain))"


@method(
    paper="arXiv:2310.02025",
    tasks=("classification", "regression"),
    needs={"forget", "retain"},
    dose="steps",
    reason="published for training a network from scratch, not for forgetting; its estimates are held to autograd",
    cost={
        "forward": f"{_BATCHES} * (steps * (coordinates + 1) + (steps > 0) * (queries > 0) * 2 * (queries + 1))",
        "backward": "0",
    },
    departures={
        "use": "the paper trains from scratch, and reports no unlearning: objectives and numbers are chosen here",
        "coordinates": "a number of them, over all tensors in scope; the paper walks a tenth of the weights of "
        "convolutions and linear layers, and all of the rest",
        "directions": "of ZO-GraSP are Gaussian over the whole scope; the authors' are scaled to one length in each tensor "
        "and what they average keeps a factor mu",
        "redraw": "counted in steps; the authors count epochs",
        "schedule": "a constant learning rate; the authors' falls along a cosine after three epochs of warm-up",
        "norm_stats": "always frozen: a difference under live statistics or dropout would measure these",
        "parallel": "coordinates in one batched pass; several processes share the rows of a batch, not the coordinates",
        "stopping": "stopped when the loss on retain data leaves its bound",
        "zeros": "a tensor that is 0 throughout (an adapter's second factor) is walked by its size: ZO-GraSP would score it 0",
    },
)
def zeroth_order(
    *,
    forget: Objective = RandomLabel(),
    combine: Combiner = Weighted(),
    coordinates: AtLeastOne = 64,
    mu: Positive = 5e-3,
    queries: Count = 8,
    redraw: AtLeastOne = 5,
    parallel: AtLeastOne = 1,
    lr: Positive = 0.1,
    momentum: Annotated[float, Range(0, 1)] = 0.9,
    weight_decay: NonNegative = 5e-4,
    steps: Count = 60,
    batch: AtLeastOne = 32,
) -> Stage:
    """Descend on a forget and the retain loss, their gradients estimated from losses: the model is never differentiated.

    At each step the losses are looked at once, and once more for each of some coordinates, moved by mu. How many of them
    a tensor gives is decided once by ZO-GraSP; which, is drawn anew every few steps. What stands before the tensor that
    was moved is not computed again. It does not promise a retrained model's answers, and the cost grows with
    `coordinates`: put few weights in scope, as the last layer.

    Formula: g_i = (L(theta + mu e_i) - L(theta)) / mu for i in a random set A of the scope, 0 elsewhere; SGD on g.

    Args:
        forget: the objective on the forget data.
        combine: how the gradients of forget and retain data make one update; weighting or surgery.
        coordinates: |A|, walked at every step, >= 1; the whole scope where it has fewer.
        mu: step of the difference, > 0; an entry is wrong by O(mu), and below about 1e-4 it is rounding in float32.
        queries: random directions for each of the two gradients of ZO-GraSP, >= 0; 0 shares out by the tensors' sizes.
        redraw: steps between two draws of A, >= 1.
        parallel: coordinates looked at in one batched pass, >= 1; memory grows with it.
        lr: learning rate of SGD, > 0.
        momentum: of SGD, in [0, 1].
        weight_decay: of SGD, >= 0.
        steps: optimizer steps, >= 0; 0 changes nothing.
        batch: forget examples, and as many retain examples, per step, >= 1.

    The declared cost is that of a scope of more than `coordinates` coordinates and a combiner that asks for each gradient
    once; rows are counted where they enter the model, however much of it is then spared.
    Published setting (ResNet-20 on CIFAR-10, from scratch): a tenth of the weights, mu 5e-3, 192 queries, a draw every 5
    epochs, lr 0.1, momentum 0.9, weight decay 5e-4, batch 256, 50 epochs.
    """
    return Descend(
        forget=forget,
        retain=NLL(),
        combine=Coordinates(combine, mu, coordinates, queries, redraw, parallel=parallel),
        optimizer=SGD(lr, momentum, weight_decay),
        steps=steps,
        batch=batch,
        guard=Guard(),
    )
