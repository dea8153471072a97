"""A run killed anywhere and started again ends in the same bits, and no half-written file is ever read.

This file is also a program: ``python test_resume.py FOLDER SEED`` starts processes of the same run and kills them.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge import Classification, Descend, Guard, Refused, chain, edit, journal, registry, split, unlearn
from expunge.compose import Alternate, Turn
from expunge.core import Case, Stage
from expunge.descend import _Run
from expunge.implicit import ImplicitSurgery
from expunge.objectives import NLL, Distill, RandomLabel, SimNPO
from expunge.optim import SGD, Adam, AdamW, Cosine
from expunge.run import Outcome
from expunge.saliency import Saliency
from expunge.version import revision

TASK = Classification(classes=3)


class Killed(BaseException):
    """Not an Exception, so that nothing in the library may catch it: the nearest thing to a killed process."""


def model(width: int = 8) -> nn.Module:
    built = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3))
    built.register_buffer("seen", torch.zeros(2), persistent=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return built


def request() -> Any:
    generator = torch.Generator().manual_seed(2)
    data = (torch.randn(40, 4, generator=generator), torch.randint(0, 3, (40,), generator=generator))
    return split(data, forget=list(range(12)))


def noise(case: Case) -> Case:
    """A plain function that knows nothing of resuming: draws, moves a buffer, freezes, adds a column, a teacher."""
    key, rng = case.rng.take()
    generator = key.generator()
    case = edit(
        case,
        {n: p + 0.05 * torch.randn(p.shape, generator=generator) for n, p in case.scope.parameters(case.model).items()},
    )
    case.model.seen.add_(torch.randn(2, generator=generator))
    case.model[1].bias.requires_grad_(False)
    forget = case.request.forget.annotate("weight", torch.rand(len(case.request.forget), generator=generator))
    teachers = {**case.teachers, "noisy": copy.deepcopy(case.model)}
    return replace(case, request=replace(case.request, forget=forget), teachers=teachers, rng=rng)


def surgery(case: Case) -> Case:
    """A plain function with two Descends in it and a draw between them."""
    first = Descend(
        SimNPO(), NLL(), combine=ImplicitSurgery(), optimizer=Adam(0.01), steps=2, batch=6, guard=Guard(checks=2)
    )
    case = first(case)
    key, rng = case.rng.take()
    case = replace(case, rng=rng)
    case = edit(
        case, {"0.weight": case.model[0].weight.detach() * (1 + 0.01 * torch.rand((), generator=key.generator()))}
    )
    return first(case)


def widen(case: Case) -> Case:
    """Change the model's structure by hand: no boundary can be written until it is changed back."""
    case.model.add_module("extra", nn.Identity())
    case.model.extra.register_parameter("scale", nn.Parameter(torch.full((3,), 1.5)))
    case.model.extra.forward = lambda x: x * case.model.extra.scale
    names = (*case.scope.universe, "extra.scale")
    return replace(case, scope=replace(case.scope, masks={**case.scope.masks, "extra.scale": True}, universe=names))


def narrow(case: Case) -> Case:
    """Merge and drop what ``widen`` added."""
    scale = case.model.extra.scale.detach()
    case = edit(case, {"3.weight": case.model[3].weight.detach() * scale[:, None]})
    del case.model.extra
    masks = {name: mask for name, mask in case.scope.masks.items() if name != "extra.scale"}
    return replace(case, scope=replace(case.scope, masks=masks, universe=case.scope.universe[:-1]))


def long_chain() -> Stage:
    live = Descend(
        RandomLabel(), NLL(), optimizer=SGD(0.05, 0.9, 0.01), steps=3, batch=8, norm_stats="live", schedule=Cosine()
    )
    turns = Alternate((Turn(("forget",), 1), Turn(("retain",), 2)))
    return chain(
        Saliency(0.5),
        live,
        chain(noise, surgery),
        Descend(
            RandomLabel(), Distill("noisy"), combine=turns, optimizer=AdamW(0.01, weight_decay=0.1), steps=3, batch=5
        ),
    )


def structural_chain() -> Stage:
    step = Descend(RandomLabel(), NLL(), optimizer=AdamW(0.01), steps=2, batch=8)
    return chain(step, widen, step, narrow, step)


CHAINS: dict[str, Callable[[], Stage]] = {"long": long_chain, "structural": structural_chain}


def run(stage: Stage, out: Path | None, every: float = 0.0) -> Outcome:
    return unlearn(model(), request(), task=TASK, method=stage, seed=5, out=out, every=every)


def bits(done: Outcome) -> dict[str, Tensor]:
    return {**dict(done.model.named_parameters()), **dict(done.model.named_buffers())}


def assert_same(a: Outcome, b: Outcome) -> None:
    """The same weights, buffers, price and history, to the bit."""
    one, other = bits(a), bits(b)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), f"{name} differs after resuming"
    flags = [{name: p.requires_grad for name, p in done.model.named_parameters()} for done in (a, b)]
    assert flags[0] == flags[1], "what is trainable differs after resuming"
    assert a.record["history"] == b.record["history"]
    assert a.record["notes"] == b.record["notes"]
    counted = ("forward", "backward", "checks")
    assert [a.record["cost"][n] for n in counted] == [b.record["cost"][n] for n in counted]


