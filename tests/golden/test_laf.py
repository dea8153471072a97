"""LAF beside the authors' code, and that no label is read.

The numbers were computed by ``extractor_unlearning`` and ``vae_loss_function`` of ShaofeiShen768/LAF on the arrays of
``setting``: three pairs of steps, rates 0.01 and 0.02, temperature 5, autoencoders without noise.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import expunge as ex
from expunge import methods
from expunge.core import Case
from expunge.likeness import Autoencoder, Evidence
from expunge.optim import SGD, Adam
from expunge.scope import Scope
from expunge.turns import InTurns
from tests.golden.forgetting import accuracy, digits

torch.set_num_threads(1)
TASK = ex.Classification(3)
TURNED = {
    "0.weight": 2.1851852338165636,
    "0.bias": 0.814134973557455,
    "2.weight": 2.277424445904694,
    "2.bias": 0.2782535659363933,
}
EVIDENCE = 94.53595260759717


def seeded(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def quiet(seed: int) -> Autoencoder:
    """An autoencoder whose codes have a standard deviation of e^-50."""
    model = seeded(Autoencoder(6, 2), seed)
    with torch.no_grad():
        model.spread.weight.zero_()
        model.spread.bias.fill_(-100.0)
    return model.requires_grad_(False)


def setting() -> tuple[nn.Module, ex.Request]:
    net = seeded(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), 31)
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(32), dtype=torch.float64)
    return net, ex.split((x, torch.arange(12) % 3), forget=list(range(6)))


def test_steps_are_those_of_the_authors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two Adams in turns on the same batches. Sums and means differ by Adam's epsilon alone, which is 1e-8."""
    net, request = setting()
    known = iter([quiet(33), quiet(34)])  # of the forget data, of the retain data
    monkeypatch.setattr(importlib.import_module("expunge.methods.laf"), "fitted", lambda *_: next(known))
    stage = methods.laf(lr=1e-2, align_lr=2e-2, temperature=5.0, steps=3)
    done = ex.unlearn(net, request, task=TASK, method=stage)
    found = {name: float(p.detach().norm()) for name, p in done.model.named_parameters()}
    assert found == pytest.approx(TURNED, rel=1e-5)


def test_the_autoencoders_loss_is_that_of_the_authors_code() -> None:
    model = seeded(Autoencoder(6, 2), 35)
    vectors = torch.randn(5, 6, generator=torch.Generator().manual_seed(36), dtype=torch.float64)
    _, request = setting()
    batch = {"id": torch.arange(5), "x": vectors, "noise": torch.zeros(5, 2)}
    value = Evidence()(Case(model, request, TASK, Scope.all(model)), batch)
    assert float(value.mean().detach()) == pytest.approx(EVIDENCE, rel=1e-10)


def test_optimizers_in_turns_keep_their_own_moments() -> None:
    p, q, r = (nn.Parameter(torch.ones(3)) for _ in range(3))
    both = InTurns((Adam(0.1), SGD(0.5, 0.0))).build({"p": p})
    adam, sgd = torch.optim.Adam([q], 0.1), torch.optim.SGD([q], 0.5)
    for step in range(6):
        if step == 3:  # as a resumed run does
            fresh = InTurns((Adam(0.1), SGD(0.5, 0.0))).build({"p": p})
            fresh.load_state_dict(both.state_dict())
            both = fresh
        p.grad, q.grad = torch.tensor([1.0, -2.0, step]), torch.tensor([1.0, -2.0, step])
        both.step()
        (adam, sgd)[step % 2].step()
        assert torch.equal(p, q)
    assert not torch.equal(p, r)


def test_no_label_is_read() -> None:
    """The same bits whatever the labels are."""
    model, request = digits(8)
    found = []
    xs = [next(iter(data.batches(999)))["x"] for data in (request.forget, request.retain)]
    for label in (0, 5):
        split = ex.split((torch.cat(xs), torch.full((700,), label)), forget=list(range(len(xs[0]))))
        stage = methods.laf(steps=3, epochs=1)
        done = ex.unlearn(model, split, task=ex.Classification(10), method=stage)
        found.append(torch.nn.utils.parameters_to_vector(done.model.parameters()).detach())
    assert torch.equal(*found)


def test_a_class_is_forgotten_more_than_the_others() -> None:
    model, request = digits(8)
    done = ex.unlearn(
        model, request, task=ex.Classification(10), method=methods.laf(lr=3e-3, align_lr=3e-3, epochs=20, steps=200)
    )
    lost = [accuracy(model, data) - accuracy(done.model, data) for data in (request.forget, request.retain)]
    assert lost[0] > 0.1
    assert lost[1] < 0.05


def test_repair_fine_tunes_the_head_alone_as_the_authors_classifier_unlearning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam on the cross-entropy of labelled retain data, over the last layer: VUnlearning.py's, by torch."""
    net, request = setting()
    settings = {"lr": 1e-2, "steps": 1, "batch": 99}
    found = []
    for repair in (0, 4):
        known = iter([quiet(33), quiet(34)])
        monkeypatch.setattr(
            importlib.import_module("expunge.methods.laf"), "fitted", lambda *_, known=known: next(known)
        )
        stage = methods.laf(**settings, repair=repair, repair_lr=3e-2, labelled=1.0)
        found.append(ex.unlearn(net, request, task=TASK, method=stage).model)
    start, done = found
    batch = next(iter(request.retain.batches(99)))  # type: ignore[union-attr]
    optimizer = torch.optim.Adam(start[2].parameters(), lr=3e-2)  # type: ignore[index]
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(start(batch["x"]), batch["y"]).backward()
        optimizer.step()
    for p, q in zip(done.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)


def test_repair_reads_so_many_labels_and_never_those_of_the_forget_data() -> None:
    model, request = digits(8)
    read: set[int] = set()
    nll = ex.Classification.nll

    class Reading(ex.Classification):
        def nll(self, model: nn.Module, batch: dict) -> torch.Tensor:  # type: ignore[override, type-arg]
            if torch.is_grad_enabled():  # not the looks that ``unlearn`` takes before it begins
                read.update(batch["id"].tolist())
            return nll(self, model, batch)

    stage = methods.laf(steps=2, epochs=1, repair=40, labelled=0.05, batch=16)
    ex.unlearn(model, request, task=Reading(10), method=stage)
    assert not read & set(request.forget.ids.tolist())  # type: ignore[union-attr]
    assert len(read) == -(-len(request.retain) // 20)  # type: ignore[arg-type]


def test_repair_restores_what_laf_cost_the_others() -> None:
    model, request = digits(8)
    losses = []
    for repair in (0, 60):
        stage = methods.laf(lr=3e-3, align_lr=3e-3, epochs=20, steps=200, repair=repair)
        done = ex.unlearn(model, request, task=ex.Classification(10), method=stage)
        batch = next(iter(request.retain.batches(999)))  # type: ignore[union-attr]
        losses.append(float(nn.functional.cross_entropy(done.model(batch["x"]), batch["y"]).detach()))
        assert accuracy(model, request.forget) - accuracy(done.model, request.forget) > 0.1  # type: ignore[arg-type]
    assert losses[1] < losses[0]
