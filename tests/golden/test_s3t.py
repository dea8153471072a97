"""S3T: the deletion capacity of the published setting, and stages that never saw a deleted id, to the bit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge import Data, Refused, Request, load_weights, registry, save_weights, unlearn
from expunge.core import Key, RunFailed
from expunge.data.sources import as_data, collect
from expunge.orders import Sequences, deletion_capacity, matched, rotations
from expunge.sequences import Sequenced, groups
from expunge.shards import merge, place, train_shards, untrained
from tests.fixtures import odd, tiny

SHARDS, SLICES, BUDGET = 2, 3, 2
RUNS = 4000


def s3t(**changes: Any) -> Any:
    settings = {"shards": SHARDS, "slices": SLICES, "budget": BUDGET, "epochs": 3.0, "lr": 5e-3, **changes}
    return registry.methods()["s3t"].build(**settings)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = state(a), state(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def empty(network: nn.Module) -> bool:
    return not any(bool(value.any()) for value in state(network).values())


def everything() -> Data:
    found = tiny("classification").request
    parts = [collect(data) for data in (found.forget, found.retain)]
    return as_data({n: torch.cat([p[n] for p in parts]) for n in ("x", "y")}, ids=torch.cat([p["id"] for p in parts]))


def members(data: Data, shard: int, number: int) -> list[int]:
    """The ids of a slice."""
    places = place(data.ids, SHARDS, SLICES)
    return data.ids[(places == torch.tensor([shard, number])).all(1)].tolist()


def asked(data: Data, ids: list[int]) -> Request:
    chosen = data.select(torch.nonzero(torch.isin(data.ids, torch.tensor(ids))).flatten())
    return Request(forget=chosen, retain=data.without(ids))


def trained(data: Data | None = None, **changes: Any) -> Any:
    found = tiny("classification")
    return train_shards(found.model, everything() if data is None else data, found.task, s3t(**changes), seed=3)


@pytest.mark.parametrize(
    ("shards", "slices", "budget", "published"),
    [
        (5, 6, 1, 68.50),
        (5, 6, 2, 87.87),
        (5, 6, 3, 99.55),
        (5, 6, 4, 107.93),
        (5, 6, 5, 114.48),
        (5, 6, 6, 119.85),
        (5, 1, 1, 11.417),  # SISA, any request ends its shard
    ],
)
def test_deletion_capacity(shards: int, slices: int, budget: int, published: float) -> None:
    """By requests to the structure until nobody can answer: the mean within 3.3 standard errors (1 in 1,000)."""
    counts = [deletion_capacity(shards, slices, budget, Key(run).at("capacity", budget)) for run in range(RUNS)]
    sample = torch.tensor(counts, dtype=torch.float64)
    assert abs(float(sample.mean()) - published) < 3.3 * float(sample.std()) / math.sqrt(RUNS)
    closed = shards * slices * sum(1 / n for n in range(1, shards * budget + 1))
    assert closed == pytest.approx(published, abs=6e-3)


def test_what_a_deletion_switches_off() -> None:
    """By hand: orders 0123 and 1230; the first is cut at the place of the slice, and nothing comes back."""
    assert rotations(4, 2) == [[0, 1, 2, 3], [1, 2, 3, 0]]
    sequences = Sequences.whole(2, 4, 2)
    assert sequences.serving() == [(0, 0, 3), (1, 0, 3)]
    sequences.delete(0, 3)
    assert sequences.alive == [[3, 2], [4, 4]]
    sequences.delete(0, 0)
    assert sequences.alive == [[0, 2], [4, 4]]
    assert sequences.serving() == [(0, 1, 1), (1, 0, 3)]
    sequences.delete(0, 3)
    assert sequences.alive == [[0, 2], [4, 4]]
    sequences.delete(0, 1)
    assert sequences.serving() == [(1, 0, 3)]
    sequences.delete(1, 1)
    assert sequences.alive[1] == [1, 0]
    assert sequences.in_service
    sequences.delete(1, 0)
    assert not sequences.in_service
    for budget in (0, 5):
        with pytest.raises(Refused, match=r"\[1, 4\]"):
            rotations(4, budget)


def test_layers_of_each_stage() -> None:
    """Top first, the last layer always; with fewer layers than slices the last stages have that one alone."""
    network = tiny("classification").model  # layers 0, 2, 5 and the last, 7
    head = ["7.weight", "7.bias"]
    assert groups(network, 3) == [
        ["5.weight", "5.bias", *head],
        ["2.weight", "2.bias", *head],
        ["0.weight", "0.bias", *head],
    ]
    assert groups(network, 2) == [["5.weight", "5.bias", "2.weight", "2.bias", *head], ["0.weight", "0.bias", *head]]
    assert groups(network, 5)[-1] in ([*head], ["0.weight", "0.bias", *head])
    assert sorted(name for group in groups(network, 5) for name in group if name not in head) == sorted(
        name for name, _ in network.named_parameters() if name not in head
    )
    with pytest.raises(Refused, match="no trainable"):
        groups(copy.deepcopy(network).requires_grad_(False), 2)


def test_each_stage_is_a_loop_over_the_slices_of_its_order_so_far() -> None:
    """Plain gradient descent on whole batches, written out, in the group of layers of the place."""
    found, data = tiny("classification"), everything()
    model = trained(optimizer="sgd", momentum=0.0, lr=0.1, batch=1000, epochs=4.0)
    table = collect(data)
    for shard in range(SHARDS):
        for which, order in enumerate(([0, 1, 2], [1, 2, 0])):
            network = untrained(found.model, Key(int(model.seed)).at("shard", shard).at("weights"), None).train()
            seen: list[int] = []
            for step, number in enumerate(order):
                seen += members(data, shard, number)
                rows = torch.isin(table["id"], torch.tensor(seen))
                layer = ("5", "2", "0")[step]
                chosen = [p for name, p in network.named_parameters() if name.split(".")[0] in (layer, "7")]
                for _ in range(4):
                    loss = nn.functional.cross_entropy(network(table["x"][rows]), table["y"][rows])
                    grads = torch.autograd.grad(loss, chosen)
                    with torch.no_grad():
                        for parameter, grad in zip(chosen, grads, strict=True):
                            parameter -= 0.1 * grad
                for ours, theirs in zip(
                    model.stages(shard, which)[step].parameters(), network.parameters(), strict=True
                ):
                    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_deletion_switches_off_erases_and_trains_nothing() -> None:
    """What is left equals training on the retain data, to the bit; what saw the slice is gone."""
    found, data = tiny("classification"), everything()
    ids = [members(data, 0, 2)[0], members(data, 1, 0)[1], members(data, 1, 0)[0]]
    before = trained()
    kept = copy.deepcopy(before)
    done = unlearn(before, asked(data, ids), task=found.task, method=s3t(), seed=50)
    assert same(before, kept), "the caller's model moved"
    assert done.record["cost"]["forward"] == done.record["cost"]["backward"] == 0
    assert done.model.alive.tolist() == [[2, 1], [0, 2]]  # orders 012 and 120
    assert any("7 stages were switched off and 5 of 12 are left" in note for note in done.notes)
    afresh = trained(data.without(ids))
    for shard in range(SHARDS):
        for order in range(BUDGET):
            for stage in range(SLICES):
                ours, again, old = (m.stages(shard, order)[stage] for m in (done.model, afresh, before))
                if stage < int(done.model.alive[shard, order]):
                    assert same(ours, again)
                    assert same(ours, old)
                else:
                    assert empty(ours)
                    assert not same(again, old)
    inputs = collect(data)["x"][:7]
    with torch.no_grad():
        answers = [done.model.stages(0, 0)[1](inputs), done.model.stages(1, 1)[1](inputs)]
        assert torch.equal(done.model(inputs), merge(answers, "probabilities"))


def test_requests_one_by_one_until_nobody_can_answer() -> None:
    """The model keeps to the structure, request by request; the request that would end the service is refused."""
    found, data = tiny("classification"), everything()
    model, expected = trained(epochs=1.0), Sequences.whole(SHARDS, SLICES, BUDGET)
    ids = data.ids[torch.randperm(len(data), generator=Key(5).generator())].tolist()
    gone: list[int] = []
    for one in ids:
        shard, number = place(torch.tensor([one]), SHARDS, SLICES)[0].tolist()
        expected.delete(shard, number)
        request = asked(data.without(gone), [one])
        if not expected.in_service:
            with pytest.raises(Refused, match="train anew"):
                unlearn(model, request, task=found.task, method=s3t(epochs=1.0))
            break
        gone.append(one)
        model = unlearn(model, request, task=found.task, method=s3t(epochs=1.0)).model
        assert model.alive.tolist() == expected.alive
    assert gone
    assert not expected.in_service
    together = unlearn(trained(epochs=1.0), asked(data, gone), task=found.task, method=s3t(epochs=1.0)).model
    assert same(together, model)


def test_saved_and_read_back(tmp_path: Path) -> None:
    found, data = tiny("classification"), everything()
    before = trained(together="votes")
    save_weights(before, tmp_path / "weights.safetensors")
    blank = Sequenced(found.make(1), SHARDS, SLICES, BUDGET, "outputs", 0).eval()
    again = load_weights(blank, tmp_path / "weights.safetensors")
    request, how = asked(data, members(data, 0, 1)[:2]), s3t(together="votes")
    one, two = (unlearn(m, request, task=found.task, method=how).model for m in (before, again))
    assert same(one, two)
    for model in (before, found.model):
        folder = tmp_path / type(model).__name__
        first = unlearn(model, request, task=found.task, method=how, out=folder)
        assert same(unlearn(model, request, task=found.task, method=how, out=folder).model, first.model)


def test_weights_given_are_the_start_only_where_they_are_asked_for() -> None:
    """With start="given" and no training every stage is the network; fresh weights depend on the seed alone."""
    found = tiny("classification")
    given = trained(start="given", epochs=0.0)
    assert all(same(network, found.model) for s in range(2) for b in range(2) for network in given.stages(s, b))
    fresh = trained(epochs=0.0)
    assert not same(fresh.stages(0, 0)[0], found.model)
    assert same(fresh.stages(0, 0)[0], fresh.stages(0, 1)[2])
    assert not same(fresh.stages(0, 0)[0], fresh.stages(1, 0)[0])


def test_an_odd_network_stays_odd_and_frozen_weights_stay() -> None:
    found = odd()
    done = unlearn(found.model, found.request, task=found.task, method=s3t(epochs=1.0))
    for network in done.model.stages(1, 1):  # type: ignore[union-attr, operator]
        assert network.mirror.weight is network.mix.weight
        assert network.again is network.shared
        assert torch.equal(network.head.bias, found.model.head.bias)
    assert all(bool(torch.isfinite(value).all()) for value in done.model.parameters())


def test_refusals() -> None:
    found, data = tiny("classification"), everything()
    with pytest.raises(Refused, match="scope leaves some out"):
        unlearn(found.model, found.request, task=found.task, method=s3t(), scope=["0.*"])
    with pytest.raises(Refused, match="other settings"):
        unlearn(trained(), asked(data, [1]), task=found.task, method=s3t(lr=1e-4))
    with pytest.raises(Refused, match="fewer shards or slices"):
        unlearn(found.model, found.request, task=found.task, method=s3t(shards=20))
    with pytest.raises(Refused, match="budget"):
        unlearn(found.model, found.request, task=found.task, method=s3t(budget=4))
    with pytest.raises(Refused, match="retain"):
        unlearn(trained(), replace(found.request, retain=None), task=found.task, method=s3t())
    with pytest.raises(RunFailed, match="no shard"):
        Sequenced(found.model, 2, 2, 1, "votes", 0)(collect(data)["x"][:2])


BMS = {
    (0.4, 0.3, 0.2, 0.1): [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]],
    (0.05, 0.3, 0.15, 0.1, 0.4): [[0, 3, 2, 1, 4], [1, 4, 0, 2, 3], [2, 1, 4, 3, 0], [3, 0, 1, 4, 2], [4, 2, 3, 0, 1]],
    (0.02, 0.03, 0.05, 0.01, 0.04, 0.06): [
        [0, 3, 1, 4, 5, 2],
        [1, 4, 2, 5, 3, 0],
        [2, 5, 0, 3, 1, 4],
        [3, 0, 4, 1, 2, 5],
        [4, 1, 5, 2, 0, 3],
        [5, 2, 3, 0, 4, 1],
    ],
}
"""Risks of slices -> orders by ``bms_selection`` of brcsomnath/S3T @ 3ecb73b (src/sequence_selection.py)."""


@pytest.mark.parametrize("risks", list(BMS))
def test_matched_orders_are_those_of_the_authors_code(risks: tuple[float, ...]) -> None:
    assert sorted(matched(risks, len(risks))) == BMS[risks]
    best = matched(risks, 2)
    assert best == matched(risks, len(risks))[:2]
    assert best[0][0] == min(range(len(risks)), key=lambda k: risks[k])
    for wrong in ((-0.1, 0.5), (0.7, 0.6)):
        with pytest.raises(Refused, match="risks"):
            matched(wrong, 1)


def test_matched_orders_outlive_cyclic_ones_where_risks_are_unlike() -> None:
    """Requests drawn by risk; the mean length of the longest prefix left after ten of them, over 2,000 runs."""
    risks = (0.5, 0.02, 0.4, 0.05, 0.03)
    drawn = torch.multinomial(torch.tensor(risks), 20_000, True, generator=Key(1).generator()).view(2000, 10).tolist()
    length = {}
    for name, orders in (("cyclic", rotations(5, 2)), ("matched", matched(risks, 2))):
        total = 0
        for requests in drawn:
            sequences = Sequences.whole(1, 5, 2, orders)
            for number in requests:
                sequences.delete(0, number)
            total += max(sequences.alive[0])
        length[name] = total / 2000
    assert length["matched"] > length["cyclic"] + 0.3


@pytest.mark.parametrize("changes", [{"risks": (0.7, 0.1, 0.2)}, {"rank": 2, "start": "given"}], ids=["risks", "rank"])
def test_orders_by_risk_and_adapters_delete_exactly(changes: dict[str, Any]) -> None:
    """After a deletion what serves is what training on the other slices gives, to the bit; slices by a column."""
    found, data = tiny("classification"), everything()
    data = data.annotate("slice", torch.arange(len(data)) % SLICES)
    method, network = s3t(epochs=1.0, **changes), found.make(3).eval()
    whole = train_shards(network, data, found.task, method)
    assert whole.orders.tolist() == (
        matched(changes["risks"], BUDGET) if "risks" in changes else rotations(SLICES, BUDGET)
    )
    gone = [int(i) for i in data.ids[torch.arange(len(data)) % SLICES == 0][:1]]
    left = unlearn(whole, asked(data, gone), task=found.task, method=method).model
    hit, served = int(place(torch.tensor(gone), SHARDS, SLICES)[0, 0]), left.sequences.serving()
    assert all(0 not in left.orders[order][: stage + 1].tolist() for shard, order, stage in served if shard == hit)
    batch = collect(data)
    batch["x"][torch.isin(data.ids, torch.tensor(gone))] += 1.0  # another example in its place
    other = as_data({"x": batch["x"], "y": batch["y"]}, ids=data.ids).annotate("slice", data.columns["slice"])
    again = train_shards(network, other, found.task, method)
    for shard, order, stage in served:
        assert same(left.stages(shard, order)[stage], again.stages(shard, order)[stage])
    if "rank" in changes:
        first, start = whole.stages(0, 0)[0], network
        moved = [n for n, p in first.named_parameters() if not torch.equal(p, start.get_parameter(n))]
        assert moved == ["5.weight", "7.weight"]
        change = first.get_parameter("5.weight") - start.get_parameter("5.weight")
        assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= 2


def test_risks_and_slices_out_of_range_are_refused() -> None:
    found, data = tiny("classification"), everything()
    with pytest.raises(Refused, match="2 numbers for 3 slices"):
        s3t(risks=(0.5, 0.5))
    wrong = data.annotate("slice", torch.arange(len(data)))
    with pytest.raises(Refused, match="column 'slice'"):
        train_shards(found.make(3), wrong, found.task, s3t())
