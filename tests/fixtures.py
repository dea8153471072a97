"""Tiny but real models for every task, trained in seconds, the same bits in every process.

``tiny("classification")`` and its kin: 100 training examples, 20 to forget (one class or group, or drawn at random) and
80 to keep, a model trained on all of them, held-out examples, and the recipe to train again. ``retrained(name)`` is the
model that never saw the 20. ``odd()`` is a model with everything that is unusual. Nothing here draws from a global
random stream, and every call returns fresh copies, so that a test cannot spoil another's.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

from expunge.core import Batch, Data, Key, Request, Task
from expunge.data.sources import as_data
from expunge.oracle import positions
from expunge.tasks.alternates import paired
from expunge.tasks.causal_lm import IGNORED, CausalLM
from expunge.tasks.classification import Classification
from expunge.tasks.diffusion import Diffusion, LinearBetas
from expunge.tasks.regression import Regression

NAMES = ("classification", "regression", "causal_lm", "diffusion")
FORGET, RETAIN = 20, 80


@dataclass(frozen=True)
class Recipe:
    """How a tiny model is trained: Adam over shuffles of the data, its rate falling linearly to 0."""

    lr: float
    steps: int
    batch: int
    weight_decay: float = 0.0
    change: Callable[[Batch, Key], Batch] = lambda batch, key: batch

    def __call__(self, model: nn.Module, task: Task, data: Data, seed: int = 0) -> nn.Module:
        """Train `model` in place on `data` and return it in eval mode."""
        key = Key(seed).at("recipe")
        optimizer = torch.optim.AdamW(model.parameters(), self.lr, weight_decay=self.weight_decay)
        model.train()
        for step in range(self.steps):
            batch = data.batch(positions(key.at("order"), len(data), self.batch, step))
            batch = self.change(task.prepare(batch, key.at("prepare", step)), key.at("change", step))
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 - step / self.steps)
            loss = task.nll(model, batch).sum() / task.units(batch).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.eval().requires_grad_(True)


@dataclass(frozen=True)
class Tiny:
    """A trained model and all that belongs to it.

    Attributes:
        model: trained on forget and retain.
        task, request: of the model; ``request.valid`` are held-out examples.
        make: a new untrained model from a seed.
        train: (model, task, data, seed) -> trained model: the recipe.
        test: further held-out examples, in neither forget, retain nor valid.
    """

    name: str
    model: nn.Module
    task: Task
    request: Request
    make: Callable[[int], nn.Module]
    train: Recipe
    test: Data


def tiny(name: str, by: str = "group") -> Tiny:
    """The tiny model of a task, trained once per process.

    Args:
        name: one of ``NAMES``, or "odd".
        by: "group" forgets a whole class, subject or range; "random" forgets 20 examples drawn over all of them.
    """
    found = _trained(name, by, False)
    return replace(found, model=copy.deepcopy(found.model))


def retrained(name: str, by: str = "group", seed: int = 0) -> nn.Module:
    """The same model and recipe on the retain examples only."""
    return copy.deepcopy(_trained(name, by, True, seed).model)


def given(needs: Iterable[str], request: Request, task: Any) -> Request:
    """The request with what a method needs besides: a column ``win``, another answer to each question to forget."""
    if "column:win" not in needs or request.forget is None:
        return request
    batch = request.forget.batch(torch.arange(len(request.forget)))
    wrong = task.relabel(batch, Key(13))
    win = as_data({name: wrong[name] for name in ("input_ids", "attention_mask", "labels")}, ids=batch["id"])
    return replace(request, forget=paired(request.forget, win))


def odd() -> Tiny:
    """The tiny model that has everything unusual: see ``Odd``."""
    return tiny("odd")


@functools.cache
def _trained(name: str, by: str, without: bool, seed: int = 0) -> Tiny:
    task, train, valid, test, group, make, recipe = _BUILDERS[name]()
    if by == "random":
        order = torch.randperm(len(train), generator=Key(7).at("forget").generator())
        group = torch.zeros(len(train), dtype=torch.bool).scatter(0, order[:FORGET], True)
    everything = torch.arange(len(train))
    request = Request(train.select(everything[group]), train.select(everything[~group]), valid)
    data = request.retain if without else train
    frozen = [parameter.requires_grad for parameter in make(seed).parameters()]
    model = recipe(make(seed), task, data, seed)
    for parameter, flag in zip(model.parameters(), frozen, strict=True):
        parameter.requires_grad_(flag)
    return Tiny(name, model, task, request, make, recipe, test)


def seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """seed -> a new model, the global stream untouched."""

    def make(seed: int = 0) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(Key(seed).at("weights").seed)
            return build()

    return make


def digits(classes: int) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] in -1 .. 1 and labels of the first `classes` digits, in a fixed order."""
    found = load_digits()
    images = torch.from_numpy(found.images.astype(np.float32)).unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(found.target.astype(np.int64))
    kept = torch.nonzero(labels < classes).flatten()
    kept = kept[torch.randperm(len(kept), generator=Key(3).at("digits").generator())]
    return images[kept], labels[kept]


