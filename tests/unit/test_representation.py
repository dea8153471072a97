"""Layers of any network, their likeness to retrained ones, and what a fresh classifier still finds in them."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge.audit import report, words
from expunge.audit.agreement import harmonic, retraining_agreement
from expunge.audit.intervals import one_more
from expunge.audit.layers import Layer, activations, as_tokens, changed, find_layers, from_tokens, sample, spread
from expunge.audit.related import forget_related, rank_classes
from expunge.audit.representation import cka_forget, cka_test, procrustes_forget, procrustes_test
from expunge.audit.subject import Subject
from expunge.audit.transfer import (
    class_means,
    knn_downstream,
    knn_forgotten,
    linear_probe,
    nearest_neighbours,
    nearest_prototype,
    probe_downstream,
    probe_forgotten,
    prototype_forgotten,
)
from expunge.core import Key, Refused, Request
from expunge.data.sources import as_data
from expunge.registry import is_asked, measures
from expunge.store import Kept, Store
from expunge.tasks.classification import Classification
from tests.conftest import GlobalRandomness
from tests.fixtures import NAMES, Tiny, retrained, tiny

ALL = (
    *("cka_forget", "cka_test", "procrustes_forget", "procrustes_test", "knn_forgotten", "probe_forgotten"),
    *("prototype_forgotten", "knn_downstream", "probe_downstream", "retraining_agreement"),
)


@functools.cache
def family(count: int = 4) -> tuple[nn.Module, ...]:
    return tuple(retrained("classification", seed=seed) for seed in range(count))


def subject(after: nn.Module | None = None, case: Tiny | None = None, **changes: object) -> Subject:
    case = tiny("classification") if case is None else case
    made = Subject(case.model, after or case.model, case.request, case.task, case.test, family())
    return replace(made, **changes)


def beheaded(label: int = 3) -> nn.Module:
    """The original model, that never says one class."""
    model = tiny("classification").model
    with torch.no_grad():
        model[7].weight[label], model[7].bias[label] = 0.0, -100.0
    return model


# ---- layers


class Residual(nn.Module):
    """Blocks as in ResNet: one ReLU used twice, in place, and a sum between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.again = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm(self.first(x)))
        return self.relu(self.again(self.second(out)) + x)


