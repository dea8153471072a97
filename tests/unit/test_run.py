"""``unlearn`` and weights files, as a newcomer meets them: wrong kinds of arguments, odd state dicts, data that draw."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import expunge
from expunge import Classification, Descend, Refused, RunFailed, load_weights, methods, save_weights, split, unlearn
from expunge.meter import Meter
from expunge.objectives import L1, NLL
from expunge.optim import SGD
from expunge.scope import Scope

TASK = Classification(3)
STEPS = Descend(retain=NLL(), optimizer=SGD(0.1), steps=4, batch=8)


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def arrays() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


class Augmented:
    """Draws from all three global streams, as data sets with augmentation do."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = arrays()
        noise = 0.1 * torch.randn(4) + float(np.random.rand())
        return {"x": x[index] + noise, "y": np.int64(y[index]), "file": f"{index}.png"}


def test_a_data_set_that_augments_is_repeatable_and_resumable(tmp_path: Path, poisoned_randomness: Any) -> None:
    request = split(DataLoader(Augmented(), shuffle=True), forget=[1, 2, 3])  # type: ignore[arg-type]
    runs = [
        unlearn(model(), request, task=TASK, method=STEPS, out=out) for out in (None, tmp_path / "a", tmp_path / "a")
    ]
    assert len({done.record["result"] for done in runs}) == 1
    first, again = (request.retain.batch(torch.arange(n))["x"] for n in (8, 9))  # type: ignore[union-attr]
    assert not torch.equal(first, again[:8]), "another batch is augmented in another way"


def test_a_data_set_that_cannot_be_read_is_not_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    class Breaks(Augmented):
        reads = 0

        def __getitem__(self, index: int) -> dict[str, Any]:
            Breaks.reads += 1
            if Breaks.reads > 150:
                raise FileNotFoundError(2, "No such file", "picture.png")
            return super().__getitem__(index)

    with pytest.raises(FileNotFoundError, match=r"picture\.png"):
        unlearn(model(), split(Breaks(), forget=[1]), task=TASK, method=methods.finetune(), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"method": methods.salun}, r"call it, methods\.salun\(\)"),
        ({"request": arrays()}, "request is a tuple"),
        ({"task": Classification}, "task is the class Classification"),
        ({"model": {"state": 1}}, "model is a dict"),
        (
            {"scope": Scope({"0.weight": torch.ones(3, 3, dtype=torch.bool)}, ("0.weight",))},
            r"expected torch.bool of shape \(8, 4\)",
        ),
        ({"scope": Scope({"nowhere": True}, ("nowhere",))}, "nowhere"),
    ],
)
def test_arguments_of_a_wrong_kind(changed: dict[str, Any], word: str) -> None:
    good = {"model": model(), "request": split(arrays(), forget=[1]), "task": TASK, "method": STEPS}
    with pytest.raises(Refused, match=word):
        unlearn(**{**good, **changed})


def test_a_stage_that_forgets_to_return_its_case() -> None:
    with pytest.raises(RunFailed, match="the stage returned a NoneType"):
        unlearn(model(), split(arrays(), forget=[1]), task=TASK, method=lambda case: None)  # type: ignore[arg-type,return-value]


def test_a_finished_run_without_a_copy_is_read_into_the_model_itself(tmp_path: Path) -> None:
    request = split(arrays(), forget=[1])
    done = unlearn(model(), request, task=TASK, method=STEPS, out=tmp_path, copy=False)
    given = model()
    again = unlearn(given, request, task=TASK, method=STEPS, out=tmp_path, copy=False)
    assert again.model is given
    assert torch.equal(weights(given), weights(done.model))


def test_weights_that_sum_to_nothing_are_refused() -> None:
    request = split(arrays(), forget=[1])
    retain = request.retain.annotate("weight", torch.zeros(39))  # type: ignore[union-attr]
    with pytest.raises(Refused, match="sum to 0"):
        unlearn(model(), type(request)(request.forget, retain), task=TASK, method="finetune")


def test_the_seconds_before_a_kill_are_in_the_checkpoint() -> None:
    meter = Meter()
    with meter.timed():
        time.sleep(0.02)
        state = meter.state()
    assert state["seconds"] >= 0.02
    later = Meter()
    with later.timed():
        later.load({**state, "seconds": 100.0})
    assert 100.0 < later.seconds < 100.02