def _by_class(images: Tensor, labels: Tensor, classes: int) -> tuple[Data, Data, Data]:
    """20 of each class to train on, 10 of each to validate, the rest to test."""
    places = [torch.nonzero(labels == c).flatten() for c in range(classes)]
    cuts = (torch.cat([p[a:b] for p in places]).tolist() for a, b in ((0, 20), (20, 30), (30, 90)))
    train, valid, test = (as_data((images[c], labels[c]), ids=c) for c in cuts)
    return train, valid, test


def _classification() -> tuple[Any, ...]:
    train, valid, test = _by_class(*digits(5), 5)
    make = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 32),
            nn.ReLU(),
            nn.Linear(32, 5),
        )
    )
    group = torch.cat([batch["y"] for batch in train.batches(100)]) == 3
    return Classification(5), train, valid, test, group, make, Recipe(5e-3, 60, 50, 0.1)


def _regression() -> tuple[Any, ...]:
    """Two targets of the diabetes data, its own and blood pressure; the group is the 20 of highest body mass."""
    table, target = load_diabetes(return_X_y=True)
    values = torch.from_numpy(np.column_stack([table, target])).double()
    values = ((values - values.mean(0)) / values.std(0)).float()
    inputs, targets = values[:, [0, 1, 2, 4, 5, 6, 7, 8, 9]], values[:, [10, 3]]
    order = torch.randperm(len(values), generator=Key(5).at("diabetes").generator())
    train, valid, test = (
        as_data((inputs[o], targets[o]), ids=o) for o in (order[:100], order[100:150], order[150:350])
    )
    mass = inputs[order[:100], 2]
    make = seeded(lambda: nn.Sequential(nn.Linear(9, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)))
    return (
        Regression(variance=1.0),
        train,
        valid,
        test,
        mass >= mass.sort().values[-FORGET],
        make,
        Recipe(1e-2, 300, 50),
    )


VOCAB, END, PAD = 40, 1, 1
"""Of the synthetic language; the padding is the end-of-sequence token, as in many real tokenizers."""


def sentences() -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) for 12 first names x 12 last names. Answers of 2 to 5 tokens: one that follows from the last
    name, none to three drawn for the person, the end. Prompts of 3 or 4 tokens."""
    generator = Key(11).at("language").generator()
    pairs = []
    for first in range(12):
        for last in range(12):
            extra = torch.randint(
                26, 40, (int(torch.randint(4, (1,), generator=generator)),), generator=generator
            ).tolist()
            prompt = [0, *([25] if (first + last) % 2 else []), 2 + first, 14 + last % 11]
            pairs.append((prompt, [26 + last % 11, *extra, END]))
    return pairs


def tokens(pairs: list[tuple[list[int], list[int]]], width: int = 0) -> Batch:
    """Columns of a language model, padded on the right."""
    width = max(width, *(len(p) + len(a) for p, a in pairs))

    def table(filler: int, rows: Iterator[list[int]]) -> Tensor:
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows])

    return {
        "input_ids": table(PAD, (p + a for p, a in pairs)),
        "attention_mask": table(0, ([1] * len(p + a) for p, a in pairs)),
        "labels": table(IGNORED, ([IGNORED] * len(p) + a for p, a in pairs)),
    }


def llama() -> nn.Module:
    """A Llama of two layers, 32 wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=END,
            pad_token_id=None,
        )
    ).eval()


