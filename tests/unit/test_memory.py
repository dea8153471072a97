"""Padding costs nothing, pieces of like length, checkpoints without copies, and predictions beside what was measured."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import expunge as ex
from expunge import guard
from expunge.combine import Weighted
from expunge.core import Case, Key
from expunge.descend import Descend, Guard
from expunge.objectives import NLL, NPO
from expunge.optim import SGD, Adam, AdamW
from expunge.oracle import differentiable, positions
from expunge.predict import Live, size_of
from expunge.stream import chunks
from expunge.token_objectives import CEU, TNPO, UNDIAL
from tests.fixtures import seeded, sentences, tiny, tokens

TASK = ex.CausalLM(40, refusals=((39, 38, 1),))


class Seen:
    """What went into a model and through its output layer."""

    def __init__(self, model: nn.Module):
        self.places: list[tuple[int, int]] = []
        self.rows: list[int] = []
        model.register_forward_pre_hook(self._inputs, with_kwargs=True)
        model.lm_head.register_forward_pre_hook(self._head)

    def _inputs(self, _module: nn.Module, _args: Any, named: dict[str, Tensor]) -> None:
        self.places.append(tuple(named["input_ids"].shape))

    def _head(self, _module: nn.Module, args: tuple[Tensor]) -> None:
        self.rows.append(args[0].shape[:-1].numel())


def batch_of(width: int, rows: int = 7) -> dict[str, Any]:
    return {**tokens(sentences()[:rows], width), "id": torch.arange(rows)}


def test_padding_of_the_whole_batch_never_reaches_the_model_and_prompts_not_the_vocabulary() -> None:
    model = tiny("causal_lm").model
    batch = batch_of(30)
    seen = Seen(model)
    longest, answers = int(batch["attention_mask"].sum(1).max()), int((batch["labels"] != -100).sum())
    with torch.no_grad():
        for ask in (TASK.nll, TASK.token_nll, TASK.token_statistics):
            ask(model, batch)
    assert seen.places == [(7, longest)] * 3
    assert seen.rows == [answers] * 3
    assert TASK.logits(model, batch).shape == (7, 29, 40)
    assert seen.places[3] == (7, longest)
    assert seen.rows[3] == 7 * longest


def test_values_and_gradients_are_those_of_every_row_of_logits() -> None:
    """Loss, statistics, divergence and their gradients against the whole [b, T, V] of logits, padded and not."""
    model, teacher = tiny("causal_lm").model.double(), tiny("causal_lm", "random").model.double()
    batch = batch_of(20)
    labels = TASK.labels(batch)
    judged = labels != -100
    whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logs = whole.log_softmax(-1)
    each = -logs.gather(2, labels.clamp_min(0)[:, :, None]).squeeze(2) * judged
    torch.testing.assert_close(TASK.token_nll(model, batch), each, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        told = TASK.outputs(teacher, batch)
    target = told.log_softmax(-1)
    apart = ((target.exp() * (target - logs)).sum(-1) * judged).sum(1)
    torch.testing.assert_close(TASK.divergence(model, batch, told), apart, rtol=1e-8, atol=1e-10)
    for mine, other in (
        (TASK.nll(model, batch).sum(), each.sum()),
        (TASK.divergence(model, batch, told).sum(), apart.sum()),
    ):
        grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in (mine, other)]
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


def test_a_model_that_cannot_leave_rows_out_is_asked_for_all() -> None:
    found = tiny("causal_lm")

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = found.model

        def forward(self, **named: Any) -> Any:
            assert "logits_to_keep" not in named
            return self.inner(**named)

    called = replace(TASK, call=lambda model, batch: model(batch["input_ids"], batch["attention_mask"]).logits)
    batch = batch_of(16)
    with torch.no_grad():
        expected = TASK.nll(found.model, batch)
        torch.testing.assert_close(TASK.nll(Wrapper(), batch), expected)
        torch.testing.assert_close(called.nll(found.model, batch), expected)


@pytest.mark.parametrize("objective", [NPO(0.3), TNPO(), CEU(), UNDIAL()], ids=lambda one: type(one).__name__)
def test_any_split_of_padded_data_gives_the_same_update(objective: Any) -> None:
    """Pieces are cut by length, each is padded to its own longest: the weights after three steps agree to rounding."""
    found = tiny("causal_lm")
    results = []
    for accumulate in (1, 2, 5):
        plan = Descend(objective, NLL(), optimizer=SGD(0.05), steps=3, batch=10, accumulate=accumulate)
        model = copy.deepcopy(found.model).double()
        results.append(ex.unlearn(model, found.request, task=found.task, method=plan).model)
    for other in results[1:]:
        for one, two in zip(results[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_pieces_are_padded_to_their_own_longest() -> None:
    found = tiny("causal_lm")
    model = copy.deepcopy(found.model)
    seen = Seen(model)
    plan = Descend(retain=NLL(), optimizer=SGD(0.0, 0.0), steps=1, batch=20, accumulate=4)
    ex.unlearn(model, found.request, task=found.task, method=plan, copy=False)
    data = found.request.retain
    key, _ = Key(0).take()
    lengths = found.task.lengths(data.batch(positions(key.at("order", "retain"), len(data), 20, 0))).sort().values
    assert seen.places[1:] == [(5, int(part.max())) for part in lengths.split(5)]
    assert len({width for _, width in seen.places[1:]}) > 1, "all pieces are as long: no test"


@pytest.mark.parametrize(("size", "batch"), [(20, 5), (23, 5), (7, 7), (9, 4), (3, 8)])
def test_buckets_are_every_example_once_an_epoch_and_of_like_length(size: int, batch: int) -> None:
    lengths = torch.randint(5, 100, (size,), generator=Key(1).generator())
    batch = min(batch, size)
    stream = torch.cat([positions(Key(4), size, batch, index, lengths) for index in range(4 * size)])
    for epoch in range(3):
        assert stream[epoch * size : (epoch + 1) * size].sort().values.tolist() == list(range(size))
    again = positions(Key(4), size, batch, 3, lengths)
    assert torch.equal(again, stream[3 * batch : 4 * batch]), "a batch is a function of its number"
    if size == 20:
        widths = [lengths[part].max() - lengths[part].min() for part in stream[: 3 * size].split(batch)]
        plain = torch.cat([positions(Key(4), size, batch, index) for index in range(12)])
        assert sum(widths) < 0.6 * sum(lengths[part].max() - lengths[part].min() for part in plain.split(batch))
        epochs = [stream[epoch * size : (epoch + 1) * size].tolist() for epoch in range(3)]
        assert epochs[0] != epochs[1] != epochs[2]


def test_buckets_need_lengths_and_change_only_the_order() -> None:
    found, other = tiny("causal_lm"), tiny("classification")
    plan = Descend(NPO(), NLL(), optimizer=SGD(0.01), steps=4, batch=5, order="bucketed")
    first, again = (ex.unlearn(found.model, found.request, task=found.task, method=plan) for _ in range(2))
    assert first.record["result"] == again.record["result"]
    plain = ex.unlearn(found.model, found.request, task=found.task, method=replace(plan, order="shuffled"))
    assert plain.record["result"] != first.record["result"]
    with pytest.raises(ex.Refused, match="order='bucketed' needs examples with a length"):
        ex.unlearn(other.model, other.request, task=other.task, method=plan)
    with pytest.raises(ex.Refused, match="order must be 'shuffled' or 'bucketed'"):
        ex.unlearn(found.model, found.request, task=found.task, method=replace(plan, order="sorted"))


def test_a_stream_is_a_safetensors_file(tmp_path: Path) -> None:
    """Every type, shapes without entries, views and shared memory; other readers read it."""
    base = torch.arange(12.0).reshape(3, 4)
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool)
    tensors = {str(kind): base.to(kind) for kind in kinds}
    tensors |= {
        "turned": base.T,
        "part": base[1:, ::2],
        "same": base,
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(3),
        "conjugate": torch.complex(base, base + 1).conj(),
    }
    path = tmp_path / "all.safetensors"
    path.write_bytes(b"".join(bytes(part) for part in chunks(tensors, {"what": "ü"})))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    with pytest.raises(TypeError, match="complex128"):
        list(chunks({"a": torch.zeros(1, dtype=torch.complex128)}, {}))


def test_writing_a_checkpoint_copies_no_tensor(tmp_path: Path) -> None:
    from expunge.journal import load_tree, save_tree

    tree = {"weights": [torch.randn(1000, 100) for _ in range(5)]}
    with Live(tree["weights"]) as live:
        save_tree(tmp_path / "state.safetensors", tree)
    assert live.peak < 1000
    assert torch.equal(load_tree(tmp_path / "state.safetensors")["weights"][3], tree["weights"][3])


@pytest.fixture
def spilling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SPILL", -1)


def _bad_plan(guard: Guard) -> Descend:
    """Leaves its bound in a few steps."""
    return Descend(
        NPO(0.01), NLL(), combine=Weighted({"retain": 0.0}), optimizer=Adam(0.02), steps=30, batch=10, guard=guard
    )


@pytest.mark.usefixtures("spilling")
def test_a_guard_keeps_its_state_on_disk_and_puts_the_same_bits_back(tmp_path: Path) -> None:
    """The same model as with a guard that keeps a copy in memory; the file goes with the checkpoints."""
    found = tiny("causal_lm")
    plan = _bad_plan(Guard(checks=10, patience=1))
    memory = ex.unlearn(found.model, found.request, task=found.task, method=plan)
    disk = ex.unlearn(found.model, found.request, task=found.task, method=plan, out=tmp_path / "run")
    assert any("was kept" in note for note in disk.notes), disk.notes
    assert disk.notes == memory.notes
    assert disk.record["result"] == memory.record["result"]
    assert not list((tmp_path / "run").rglob("kept*"))


@pytest.mark.usefixtures("spilling")
def test_a_guard_on_disk_holds_no_second_copy(tmp_path: Path) -> None:
    """Bytes of tensors alive during the run: with and without a guard the same; in memory, one more copy."""
    model = seeded(_wide)(0)
    found = tiny("causal_lm")
    peaks = {}
    for name, watched, out in (("none", None, "a"), ("disk", Guard(checks=3), "b"), ("memory", Guard(checks=3), None)):
        plan = Descend(NPO(), NLL(), optimizer=SGD(1e-4, 0.0), steps=3, batch=2, guard=watched)
        mine = copy.deepcopy(model)
        request = replace(found.request, forget=found.request.forget.annotate("reference", torch.ones(20)))
        with Live(mine.parameters()) as live:
            folder = None if out is None else tmp_path / out
            ex.unlearn(mine, request, task=found.task, method=plan, copy=False, out=folder)
        peaks[name] = live.peak
    size = size_of(model.parameters())
    assert peaks["disk"] < peaks["none"] + 0.3 * size
    assert peaks["memory"] > peaks["none"] + 0.6 * size


def _wide() -> nn.Module:
    """A Llama of 2.6 million parameters for 40 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_live_counts_what_is_alive() -> None:
    layer = nn.Linear(100, 50)
    with Live(layer.parameters()) as live:
        x = torch.zeros(10, 100)
        assert live.now == 4000
        view = x[2:].T
        assert live.now == 4000, "a view is no memory"
        del x, view
        assert live.now == 0
        loss = layer(torch.zeros(10, 100)).sum()
        grads = torch.autograd.grad(loss, list(layer.parameters()))
        del loss
    assert live.now == size_of(grads) == 4 * (5000 + 50)
    assert live.peak >= live.now + 4 * 10 * 50


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [("tiny", SGD(1e-3)), ("tiny", SGD(1e-3, momentum=0.0)), ("tiny", AdamW(1e-3)), ("wide", AdamW(1e-3))],
    ids=["tiny-momentum", "tiny-plain", "tiny-adamw", "wide-adamw"],
)
def test_tensors_of_a_step_are_predicted(kind: str, optimizer: Any) -> None:
    """Moments to the byte but the step counters; the most that is alive within a tenth (and a few KiB) of the truth."""
    found = tiny("causal_lm")
    model = found.model if kind == "tiny" else seeded(_wide)(0)
    plan = Descend(NPO(), NLL(), optimizer=optimizer, steps=4, batch=8)
    request = replace(found.request, forget=found.request.forget.annotate("reference", torch.ones(20)))
    done = ex.unlearn(copy.deepcopy(model), request, task=found.task, method=plan, copy=False, predict=True)
    (said,) = done.record["cost"]["predicted"]
    size = size_of(model.parameters())
    expected = {"SGD": size if getattr(optimizer, "momentum", 0) else 0, "AdamW": 2 * size}[type(optimizer).__name__]
    assert said["weights"] == pytest.approx(size, rel=0.01)
    assert said["gradients"] == size
    assert said["moments"] == pytest.approx(expected, abs=8 * len(list(model.parameters())))
    with Live(model.parameters()) as live:
        ex.unlearn(model, request, task=found.task, method=plan, copy=False)
    assert live.peak == pytest.approx(said["moments"] + said["work"], rel=0.1, abs=1 << 16)