class Killer:
    """Counts the moments at which a process may die, and dies at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count, self.at = 0, -1
        step, fsync, rename = _Run._step, os.fsync, os.replace

        def stepping(run: _Run) -> None:
            self.moment()
            step(run)
            self.moment()

        def flushing(descriptor: int) -> None:
            self.moment()
            fsync(descriptor)

        def renaming(source: Any, target: Any) -> None:
            self.moment()
            rename(source, target)
            self.moment()

        monkeypatch.setattr(_Run, "_step", stepping)
        monkeypatch.setattr(journal.os, "fsync", flushing)
        monkeypatch.setattr(journal.os, "replace", renaming)

    def moment(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise Killed

    @property
    def armed(self) -> int:
        return self.at

    @armed.setter
    def armed(self, at: int) -> None:
        self.count, self.at = 0, at


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Killer]:
    yield Killer(monkeypatch)
    monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("every", [0.0, 1e9], ids=["each step written", "stage entries written"])
@pytest.mark.parametrize("name", list(CHAINS))
def test_killed_at_every_moment(name: str, every: float, killer: Killer, tmp_path: Path) -> None:
    undisturbed = run(CHAINS[name](), None)
    killer.armed = -1
    assert_same(run(CHAINS[name](), tmp_path / "whole", every), undisturbed)
    moments = killer.count
    assert moments > 20
    for at in range(1, moments + 1):
        out = tmp_path / str(at)
        killer.armed = at
        with pytest.raises(Killed):
            run(CHAINS[name](), out, every)
        killer.armed = -1
        resumed = run(CHAINS[name](), out, every)
        if at < moments - 4:  # afterwards the record may already have been written
            assert_same(resumed, undisturbed)
        else:
            assert all(torch.equal(value, bits(undisturbed)[name]) for name, value in resumed.model.named_parameters())


def test_killed_again_and_again(killer: Killer, tmp_path: Path) -> None:
    undisturbed = run(long_chain(), None)
    draw, out = random.Random(3), tmp_path / "run"
    for _ in range(30):
        killer.armed = draw.randint(1, 12)
        try:
            resumed = run(long_chain(), out)
        except Killed:
            continue
        assert_same(resumed, undisturbed)
        return
    pytest.fail(
        "thirty lives of at most twelve moments each did not finish the run: it does not go on from where it was"
    )


def test_resuming_spends_no_step_twice(killer: Killer, tmp_path: Path) -> None:
    """With a checkpoint at each step, a run killed in its last stage repeats at most one step."""
    killer.armed = -1
    run(long_chain(), tmp_path / "whole")
    moments = killer.count
    killer.armed = moments - 10
    with pytest.raises(Killed):
        run(long_chain(), tmp_path / "killed")
    killer.armed = -1
    run(long_chain(), tmp_path / "killed")
    assert killer.count < 20 < moments


def test_finished_run_is_returned_without_work(tmp_path: Path, killer: Killer) -> None:
    done = run(long_chain(), tmp_path)
    killer.armed = 1  # the first step or write would raise
    again = run(long_chain(), tmp_path)
    assert all(torch.equal(value, bits(done)[name]) for name, value in again.model.named_parameters())
    assert again.record == json.loads(json.dumps(done.record))
    assert again.case is None


def test_a_function_is_the_same_run_in_another_process(tmp_path: Path, killer: Killer) -> None:
    """A function prints itself with its address, which is another one in every process."""

    def built() -> Stage:
        return chain(lambda case: case, lambda case: noise(case), Descend(retain=NLL(), steps=3, batch=4))

    first, second = built(), built()
    assert repr(first) != repr(second)
    killer.armed = 12
    with pytest.raises(Killed):
        run(first, tmp_path)
    killer.armed = -1
    assert_same(run(second, tmp_path), run(built(), None))


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    stage = Descend(retain=NLL(), steps=2, batch=4)
    unlearn(model(), request(), task=TASK, method=stage, out=tmp_path)
    other = model()
    with torch.no_grad():
        other[0].weight[0, 0] += 1.0
    changes: list[tuple[str, dict[str, Any]]] = [
        ("seed", {"seed": 1}),
        ("settings", {"method": Descend(retain=NLL(), steps=3, batch=4)}),
        ("weights", {"model": other}),
        ("scope", {"scope": ["0.*"]}),
        ("data", {"request": split((torch.zeros(9, 4), torch.zeros(9).long()), forget=[1])}),
    ]
    for word, change in changes:
        call = {"model": model(), "request": request(), "task": TASK, "method": stage, **change}
        with pytest.raises(Refused, match=f"holds another run.*{word}"):
            unlearn(call.pop("model"), call.pop("request"), out=tmp_path, **call)


def test_leftovers_are_harmless_and_strangers_refused(tmp_path: Path, killer: Killer) -> None:
    undisturbed = run(long_chain(), None)
    out = tmp_path / "run"
    killer.armed = 30
    with pytest.raises(Killed):
        run(long_chain(), out)
    killer.armed = -1
    for folder in (out, out / "checkpoint"):
        for name in ("boundary.safetensors", "inside-1-1.safetensors", "record.json", "weights.safetensors"):
            (folder / f".{name}.123.tmp").write_bytes(b"half")
    assert_same(run(long_chain(), out), undisturbed)
    assert not list(out.rglob("*.tmp")), "leftovers stay behind"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(Refused, match="not empty"):
        run(long_chain(), tmp_path / "mine")


def test_a_damaged_checkpoint_is_refused_in_one_sentence(tmp_path: Path, killer: Killer) -> None:
    killer.armed = 40
    with pytest.raises(Killed):
        run(long_chain(), tmp_path)
    killer.armed = -1
    path = tmp_path / "checkpoint" / "boundary.safetensors"
    content = path.read_bytes()
    for damage in (content[:-7], content[:20], b"", content[:100] + b"\0" * 50 + content[150:]):
        path.write_bytes(damage)
        with pytest.raises(Refused, match="not a whole checkpoint"):
            run(long_chain(), tmp_path)


def test_round_trip_of_a_nest() -> None:
    tree = {
        "a": [1, 2.5, None, True, "x", (torch.arange(3), float("inf"))],
        3: {"b": torch.zeros(0, 2)},
        "t": torch.tensor(7),
    }
    plain, tensors = journal.pack(tree)
    back = journal.unpack(json.loads(json.dumps(plain)), tensors)
    assert back["a"][:5] == tree["a"][:5]
    assert isinstance(back["a"][5], tuple)
    assert back["a"][5][1] == float("inf")
    assert torch.equal(back["a"][5][0], torch.arange(3))
    assert back[3]["b"].shape == (0, 2)
    assert back["t"].ndim == 0
    with pytest.raises(TypeError, match="checkpoint holds"):
        journal.pack({"f": object()})


def killed_run(folder: Path, out: Path) -> None:
    """The work of one child process."""
    stage = chain(
        Saliency(0.5),
        Descend(RandomLabel(), NLL(), optimizer=SGD(0.05, 0.9), steps=15, batch=8),
        Descend(SimNPO(), NLL(), combine=ImplicitSurgery(), optimizer=AdamW(0.01), steps=15, batch=8),
    )
    done = unlearn(model(64), request(), task=TASK, method=stage, seed=5, out=out, every=0.0)
    journal.save_tree(folder / f"{out.name}.result", {n: p.detach() for n, p in done.model.named_parameters()})


def child(work: Callable[[], None]) -> int:
    """Fork a process that does the work and nothing else; its number."""
    number = os.fork()
    if number:
        return number
    try:
        work()
        os._exit(0)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(1)


def killed_in_flight(folder: Path, number: int, moment: float) -> Path | None:
    """Start a run and kill it after `moment` seconds, earlier where the machine was faster than that; its folder."""
    out = folder / f"run{number}"
    for _ in range(8):
        process = child(lambda: killed_run(folder, out))
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(process, 0)[1]):
            return out
        shutil.rmtree(out)
        moment *= 0.7
    return None


def kill_twenty_times(folder: Path, seed: int) -> None:
    """Twenty runs, each killed at a random moment and started again; what was seen goes to a file."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    revision()  # asked once, for all children
    killed_run(folder, folder / "undisturbed")  # here, so that everything is imported before a child is made
    started = time.monotonic()
    os.waitpid(child(lambda: killed_run(folder, folder / "timed")), 0)
    length = time.monotonic() - started
    seen: dict[str, Any] = {"length": length, "killed": 0, "leftovers": 0, "statuses": [], "files": 0}
    for number in range(20):
        out = killed_in_flight(folder, number, length * (0.05 + 0.8 * draw.random()))
        seen["killed"] += out is not None
        out = out or folder / f"run{number}"
        seen["leftovers"] += len(list(out.rglob(".*.tmp")))
        for path in out.glob("checkpoint/*.safetensors"):
            journal.load_tree(path)  # whole, or this process fails
            seen["files"] += 1
        seen["statuses"].append(
            os.waitstatus_to_exitcode(os.waitpid(child(lambda out=out: killed_run(folder, out)), 0)[1])
        )  # type: ignore[misc]
    (folder / "seen.json").write_text(json.dumps(seen))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks its processes")
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(registry.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    program = subprocess.run(
        [sys.executable, __file__, str(tmp_path), "11"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert program.returncode == 0, program.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["statuses"] == [0] * 20, program.stderr[-3000:]
    assert seen["killed"] == 20, f"only {seen['killed']} of 20 were killed before they finished: no test"
    assert seen["files"] > 0
    expected = journal.load_tree(tmp_path / "undisturbed.result")
    for number in range(20):
        found = journal.load_tree(tmp_path / f"run{number}.result")
        assert all(torch.equal(found[name], value) for name, value in expected.items()), f"run {number} differs"


if __name__ == "__main__":
    kill_twenty_times(Path(sys.argv[1]), int(sys.argv[2]))
