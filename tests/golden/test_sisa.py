"""SISA against loops written out here, and against its own training on the retain data: to the bit, for any deleted ids."""

from __future__ import annotations

import copy
import hashlib
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
from expunge.descend import _Run
from expunge.shards import Sharded, merge, place, train_shards, untrained
from tests.fixtures import odd, tiny

SHARDS, SLICES = 3, 4


def sisa(**changes: Any) -> Any:
    settings = {"shards": SHARDS, "slices": SLICES, "epochs": 5.0, "lr": 5e-3, **changes}
    return registry.methods()["sisa"].build(**settings)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = state(a), state(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def everything() -> Data:
    """Forget and retain data of the tiny classifier in one."""
    found = tiny("classification").request
    parts = [collect(data) for data in (found.forget, found.retain)]
    return as_data({n: torch.cat([p[n] for p in parts]) for n in ("x", "y")}, ids=torch.cat([p["id"] for p in parts]))


def asked(data: Data, ids: list[int]) -> Request:
    """A request to forget these ids; the rest in an order of its own."""
    rest = data.without(ids)
    shuffled = rest.select(torch.randperm(len(rest), generator=Key(1).generator()))
    return Request(
        forget=data.select(torch.nonzero(torch.isin(data.ids, torch.tensor(ids))).flatten()), retain=shuffled
    )


def trained(**changes: Any) -> Sharded:
    found = tiny("classification")
    return train_shards(found.model, everything(), found.task, sisa(**changes), seed=3)


def in_slices(data: Data) -> dict[tuple[int, int], list[int]]:
    """(shard, slice) -> ids, placed by hand."""
    found: dict[tuple[int, int], list[int]] = {}
    for i in data.ids.tolist():
        digest = hashlib.blake2b(b"shard" + i.to_bytes(8, "little", signed=True), digest_size=8).digest()
        number = int.from_bytes(digest, "big")
        found.setdefault((number % SHARDS, (number // SHARDS) % SLICES), []).append(i)
    return found


def test_placement_depends_on_the_id_alone() -> None:
    """The fixed places may never change, or models of before are lost."""
    fixed = place(torch.tensor([0, 7, 99, 12, 2**40, -5]), 5, 6).tolist()
    assert fixed == [[3, 5], [4, 4], [0, 0], [0, 3], [1, 3], [4, 5]]
    data = everything()
    by_hand = {i: place_ for place_, ids in in_slices(data).items() for i in ids}
    assert [tuple(row) for row in place(data.ids, SHARDS, SLICES).tolist()] == [by_hand[i] for i in data.ids.tolist()]
    many = place(torch.arange(30_000), 5, 6)
    counts = torch.bincount(many[:, 0] * 6 + many[:, 1], minlength=30).double()
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 58.3  # chi squared of 29 degrees: 1 in 1,000
    assert torch.equal(many[[7, 99, 12]], place(torch.tensor([7, 99, 12]), 5, 6))


@pytest.mark.parametrize("which", ["one", "one shard, two slices", "several shards", "a whole shard"])
def test_deletion_is_training_without_the_ids(which: str) -> None:
    found, data = tiny("classification"), everything()
    slices = in_slices(data)
    ids = {
        "one": slices[1, 2][:1],
        "one shard, two slices": [slices[2, 1][0], slices[2, 3][0]],
        "several shards": [slices[0, 3][0], slices[1, 0][0], slices[2, 2][-1]],
        "a whole shard": [i for (shard, _), ids in slices.items() if shard == 1 for i in ids],
    }[which]
    request = asked(data, ids)
    before = trained()
    kept = copy.deepcopy(before)
    done = unlearn(before, request, task=found.task, method=sisa(), seed=77)
    afresh = train_shards(found.make(9).eval(), data.without(ids), found.task, sisa(), seed=3)
    assert same(done.model, afresh)
    assert same(before, kept), "the caller's model moved"
    assert not same(done.model, before)


def test_only_what_saw_the_ids_is_trained_again() -> None:
    """Stages before the first slice with a deleted id stay to the bit; rows are those of the stages after it."""
    found, data = tiny("classification"), everything()
    slices = in_slices(data)
    before = trained()
    done = unlearn(before, asked(data, [slices[1, 2][0]]), task=found.task, method=sisa())
    for shard in range(SHARDS):
        for number in range(SLICES):
            unchanged = same(before.stages(shard)[number], done.model.stages(shard)[number])  # type: ignore[union-attr]
            assert unchanged == (shard != 1 or number < 2)
    rows = 0
    for number in (2, 3):
        seen = sum(len(slices[1, k]) for k in range(number + 1)) - 1
        size = min(16, seen)
        rows += math.ceil(2 * 5.0 / (SLICES + 1) * math.ceil(seen / size)) * size
    assert done.record["cost"]["forward"] == done.record["cost"]["backward"] == rows
    assert any("1 of 3 shards changed: 2 of 12 slices" in note for note in done.notes)


def test_each_stage_is_a_loop_over_all_slices_so_far() -> None:
    """Plain gradient descent on whole batches, written out: SGD without momentum, 2 epochs / (slices + 1) per slice."""
    found, data = tiny("classification"), everything()
    model = trained(optimizer="sgd", momentum=0.0, lr=0.1, batch=1000, epochs=10.0)
    slices, table = in_slices(data), collect(data)
    for shard in range(SHARDS):
        network = untrained(found.model, Key(int(model.seed)).at("shard", shard).at("weights"), None).train()
        seen: list[int] = []
        for number in range(SLICES):
            seen += slices[shard, number]
            rows = torch.isin(table["id"], torch.tensor(seen))
            for _ in range(4):
                loss = nn.functional.cross_entropy(network(table["x"][rows]), table["y"][rows])
                grads = torch.autograd.grad(loss, list(network.parameters()))
                with torch.no_grad():
                    for parameter, grad in zip(network.parameters(), grads, strict=True):
                        parameter -= 0.1 * grad
            for ours, theirs in zip(model.stages(shard)[number].parameters(), network.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_answers_are_put_together_by_the_rule() -> None:
    answers = [torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[math.log(4.0), 0.0]]), torch.tensor([[1.0, 1.5]])]
    last = 1 / (1 + math.exp(0.5))
    first = (0.25 + 0.8 + last) / 3
    torch.testing.assert_close(merge(answers, "probabilities").exp(), torch.tensor([[first, 1 - first]]))
    torch.testing.assert_close(
        merge(answers, "outputs"), torch.tensor([[(math.log(4.0) + 1) / 3, (math.log(3.0) + 1.5) / 3]])
    )
    torch.testing.assert_close(merge(answers, "votes").exp(), torch.tensor([[1.5 / 4, 2.5 / 4]]))
    nested = merge([{"logits": (a, a)} for a in answers], "votes")
    assert torch.equal(nested["logits"][1], merge(answers, "votes"))
    with pytest.raises(Refused, match="expected tensors"):
        merge(["text", "text"], "votes")


@pytest.mark.parametrize("together", ["probabilities", "outputs", "votes"])
def test_the_model_answers_as_its_last_stages_do(together: str) -> None:
    found, data = tiny("classification"), everything()
    model = trained(together=together)
    inputs = collect(data)["x"][:9]
    with torch.no_grad():
        members = [model.stages(shard)[-1](inputs) for shard in range(SHARDS)]
        assert torch.equal(model(inputs), merge(members, together))
    assert model.rule == together
    assert model.stages(0)[-1](inputs).shape == model(inputs).shape == (9, found.task.classes)


def test_a_change_of_data_or_settings_is_noticed() -> None:
    """The same id with another label, and another learning rate: as if it had been trained so from the start."""
    found, data = tiny("classification"), everything()
    table = collect(data)
    row = int(torch.nonzero(table["id"] == in_slices(data)[0, 3][0]).flatten())
    labels = table["y"].clone()
    labels[row] = (labels[row] + 1) % 5
    changed = as_data({"x": table["x"], "y": labels}, ids=table["id"])
    request = asked(changed, in_slices(data)[2, 3][:1])
    done = unlearn(trained(), request, task=found.task, method=sisa())
    assert same(done.model, train_shards(found.model, request.retain, found.task, sisa(), seed=3))
    assert any("2 of 3 shards changed: 2 of 12" in note for note in done.notes)
    other = unlearn(trained(), request, task=found.task, method=sisa(lr=1e-3))
    assert same(other.model, train_shards(found.model, request.retain, found.task, sisa(lr=1e-3), seed=3))
    assert any("12 of 12 slices" in note for note in other.notes)


def test_the_ledger_travels_with_the_weights(tmp_path: Path) -> None:
    """Saved and read back, the model still knows what to retrain; a finished run is read back as it ended."""
    found, data = tiny("classification"), everything()
    before = trained(together="votes")
    save_weights(before, tmp_path / "weights.safetensors")
    blank = Sharded(found.make(1), SHARDS, SLICES, "outputs", 0).eval()
    again = load_weights(blank, tmp_path / "weights.safetensors")
    request, how = asked(data, in_slices(data)[0, 1][:2]), sisa(together="votes")
    one, two = (unlearn(m, request, task=found.task, method=how) for m in (before, again))
    assert same(one.model, two.model)
    assert two.record["cost"]["forward"] == one.record["cost"]["forward"] > 0
    for model in (before, found.model):
        folder = tmp_path / type(model).__name__
        first = unlearn(model, request, task=found.task, method=how, out=folder)
        assert same(unlearn(model, request, task=found.task, method=how, out=folder).model, first.model)


def test_a_deletion_that_was_killed_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second stage that is trained again, of two shards."""
    found, data = tiny("classification"), everything()
    slices = in_slices(data)
    request = asked(data, [slices[0, 2][0], slices[2, 3][0]])
    whole = unlearn(trained(), request, task=found.task, method=sisa())
    steps, step = 0, _Run._step

    def stepping(run: _Run) -> None:
        nonlocal steps
        step(run)
        steps += 1
        if steps == len(whole.record["history"]) - 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Run, "_step", stepping)
    with pytest.raises(KeyboardInterrupt):
        unlearn(trained(), request, task=found.task, method=sisa(), out=tmp_path / "run", every=0.0)
    monkeypatch.setattr(_Run, "_step", step)
    resumed = unlearn(trained(), request, task=found.task, method=sisa(), out=tmp_path / "run", every=0.0)
    assert same(resumed.model, whole.model)
    assert resumed.record["history"] == whole.record["history"]
    assert resumed.record["cost"]["forward"] == whole.record["cost"]["forward"]


def test_shards_without_examples_do_not_serve() -> None:
    found, data = tiny("classification"), everything()
    gone = [i for (shard, _), ids in in_slices(data).items() if shard == 1 for i in ids]
    left = unlearn(trained(), asked(data, gone), task=found.task, method=sisa()).model
    assert left.served.tolist() == [1, 0, 1]  # type: ignore[union-attr]
    inputs = collect(data)["x"][:5]
    members = [left.stages(shard)[-1](inputs) for shard in (0, 2)]  # type: ignore[union-attr]
    assert torch.equal(left(inputs), merge(members, "probabilities"))
    with pytest.raises(RunFailed, match="no shard"):
        Sharded(found.model, 2, 2, "votes", 0)(inputs)


def test_an_odd_network_stays_odd_and_frozen_weights_stay() -> None:
    """BatchNorm, dict output, two inputs, tied and shared layers, one frozen bias; and a single example in a slice."""
    found = odd()
    done = unlearn(found.model, found.request, task=found.task, method=sisa(slices=8, epochs=2.0))
    for shard in range(SHARDS):
        member = done.model.stages(shard)[-1]  # type: ignore[union-attr]
        assert member.mirror.weight is member.mix.weight
        assert member.again is member.shared
        assert torch.equal(member.head.bias, found.model.head.bias)
        assert not member.head.bias.requires_grad
    assert any("frozen" in note for note in done.notes)
    for parameter in found.model.parameters():
        parameter.requires_grad_(True)
    live = unlearn(found.model, found.request, task=found.task, method=sisa(slices=8, epochs=2.0)).model
    assert not torch.equal(live.stages(0)[-1].norm.running_mean, found.model.norm.running_mean)  # type: ignore[union-attr]
    assert all(bool(torch.isfinite(p).all()) for p in live.parameters())


def test_refusals() -> None:
    found = tiny("classification")
    with pytest.raises(Refused, match="scope leaves some out"):
        unlearn(found.model, found.request, task=found.task, method=sisa(), scope=["0.*"])
    with pytest.raises(Refused, match="shards"):
        sisa(shards=0)
    with pytest.raises(Refused, match="expected shards and slices"):
        Sharded(found.model, 2, 2, "most", 0)
    with pytest.raises(Refused, match="trains shards"):
        train_shards(found.model, everything(), found.task, registry.methods()["retrain"].build(epochs=0.0))
    with pytest.raises(Refused, match="retain"):
        unlearn(trained(), replace(found.request, retain=None), task=found.task, method=sisa())