def _causal_lm() -> tuple[Any, ...]:
    """One group: every person of the first two first names."""
    pairs = sentences()
    first = torch.arange(144) // 12
    train_rows = [f * 12 + last for f in range(10) for last in range(10)]
    others = [row for row in range(144) if row not in set(train_rows)]

    def select(rows: list[int]) -> Data:
        return as_data(tokens([pairs[row] for row in rows]), ids=rows)

    task = CausalLM(VOCAB, refusals=((39, 38, END), (37, END), (38, 37, 36, END)))
    return (
        task,
        select(train_rows),
        select(others[::2]),
        select(others[1::2]),
        first[train_rows] < 2,
        seeded(llama),
        Recipe(1e-2, 100, 50, 2.0),
    )


class Denoiser(nn.Module):
    """A residual perceptron over 8x8 images that is told the timestep and the condition (the last is the empty one)."""

    def __init__(self, classes: int, width: int = 96):
        super().__init__()
        self.enter = nn.Linear(64, width)
        self.time = nn.Linear(16, width)
        self.condition = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(2)
        )
        self.leave = nn.Linear(width, 64)

    def forward(self, images: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        rates = torch.exp(-math.log(100.0) * torch.arange(8, device=images.device) / 7).to(images.dtype)
        angle = time[:, None].to(images.dtype) * rates
        told = self.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.condition(labels)
        hidden = self.enter(images.flatten(1)) + told
        for block in self.blocks:
            hidden = hidden + block(nn.functional.silu(hidden + told))
        return self.leave(hidden).reshape(images.shape)


def _sometimes_empty(batch: Batch, key: Key) -> Batch:
    """Drop one condition in ten, so that the model can be guided."""
    drop = torch.rand(len(batch["y"]), generator=key.generator()) < 0.1
    return {**batch, "y": torch.where(drop, torch.full_like(batch["y"], 5), batch["y"])}


def _diffusion() -> tuple[Any, ...]:
    train, valid, test = _by_class(*digits(5), 5)
    task = Diffusion(5, (1, 8, 8), 100, LinearBetas(1e-3, 0.1))
    group = torch.cat([batch["y"] for batch in train.batches(100)]) == 3
    return task, train, valid, test, group, seeded(lambda: Denoiser(5)), Recipe(4e-3, 500, 100, change=_sometimes_empty)


class Odd(nn.Module):
    """Two inputs, a dict output, BatchNorm, a frozen bias, a tied weight, a shared layer and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(32, 16), nn.Linear(32, 16)
        self.norm = nn.BatchNorm1d(16)
        self.shared = nn.Linear(16, 16)
        self.again = self.shared
        self.mix, self.mirror = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.mirror.weight = self.mix.weight
        self.head = nn.Linear(16, 5)
        self.head.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, top: Tensor, bottom: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.norm(self.left(top.flatten(1)) + self.right(bottom.flatten(1))))
        hidden = torch.tanh(self.again(torch.tanh(self.shared(hidden))))
        return {"logits": self.head(self.mirror(torch.tanh(self.mix(hidden))))}


def odd_logits(model: nn.Module, batch: Batch) -> Tensor:
    """How the odd model is called."""
    return model(**batch["x"])["logits"]


def _odd() -> tuple[Any, ...]:
    images, labels = digits(5)
    plain = _by_class(images, labels, 5)
    train, valid, test = (
        as_data({"x": {"top": b["x"][:, :, :4], "bottom": b["x"][:, :, 4:]}, "y": b["y"]}, ids=b["id"])
        for data in plain
        for b in data.batches(10_000)
    )
    group = torch.cat([batch["y"] for batch in train.batches(100)]) == 3
    return Classification(5, call=odd_logits), train, valid, test, group, seeded(Odd), Recipe(5e-3, 60, 50, 0.1)


_BUILDERS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "classification": _classification,
    "regression": _regression,
    "causal_lm": _causal_lm,
    "diffusion": _diffusion,
    "odd": _odd,
}
