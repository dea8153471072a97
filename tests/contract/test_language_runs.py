"""Every method for language models: the same update however a batch is cut, for one process or two, whole or sharded,
and the same bits after a kill; on a tiny Llama and texts of unequal lengths, in an adapter too.

This file is also the program of the two processes: ``python test_language_runs.py RANK FOLDER``. One start of two
processes walks through all methods.
"""

from __future__ import annotations

import copy
import functools
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge import CausalLM, Outcome, Request, descend, registry, runtime, unlearn
from expunge.core import Data, Stage
from expunge.data.text import Texts
from expunge.journal import load_tree, save_tree
from expunge.oracle import Oracle
from expunge.tasks.causal_lm import IGNORED
from expunge.wrap import LoRA, in_adapter
from tests.contract.test_methods import contract
from tests.contract.test_resume import Killed, Killer, assert_same
from tests.fixtures import END, given, tiny

pytestmark = pytest.mark.slow

LIMIT = 600.0  # seconds until two processes count as hanging: half a minute on idle cores, far more on shared ones
TIGHT = 1e-5  # of the largest change of any weight, in float64: at most 1e-7 of the weights, and 1e-12 for most methods
METHODS = {name: spec for name, spec in registry.methods().items() if "causal_lm" in spec.tasks}
SMALL = {"steps": 2, "epochs": 1, "batch": 6, "forget_batch": 4, "samples": 7, "retain_steps": 2}
SHARDED = ("npo", "grad_diff", "simnpo", "idk_dpo", "surgery", "undial", "task_vector")
"""Run under FSDP2 as well: a teacher, two roles, a drawn answer, gradients apart, logits of a teacher, an edit."""


def ragged(data: Data, count: int) -> Data:
    """The first examples as texts of their own lengths, padded to the longest of each batch."""
    batch = data.batch(torch.arange(count))
    rows = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        size = int(mask.sum())
        rows.append((ids[:size].tolist(), int((labels[:size] == IGNORED).sum())))
    return Data(Texts(rows, END), torch.arange(count), data.ids[:count])


@functools.cache
def _setting() -> tuple[nn.Module, Request, CausalLM]:
    found = tiny("causal_lm")
    request = Request(ragged(found.request.forget, 8), ragged(found.request.retain, 13))
    assert isinstance(found.task, CausalLM)
    return found.model.double(), request, found.task


def method(name: str) -> Stage:
    """Few steps on small batches that the data are no multiple of."""
    spec = METHODS[name]
    return spec.build(**{setting: SMALL[setting] for setting in spec.settings() if setting in SMALL})


def run(name: str, stage: Stage | None = None, **settings: Any) -> Outcome:
    """The method, or a stage around it, on the tiny model."""
    model, request, task = _setting()
    request = given(METHODS[name].needs, request, task)
    return unlearn(copy.deepcopy(model), request, task=task, method=stage or method(name), seed=4, **settings)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, whole, and what the model says of the examples to forget."""
    _, request, task = _setting()
    with torch.no_grad():
        said = task.outputs(model, request.data("forget").batch(torch.arange(5)))
    tensors = {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_floating_point()}
    return {**{name: runtime.whole(t.detach()).clone() for name, t in tensors.items()}, "said": said}


def found_of(done: Outcome) -> dict[str, Any]:
    return {"state": state(done.model), "history": done.record["history"]}


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of what both have."""
    return max(float((a[name] - b[name]).abs().max()) for name in a.keys() & b.keys() if a[name].numel())


@functools.cache
def whole(name: str) -> dict[str, Any]:
    """What the method does in one process with whole batches: the reference of every comparison here."""
    return found_of(run(name))


def compare(found: dict[str, Any], name: str) -> None:
    """Weights within the tolerance, recorded losses alike."""
    expected = whole(name)
    change = apart(expected["state"], state(_setting()[0]))
    assert change > 1e-5, "nothing was trained: no test"
    assert found["state"].keys() == expected["state"].keys()
    assert apart(found["state"], expected["state"]) < TIGHT * change
    assert len(found["history"]) == len(expected["history"])
    for row, wanted in zip(found["history"], expected["history"], strict=True):
        losses = {key: value for key, value in wanted.items() if key.startswith("loss/")}
        assert {key: row[key] for key in losses} == pytest.approx(losses, rel=1e-6, abs=1e-9)