def test_a_prediction_is_recorded_beside_the_measured_and_changes_no_bit() -> None:
    """Time within a factor of three on a machine that others use, peak of the process within a tenth."""
    found = tiny("causal_lm")
    model = seeded(_wide)(0)
    plan = Descend(NPO(), NLL(), optimizer=AdamW(1e-4), steps=6, batch=8, guard=Guard(checks=2))
    plain = ex.unlearn(model, found.request, task=found.task, method=plan)
    done = ex.unlearn(model, found.request, task=found.task, method=plan, predict=True)
    assert done.record["result"] == plain.record["result"]
    assert done.record["history"] == plain.record["history"]
    cost, before = done.record["cost"], plain.record["cost"]
    assert "predicted" not in before
    assert [cost[kind] for kind in ("forward", "backward")] == [before[kind] for kind in ("forward", "backward")]
    assert cost["checks"] - before["checks"] == 2 * 3 * 8, "two trial steps of forget, teacher and retain rows"
    (said,) = cost["predicted"]
    assert said["steps"] == 6
    assert json.loads(json.dumps(said)) == said
    assert 1 / 3 < said["step_seconds"] / said["measured"]["step_seconds"] < 3
    assert said["peak_bytes"] == pytest.approx(said["measured"]["peak_bytes"], rel=0.1)