def test_an_l1_norm_of_half_precision_weights_does_not_overflow() -> None:
    large = nn.Sequential(nn.Linear(4, 3)).half()
    with torch.no_grad():
        large[0].weight.fill_(3e4)
        large[0].bias.fill_(0)
    x, y = arrays()
    penalty = Descend(others={"size": L1()}, optimizer=SGD(1.0, 0.0), steps=1)
    small = (x.half() * 1e-4, y)
    done = unlearn(large, split(small, forget=[1]), task=TASK, method=penalty)
    assert done.record["history"][0]["loss/size"] == pytest.approx(3.6e5, rel=1e-3)


class Named(nn.Module):
    """A model whose own attribute is called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


class Temporary(nn.Module):
    """A buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("table", torch.ones(2), persistent=False)


class Shared(nn.Module):
    """A layer with buffers in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(2)
        self.second = self.first


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("kind", [Named, Temporary, Shared, Tied])
@pytest.mark.parametrize("change", ["as saved", "of DataParallel", "an alias only"])
def test_state_dicts_of_every_shape_are_read(kind: type[nn.Module], change: str, tmp_path: Path) -> None:
    net = kind()
    with torch.no_grad():
        for value in net.parameters():
            value.fill_(3.0)
    state = dict(net.state_dict())
    if change == "of DataParallel":
        state = {f"module.{name}": value for name, value in state.items()}
    if change == "an alias only" and kind is Tied:
        del state["first.weight"]
    torch.save(state, tmp_path / "w.pt")
    save_weights(net, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        assert set(weights(load_weights(kind(), tmp_path / name)).tolist()) == {3.0}


def test_a_model_that_keeps_more_than_tensors_in_its_state(tmp_path: Path) -> None:
    class Counts(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: Any) -> None:
            """Nothing to do."""

    with torch.random.fork_rng():
        net = Counts(4, 3)
    for number, stage in enumerate((methods.retrain(epochs=1), methods.bad_teacher(steps=2), STEPS)):
        done = unlearn(net, split(arrays(), forget=[1]), task=TASK, method=stage, out=tmp_path / str(number))
    assert not torch.equal(weights(done.model), weights(net))


class Counting(torch.nn.Module):
    """Counts its calls in a buffer, in place and by a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("again", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.again = self.again + 1
        return self.inner(x)


def test_a_look_at_the_callers_model_leaves_its_buffers_alone() -> None:
    model = Counting()
    data = expunge.as_data((torch.randn(8, 2), torch.arange(8) % 2))
    request = expunge.split(data, forget=[0, 1])
    outcome = expunge.unlearn(model, request, task=expunge.Classification(2), method=expunge.methods.finetune(steps=1))
    expunge.audit(expunge.Subject(model, outcome.model, request, expunge.Classification(2)))
    assert model.calls == model.again == 0


def test_a_run_in_pieces_is_the_same_run() -> None:
    net = model().double()
    request = split((arrays()[0].double(), arrays()[1]), forget=list(range(12)))
    one, three = (
        unlearn(net, request, task=TASK, method=methods.grad_diff(steps=3, batch=12), pieces=pieces)
        for pieces in (1, 3)
    )
    assert [one.record["pieces"], three.record["pieces"]] == [1, 3]
    torch.testing.assert_close(weights(three.model), weights(one.model), atol=1e-10, rtol=0)
    assert not torch.equal(weights(net), weights(one.model))


def test_the_passes_of_a_run_in_pieces_are_smaller() -> None:
    net, seen = model(), []
    net[0].register_forward_hook(lambda _, args, __: seen.append((torch.is_grad_enabled(), len(args[0]))))
    request = split(arrays(), forget=list(range(12)))
    for pieces, most in ((1, 12), (3, 4)):
        seen.clear()
        unlearn(net, request, task=TASK, method=methods.grad_diff(steps=2, batch=12), copy=False, pieces=pieces)
        assert max(rows for graph, rows in seen if graph) == most


@pytest.mark.parametrize("pieces", [0, -1, 1.5, True, "2"])
def test_pieces_out_of_range(pieces: Any) -> None:
    with pytest.raises(Refused, match="pieces must be a whole number of at least 1"):
        unlearn(model(), split(arrays(), forget=[1]), task=TASK, method=STEPS, pieces=pieces)


def test_live_normalisation_in_pieces_is_refused() -> None:
    live = methods.grad_diff(steps=1, norm_stats="live")
    with pytest.raises(Refused, match=r"or a run in pieces"):
        unlearn(model(), split(arrays(), forget=[1]), task=TASK, method=live, pieces=2)