class Net(nn.Module):
    """Convolutions, pooling by a function, a dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(Residual(), Residual())
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.blocks(self.stem(x)).mean((2, 3))))


def net() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Net()


def test_layers_of_a_plain_network() -> None:
    case = tiny("classification")
    found = find_layers(case.model, case.task, case.request.forget)
    assert [str(layer) for layer in found] == ["1", "4", "6"]
    assert [layer.channels for layer in found] == [1, -1, -1]
    assert find_layers(nn.Flatten(), Classification(5), case.request.forget) == []


def test_layers_of_a_residual_network_are_what_weights_read(poisoned_randomness: GlobalRandomness) -> None:
    """Blocks, and what a function or a shared module made: by its reader. Never the input, never a BatchNorm's."""
    case, model = tiny("classification"), net().train()
    found = find_layers(model, case.task, case.request.forget)
    names = ["stem", "input of blocks.0.second", "blocks.0", "input of blocks.1.second", "drop"]
    assert [str(layer) for layer in found] == names
    assert model.training
    assert model.drop.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_activations_are_those_of_the_network(poisoned_randomness: GlobalRandomness) -> None:
    case, model = tiny("classification"), net().train()
    layers = find_layers(model, case.task, case.request.forget)
    found = activations(model, case.task, case.request.forget, layers, size=7)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.eval()
    with torch.no_grad():
        x = next(iter(case.request.forget.batches(100)))["x"]
        stem = model.stem(x)
        first = model.blocks[0](stem)
        last = model.blocks(stem).mean((2, 3))
    for layer, value in ((0, stem.mean((2, 3))), (2, first.mean((2, 3))), (4, last)):
        np.testing.assert_allclose(found[layer], value, atol=1e-6)
    whole = activations(model, case.task, case.request.forget, layers[:1], pool="none")[0]
    np.testing.assert_allclose(whole, stem.flatten(2).transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("name", [*NAMES, "odd"])
def test_every_task_has_layers(name: str) -> None:
    case = tiny(name)
    layers = find_layers(case.model, case.task, case.request.forget, key=Key(1))
    assert layers
    found = activations(case.model, case.task, case.request.forget, layers, size=6, key=Key(1))
    assert all(part.shape[0] == len(case.request.forget) and part.ndim == 2 for part in found)
    assert any(part.std() > 0 for part in found)


def test_padding_is_not_averaged() -> None:
    case = tiny("causal_lm")
    layer = find_layers(case.model, case.task, case.request.forget)[-3:-2]
    batch = next(iter(case.request.forget.batches(100)))
    longer = {
        name: torch.cat([value, torch.full((len(value), 3), filler)], 1)
        for (name, value), filler in zip(
            ((name, batch[name]) for name in ("input_ids", "attention_mask", "labels")), (1, 0, -100), strict=True
        )
    }
    short = activations(case.model, case.task, case.request.forget, layer)[0]
    long = activations(case.model, case.task, as_data(longer), layer)[0]
    np.testing.assert_allclose(short, long, atol=1e-5)
    left = {name: value.roll(3, 1) for name, value in longer.items()}
    np.testing.assert_allclose(short, activations(case.model, case.task, as_data(left), layer)[0], atol=1e-5)


def test_a_changed_layer_changes_the_answer_while_open() -> None:
    case, model = tiny("classification"), net().eval()
    batch = next(iter(case.request.forget.batches(100)))
    with torch.no_grad():
        before = model(batch["x"])
        for layer in find_layers(model, case.task, case.request.forget):
            with changed(model, layer, lambda value: value):
                assert torch.equal(model(batch["x"]), before)
            with changed(model, layer, torch.zeros_like):
                assert not torch.equal(model(batch["x"]), before)
            assert torch.equal(model(batch["x"]), before)
        with changed(model, find_layers(model, case.task, case.request.forget)[-1], torch.zeros_like):
            assert torch.equal(model(batch["x"]), model.fc.bias.expand(20, 5))


@pytest.mark.parametrize(("shape", "channels"), [((3, 7), -1), ((3, 5, 7), -1), ((3, 7, 4, 2), 1), ((3, 4, 2, 7), -1)])
def test_tokens_and_back(shape: tuple[int, ...], channels: int) -> None:
    value, layer = torch.arange(float(np.prod(shape))).reshape(shape), Layer("x", channels=channels)
    tokens = as_tokens(value, layer)
    assert tokens.shape == (3, int(np.prod(shape)) // 21, 7)
    assert torch.equal(from_tokens(tokens, value, layer), value)


def test_bad_layers_are_refused() -> None:
    case, model = tiny("classification"), net()
    call = functools.partial(activations, model, case.task, case.request.forget)
    with pytest.raises(Refused, match="no module 'head'"):
        call([Layer("head")])
    with pytest.raises(Refused, match="never reaches"):
        call([Layer("unused")])
    with pytest.raises(Refused, match="MiB"):
        call([Layer("stem", channels=1)], pool="none", limit=1000)
    with pytest.raises(Refused, match="no module"), changed(model, Layer("head"), torch.zeros_like):
        pass


def test_spread_and_sample() -> None:
    layers = [Layer(str(number)) for number in range(20)]
    assert [layer.module for layer in spread(layers, 3)] == ["0", "10", "19"]
    assert spread(layers, 1) == layers[-1:]
    assert spread(layers[:2], 8) == layers[:2]
    data = tiny("classification").request.retain
    assert torch.equal(sample(data, 9, Key(1)).ids, sample(data, 9, Key(1)).ids)
    assert not torch.equal(sample(data, 9, Key(1)).ids, sample(data, 9, Key(2)).ids)
    assert sample(data, 900, Key(1)) is data


# ---- likeness to retrained models


def test_all_are_asked_for_and_have_titles() -> None:
    assert all(name in measures() and is_asked(name) and name in words.TITLES for name in ALL)


@pytest.mark.parametrize("measure", [cka_forget, cka_test, procrustes_forget, procrustes_test])
def test_known_answers(measure: object) -> None:
    """One more retrained model is within; random weights lie outside; the same model is 1 or 0.

    With 20 examples of one class the interval may still reach into the reference; with 240 it does not.
    """
    genuine = measure(subject(retrained("classification", seed=20)))
    random = measure(subject(tiny("classification").make(50).eval()))
    assert genuine.verdict == "within"
    assert not random.reference[0] <= random.value <= random.reference[1]
    assert random.verdict == "outside" or random.n == 20
    same = measure(subject(family()[0], retrained=family()[:1]))
    assert same.value == pytest.approx(1.0 if same.better == "higher" else 0.0, abs=1e-6)
    assert same.reference is None
    assert genuine.low <= genuine.value <= genuine.high
    for line in ("unlearned", "retrained", "original"):
        assert genuine.curves[line][0] == (1.0, 2.0, 3.0)
    _, middle, low, high = genuine.curves["retrained"]
    assert all(a <= b <= c for a, b, c in zip(low, middle, high, strict=True))


def test_value_is_the_mean_over_layers_and_models() -> None:
    from expunge.audit.similarity import debiased_cka

    case = tiny("classification")
    made = subject()
    layers = find_layers(case.model, case.task, case.request.forget)
    mine = activations(case.model, case.task, case.request.forget, layers)
    each = [
        [
            debiased_cka(a, b)
            for a, b in zip(mine, activations(model, case.task, case.request.forget, layers), strict=True)
        ]
        for model in family()
    ]
    reading = cka_forget(made)
    assert reading.value == pytest.approx(np.mean(each), abs=1e-6)
    assert reading.detail["original"] == pytest.approx(reading.value)
    assert reading.detail["penultimate"] == pytest.approx(np.mean(each, axis=0)[-1], abs=1e-6)


def test_does_not_depend_on_the_batch_and_runs_each_model_once() -> None:
    rows = []
    model = tiny("classification").model
    handle = model[0].register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    made = subject(model, batch=7)
    first = [measure(made) for measure in (cka_forget, procrustes_forget)]
    handle.remove()
    assert sum(rows) == 20
    again = [measure(subject(model)) for measure in (cka_forget, procrustes_forget)]
    for a, b in zip(first, again, strict=True):
        assert a.value == pytest.approx(b.value, abs=1e-6)


def test_none_where_it_does_not_apply() -> None:
    case = tiny("classification")
    assert cka_forget(subject(retrained=())) is None
    few = replace(case.request, forget=case.request.forget.select(range(7)))
    assert cka_forget(subject(request=few)) is None
    regression = tiny("regression")
    made = Subject(regression.model, regression.model, regression.request, regression.task)
    assert [measure(made) for measure in (knn_forgotten, probe_downstream, retraining_agreement)] == [None] * 3
    by_chance = tiny("classification", "random")
    assert probe_forgotten(subject(case=by_chance)) is None
    assert knn_downstream(subject()) is None


def test_the_floor_predicts_one_more_model() -> None:
    """Pairs that score m - a_i - a_j: 95 % of new models fall inside, for any number of references."""
    rng = np.random.default_rng(0)
    for count in (3, 4, 8):
        hits = 0
        for _ in range(1000):
            a = rng.normal(size=count + 1)
            pairs = 0.9 - a[:, None] - a
            means = (pairs[:count, :count].sum(1) - np.diag(pairs)[:count]) / (count - 1)
            low, high = one_more(means)
            hits += low <= pairs[count, :count].mean() <= high
        assert 0.925 <= hits / 1000 <= 0.972
    assert one_more(np.array([0.7, 0.7])) == (0.7, 0.7)


def test_models_by_name(tmp_path: Path) -> None:
    """Weights are opened, whoever holds them; not before."""
    opened = []

    def load(number: int) -> nn.Module:
        opened.append(number)
        return family()[number]

    kept = tuple(Kept(f"m{number}", functools.partial(load, number)) for number in range(3))
    case = tiny("classification")
    made = Subject(case.model, case.model, case.request, case.task, case.test, kept, store=Store(tmp_path))
    reading = cka_forget(made)
    assert reading.value == pytest.approx(cka_forget(subject(retrained=family()[:3])).value, abs=1e-6)
    assert sorted(opened) == [0, 1, 2]


# ---- what is left in the features


def test_a_class_lost_in_the_head_alone_is_found_in_the_features() -> None:
    """The head never says it; prototypes, neighbours and a probe do, as on the original's features."""
    for measure in (prototype_forgotten, knn_forgotten, probe_forgotten):
        headless, original = measure(subject(beheaded())), measure(subject())
        assert headless.detail["head"] == 0.0
        assert headless.value == original.value > 80.0
        assert headless.detail["misalignment"] == headless.value
        assert headless.low < headless.value < headless.high
        assert headless.n == 60


def test_features_that_hold_nothing_are_at_chance() -> None:
    model = tiny("classification").model
    nn.init.zeros_(model[5].weight)
    for measure in (prototype_forgotten, knn_forgotten, probe_forgotten):
        reading = measure(subject(model))
        assert reading.value in (0.0, 100.0)  # one class for all
        assert reading.detail["kept"] <= 100 / 4 + 1e-9


def test_probed_examples_were_not_fitted() -> None:
    """Labels at random: a fitted example would be its own neighbour, and be right."""
    case = tiny("classification")
    made = subject(test=None, request=replace(case.request, valid=None))
    assert knn_forgotten(made).n == 4
    downstream = as_data((torch.randn(400, 1, 8, 8, generator=Key(1).generator()), torch.arange(400) % 4))
    noise = subject(request=replace(case.request, extra={"downstream": downstream}))
    for measure in (knn_downstream, probe_downstream):
        reading = measure(noise)
        assert reading.n == 80
        assert reading.low < 25 < reading.high


def test_downstream_labels_may_be_any() -> None:
    case = tiny("classification")
    batch = next(iter(case.test.batches(1000)))
    other = as_data((batch["x"], 70 + 7 * batch["y"]))
    made = subject(request=replace(case.request, extra={"downstream": other}))
    assert knn_downstream(made).value > 80
    assert probe_downstream(made).value > 80
    one = subject(request=replace(case.request, extra={"downstream": as_data((batch["x"], 0 * batch["y"]))}))
    with pytest.raises(Refused, match="2 classes"):
        knn_downstream(one)


def test_classifiers_by_hand() -> None:
    known = np.array([[1.0, 0.1], [1.0, 0.2], [0.9, 0.0], [0.1, 1.0], [0.0, 2.0], [0.2, 1.0]])
    labels, asked = np.array([4, 4, 4, 9, 9, 9]), np.array([[8.0, 1.0], [0.1, 0.9]])
    for predict in (nearest_neighbours, linear_probe, nearest_prototype):
        assert predict(known, labels, asked).tolist() == [4, 9]
    classes, means = class_means(known, labels)
    assert classes.tolist() == [4, 9]
    np.testing.assert_allclose(means, [known[:3].mean(0), known[3:].mean(0)])
    dead = np.concatenate([known, np.full((6, 1), 3.0)], axis=1)
    assert linear_probe(dead, labels, np.concatenate([asked, [[3.0], [-50.0]]], axis=1)).tolist() == [4, 9]


def test_agreement_is_high_for_a_retrained_model_only() -> None:
    genuine = retraining_agreement(subject(retrained("classification", seed=20)))
    assert genuine.verdict == "within"
    for model in (tiny("classification").model, tiny("classification").make(50).eval()):
        reading = retraining_agreement(subject(model))
        assert reading.verdict == "outside"
        assert reading.low <= reading.value <= reading.high
    assert harmonic(1.0, 1.0) == 1.0
    assert harmonic(0.0, 1.0) == harmonic(0.0, 0.0) == 0.0
    assert harmonic(0.5, 1.0) == pytest.approx(2 / 3)


def test_in_a_report(tmp_path: Path) -> None:
    found = report.audit(subject(beheaded(), retrained=family()[:3]), also=ALL)
    again = report.Report.from_json(found.to_json())
    for name in ("cka_forget", "procrustes_test", "prototype_forgotten", "retraining_agreement"):
        assert again.row("unlearned").readings[name].reference is not None
        assert name in again.row("retrain").readings
    assert again.row("unlearned").readings["cka_forget"].curves == found.row("unlearned").readings["cka_forget"].curves


# ---- forget sets near a downstream set


def test_ranking_by_hand() -> None:
    means = np.array([[10.0, 0, 0], [0, 10, 0], [0, 0, 10], [9, 9, 0]]) + 100
    others = np.array([[110.0, 100, 100.5]])
    order, nearness = rank_classes(means, others)
    centred, other = means - means.mean(0), others[0] - means.mean(0)
    wanted = [float(row @ other / np.linalg.norm(row) / np.linalg.norm(other)) for row in centred]
    assert order.tolist() == np.argsort(wanted)[::-1].tolist()
    np.testing.assert_allclose(nearness, sorted(wanted, reverse=True))
    assert order[0] == 0


def test_related_classes_are_forgotten() -> None:
    """The downstream set is digits 1 and 4, turned and brightened: those of the five are the nearest."""
    case = tiny("classification")
    train = as_data({name: torch.cat([p[name] for p in parts]) for parts in [_everything(case)] for name in ("x", "y")})
    batch = next(iter(case.test.batches(1000)))
    chosen = (batch["y"] == 1) | (batch["y"] == 4)
    downstream = as_data((0.9 * batch["x"][chosen] + 0.05, batch["y"][chosen] + 40))
    request, ranking = forget_related(train, downstream, case.task, 2, model=case.model)
    assert set(ranking.classes[:2]) == {1, 4}
    assert ranking.nearness[1] > 0.8 > ranking.nearness[2]
    assert set(_labels(request.forget)) == {1, 4}
    assert set(_labels(request.retain)) == {0, 2, 3}
    assert len(request.forget) + len(request.retain) == len(train)
    assert request.data("downstream") is downstream
    own = (np.eye(5), np.eye(5)[[0, 3]])
    assert set(forget_related(train, downstream, case.task, 2, embeddings=own)[1].classes[:2]) == {0, 3}


def _everything(case: Tiny) -> list[dict[str, Tensor]]:
    return [*case.request.forget.batches(1000), *case.request.retain.batches(1000)]


def _labels(data: object) -> list[int]:
    return next(iter(data.batches(1000)))["y"].tolist()


def test_bad_requests_for_related_classes_are_refused() -> None:
    case = tiny("classification")
    train, down = case.request.retain, case.test
    call = functools.partial(forget_related, train, down, case.task)
    for settings, said in (
        ({"top": 0, "model": case.model}, "top must lie"),
        ({"top": 4, "model": case.model}, "top must lie"),
        ({"top": 1}, "either model="),
        ({"top": 1, "model": case.model, "embeddings": (np.eye(4), np.eye(4))}, "either model="),
        ({"top": 1, "embeddings": (np.eye(3), np.eye(5))}, "one per class"),
        ({"top": 1, "embeddings": (np.eye(4), np.eye(5))}, "same d"),
        ({"top": 1, "model": nn.Flatten()}, "no layers"),
    ):
        with pytest.raises(Refused, match=said):
            call(**settings)
    regression = tiny("regression")
    with pytest.raises(Refused, match="classification"):
        forget_related(regression.request.retain, regression.test, regression.task, 1, model=regression.model)
    assert isinstance(call(top=1, model=case.model)[0], Request)