def test_a_trial_step_leaves_live_statistics_alone() -> None:
    """Train mode with BatchNorm: buffers are put back, so the run is the same to the bit."""
    found = tiny("odd")
    plan = Descend(NLL(), NLL(), optimizer=SGD(0.01), steps=3, batch=10, norm_stats="live")
    runs = [
        ex.unlearn(found.model, found.request, task=found.task, method=plan, predict=flag) for flag in (False, True)
    ]
    assert runs[0].record["result"] == runs[1].record["result"]


def test_memory_of_a_padded_batch_is_that_of_its_tokens() -> None:
    """Four times the padding: not a byte more where losses are computed; without trimming it was four times as much."""
    found = tiny("causal_lm")
    peaks = []
    for width in (0, 60):
        batch = batch_of(width, rows=16)
        case = Case(found.model, found.request, found.task, ex.Scope.all(found.model))
        with differentiable(case), Live([*found.model.parameters(), *batch.values()]) as live:
            loss = found.task.nll(found.model, batch).sum()
            torch.autograd.grad(loss, list(found.model.parameters()))
        peaks.append(live.peak)
    assert peaks[1] < 1.1 * peaks[0]


def test_a_run_that_diverges_at_once_is_left_to_its_guard() -> None:
    """The trial step meets the same loss that is not finite: it predicts nothing and says nothing."""
    found = tiny("causal_lm")

    class Broken:
        def __call__(self, case: Case, batch: Any) -> Tensor:
            return found.task.nll(case.model, batch) * torch.nan

    plan = Descend(Broken(), NLL(), optimizer=SGD(0.01), steps=3, batch=4, guard=Guard())
    done = ex.unlearn(found.model, found.request, task=found.task, method=plan, predict=True)
    assert done.record["cost"]["predicted"] == []
    assert any("step 0 was kept" in note for note in done.notes)