class CutIn(Oracle):
    """An oracle that cuts each role's batch into so many pieces, whatever the plan says."""

    parts = 1

    def __init__(self, *parts: Any, **settings: Any):
        super().__init__(*parts, **{**settings, "accumulate": self.parts})


@pytest.mark.parametrize("pieces", [2, 5])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_update_however_a_batch_is_cut(name: str, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and losses of float64 runs, batches whole and in pieces of unequal lengths."""
    whole(name)
    monkeypatch.setattr(CutIn, "parts", pieces)
    monkeypatch.setattr(descend, "Oracle", CutIn)
    spec = METHODS[name]
    done = run(name, spec.build(**_few(spec, chunk=pieces)) if "chunk" in spec.settings() else None)
    with contract(spec, "cuts", "causal_lm"):
        compare(found_of(done), name)


def _few(spec: registry.Method, **changes: Any) -> dict[str, Any]:
    return {setting: SMALL[setting] for setting in spec.settings() if setting in SMALL} | changes


# One process or two


def fsdp(reshard: bool) -> Callable[[nn.Module], nn.Module]:
    """Each block a group and the rest another; weights gathered for each pass (ZeRO-3) or kept until the backward pass
    is through (ZeRO-2)."""

    def shard(model: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (runtime.world(),))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)

    return shard


KINDS: dict[str, Callable[[nn.Module], nn.Module] | None] = {"plain": None, "zero3": fsdp(True), "zero2": fsdp(False)}
CASES = [(kind, name) for kind in KINDS for name in (METHODS if kind == "plain" else SHARDED)]


def everything() -> dict[str, Any]:
    """All runs of one process of several, by kind of distribution and method."""
    found: dict[str, Any] = {}
    for kind, name in CASES:
        sys.stdout.write(f"{kind} {name}\n")  # shown where the processes hang
        sys.stdout.flush()
        try:
            found[f"{kind} {name}"] = found_of(run(name, shard=KINDS[kind]))
        except Exception:  # for its own test to tell, so that one method does not silence the others
            found[f"{kind} {name}"] = {"failed": traceback.format_exc()[-2000:]}
    return found


def work(rank: int, folder: Path) -> None:
    """One of the two processes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    save_tree(folder / f"rank{rank}.safetensors", everything())
    dist.barrier()
    dist.destroy_process_group()


def started(program: list[str], **changes: str) -> subprocess.Popen[str]:
    """A Python process with this project's sources and one thread."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(Path(registry.__file__).parents[1]), str(root)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **changes}
    return subprocess.Popen(
        [sys.executable, *program], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    both = [started([__file__, str(rank), str(folder)]) for rank in range(2)]
    try:
        said = [process.communicate(timeout=LIMIT)[0] for process in both]
    except subprocess.TimeoutExpired:
        pytest.fail(f"two processes hang: nothing after {LIMIT:g} seconds")
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(text[-3000:] for text in said)
    return [load_tree(folder / f"rank{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[" ".join(case) for case in CASES])
def test_two_processes_equal_one(kind: str, name: str, two: list[dict[str, Any]]) -> None:
    """The same bits in both, and the weights and losses of one process up to rounding."""
    first, second = (rank[f"{kind} {name}"] for rank in two)
    with contract(METHODS[name], "processes", "causal_lm"):
        for found in (first, second):
            assert "failed" not in found, found["failed"]
    assert apart(first["state"], second["state"]) == 0
    with contract(METHODS[name], "cuts", "causal_lm"):
        compare(first, name)


# Killed and started again


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Killer]:
    yield Killer(monkeypatch)
    monkeypatch.undo()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_resumes_to_the_bit(name: str, adapter: bool, killer: Killer, tmp_path: Path) -> None:
    """Killed at a drawn moment: in a step, in a write, between the two; every step is written."""

    def stage() -> Stage:
        return in_adapter(LoRA(2), method(name)) if adapter else method(name)

    with contract(METHODS[name], "adapter" if adapter else "resumes", "causal_lm"):
        undisturbed = run(name, stage())
    draw = random.Random(f"{name} {adapter}")
    for last in (16, 8, 4):  # a method without steps has few moments at which it can be killed
        out = tmp_path / str(last)
        killer.armed = draw.randint(last // 2 + 1, last)
        try:
            run(name, stage(), out=out, every=0.0)
        except Killed:
            killer.armed = -1
            assert_same(run(name, stage(), out=out, every=0.0), undisturbed)
            return
    pytest.fail("the run was never killed: no test")


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
