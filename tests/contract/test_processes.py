"""Two processes equal one: every combiner, data parallel and under FSDP2 with uneven shards, masks and fillers.

This file is also the program of the two processes: ``python test_processes.py RANK FOLDER``. One start of two processes
walks through everything, and a process that hangs is ended by its time limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge import Classification, Descend, RunFailed, Scope, registry, runtime, split, unlearn
from expunge.combine import OfMeans, OneSidedProjection, Weighted
from expunge.compose import SAM, Alternate, Clip, Turn, ZerothOrder
from expunge.core import Case, Refused
from expunge.curvature import mean_gradient
from expunge.descend import Guard
from expunge.implicit import ImplicitSurgery
from expunge.journal import load_tree, save_tree
from expunge.objectives import EWC, L1, NLL, NPO, Distill, Norm, SimNPO
from expunge.optim import SGD, AdamW
from expunge.oracle import prepared, sum_gradient
from expunge.scope import edit
from expunge.weights import load_weights, save_weights
from expunge.zeroth import Coordinates

pytestmark = pytest.mark.slow

LIMIT = 150.0  # seconds for both processes together, on two slow cores
TOLERANCE = 1e-6
TASK = Classification(classes=3)


class Uneven(nn.Module):
    """33 rows and 1 row on two processes: 17 and 16, 1 and none."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.gate = nn.Linear(5, 33), nn.Linear(33, 3), nn.Linear(33, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return self.head(hidden) * (1 + torch.tanh(self.gate(hidden)))


def model() -> Uneven:
    built = Uneven()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return built


def request(weighted: bool = True) -> Any:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(60, 5, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    columns = {"x": x, "y": y, "weight": torch.rand(60, generator=generator) + 0.1} if weighted else {"x": x, "y": y}
    return split(columns, forget=list(range(20)))


def scope_of(net: nn.Module) -> Scope:
    """Masked, whole, and frozen parameters."""
    masks: dict[str, bool | Tensor] = {"head.weight": True, "head.bias": True, "gate.bias": True}
    generator = torch.Generator().manual_seed(5)
    for name in ("body.weight", "gate.weight"):
        masks[name] = torch.rand(net.get_parameter(name).shape, generator=generator) < 0.6
    return Scope(masks, tuple(name for name, _ in net.named_parameters()))


def combiners() -> dict[str, Any]:
    """Every registered combiner: with its defaults where it has them, else as here."""
    turns = Alternate((Turn(("forget",), 1, "head.*"), Turn(("retain",), 2, None, Weighted())))
    shaped = {
        "Alternate": {"turns": turns},
        "OfMeans": {"tanh": OfMeans(lambda losses: torch.tanh(losses["forget"]) + losses["retain"].log())},
        "ImplicitSurgery": {form: ImplicitSurgery(form=form, start=0.5) for form in ("log", "raw", "paper")},
        "SAM": {"projection": SAM(OneSidedProjection()), "along": SAM(Weighted(), along=("forget",))},
        "Clip": {"projection": Clip(OneSidedProjection(), 0.05), "wide": Clip(Weighted(), 1e6)},
        "ZerothOrder": {"directions": ZerothOrder(Weighted(), mu=0.5, directions=3)},
        "Coordinates": {"few": Coordinates(Weighted(), mu=0.5, count=6, queries=2)},
    }
    cases: dict[str, Any] = {}
    for name, kind in registry.parts("combiners").items():
        if name == "Turn":  # no combiner
            continue
        for label, combiner in shaped.get(name, {"": None}).items():
            cases[f"{name} {label}".strip()] = kind() if combiner is None else combiner
    return cases


def plans() -> dict[str, Descend]:
    """What is run: each combiner split in pieces, then optimizers, references, penalties and the guard."""
    forget, retain = SimNPO(), NLL()
    common: dict[str, Any] = {"steps": 3, "batch": 9, "accumulate": 3}
    found = {
        f"combine {name}": Descend(forget, retain, combine=combiner, optimizer=SGD(0.05, 0.9, 0.01), **common)
        for name, combiner in combiners().items()
    }
    weights = {
        name: torch.rand(p.shape, generator=torch.Generator().manual_seed(6)) for name, p in model().named_parameters()
    }
    anchor = {name: p.detach() for name, p in model().named_parameters()}
    found |= {
        "adamw": Descend(
            forget, retain, combine=Clip(OneSidedProjection()), optimizer=AdamW(0.01, weight_decay=0.1), **common
        ),
        "teacher": Descend(NPO(), Distill(), optimizer=SGD(0.05), **common),
        "whole": Descend(forget, retain, optimizer=SGD(0.05), steps=3, batch=9, guard=Guard(checks=3), watch=1),
        "one row": Descend(forget, retain, optimizer=SGD(0.05), steps=2, batch=1),
        "stopped": Descend(
            SimNPO(beta=0.1), optimizer=SGD(0.05), steps=12, batch=9, guard=Guard(rise=0.05, checks=12, patience=1)
        ),
        "penalties": Descend(
            forget,
            retain,
            others={"sparse": L1(), "size": Norm(), "near": EWC(weights, anchor)},
            combine=Weighted({"sparse": 0.01, "size": 0.01}),
            optimizer=SGD(0.05),
            **common,
        ),
    }
    return found


def without(kind: str) -> set[str]:
    """Plans that are refused there: those that need second derivatives, of sharded parameters."""
    return {"combine GradientRestriction"} if kind == "fsdp" else set()


def outcome_of(
    plan: Descend, shard: Callable[[nn.Module], nn.Module] | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Final weights, losses and notes of one plan, all whole."""
    net = model()
    done = unlearn(net, request(), task=TASK, method=plan, scope=scope_of(net), shard=shard, out=out)
    weights = {name: runtime.whole(p.detach()).clone() for name, p in done.model.named_parameters()}
    rows = [{name: value for name, value in row.items() if name.startswith("loss/")} for row in done.record["history"]]
    return {"weights": weights, "history": rows, "notes": len(done.notes), "rows": done.record["cost"]["backward"]}


def fsdp(net: nn.Module) -> nn.Module:
    """Two inner groups and the outermost one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (runtime.world(),))
    fully_shard(net.body, mesh=mesh)
    fully_shard(net.head, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def refusals(shard: Callable[[nn.Module], nn.Module] | None) -> list[str]:
    """Kinds of errors that every process must raise alike, none of them waiting for another."""
    net = model()
    frozen = Scope.match(net, "unused.*")
    seen = []
    cases: list[tuple[type[Exception], dict[str, Any]]] = [
        (RunFailed, {"method": Descend(retain=NLL(), steps=1), "scope": frozen}),
        (RunFailed, {"method": Descend(retain=NLL(), steps=1, combine=OneSidedProjection()), "scope": frozen}),
        (RunFailed, {"method": Descend(SimNPO(), NLL(), steps=1, combine=OneSidedProjection()), "scope": frozen}),
        (RunFailed, {"method": Descend(retain=NLL(), steps=20, optimizer=SGD(1e38))}),
        (Refused, {"method": Descend(retain=NLL(), steps=1, norm_stats="live")}),
        (Refused, {"method": Descend(retain=NLL(), steps=1), "seed": runtime.rank()}),
        (RunFailed, {"method": plans()["combine GradientRestriction"]}),
    ]
    for number, (kind, settings) in enumerate(cases):
        try:
            unlearn(net, request(), task=TASK, shard=shard, **settings)
        except kind as error:
            seen.append(f"{number} {type(error).__name__}")
        except Exception as error:  # reported to the test, which compares
            seen.append(f"{number} unexpected {error!r}")
    return seen


def pieces_of_runtime(shard: Callable[[nn.Module], nn.Module] | None, folder: Path) -> dict[str, Any]:
    """The functions of runtime and scope on their own, on sharded tensors where there is a shard function."""
    net = runtime.reshard(shard(model())) if shard else model()
    case = Case(net, request(), TASK, scope_of(net))
    named = dict(net.named_parameters())
    scores = {name: p.detach().abs() for name, p in named.items()}
    other = {name: runtime.shard_like(torch.full(tuple(p.shape), 0.5), p) for name, p in named.items()}
    top = Scope.top(scores, 0.3, tuple(named))
    both = scope_of(net) & top
    either = top | scope_of(net)
    gradient = sum_gradient(case, NLL(), next(prepared(case, case.request.retain, 7, case.rng)))
    mean = mean_gradient(case, case.request.retain, NLL(), 7, case.rng)
    damaged = {name: p.detach().clone() for name, p in named.items()}
    if runtime.rank() == runtime.world() - 1:
        runtime.local(damaged["body.weight"])[-1] = torch.nan
    found = {
        "dot": runtime.dot({n: p.detach() for n, p in named.items()}, other),
        "level": runtime.threshold(scores, 0.3),
        "count": both.count(net),
        "either": either.count(net),
        "finite": runtime.finite(named),
        "damaged": runtime.finite(damaged) if shard or runtime.world() == 1 else False,
        "gradient": {n: runtime.whole(g).clone() for n, g in gradient.items()},
        "mean": {n: runtime.whole(g).clone() for n, g in mean.items()},
        "sum": runtime.batch_sum(torch.full((6 // runtime.world(),), 0.25)),
    }
    edit(case, {"body.weight": torch.full((33, 5), 2.0), "unused.weight": torch.zeros(2, 2)})
    found["edited"] = runtime.whole(net.body.weight.detach()).clone()
    with torch.no_grad():
        TASK.nll(net, case.request.retain.batch(torch.arange(3)))
    found["kept sharded"] = all(runtime.sharded(p) == bool(shard) for p in net.parameters())
    save_weights(net, folder / f"{'fsdp' if shard else 'plain'}{runtime.world()}.safetensors")
    again = runtime.reshard(shard(Uneven())) if shard else Uneven()
    load_weights(again, folder / f"{'fsdp' if shard else 'plain'}{runtime.world()}.safetensors")
    found["loaded"] = {name: runtime.whole(p.detach()).clone() for name, p in again.named_parameters()}
    return found


def everything(folder: Path) -> dict[str, Any]:
    """All of it in this process and its partners, by kind of distribution."""
    kinds: dict[str, Any] = {"plain": None, "fsdp": fsdp} if runtime.world() > 1 else {"plain": None}
    results: dict[str, Any] = {}
    for kind, shard in kinds.items():
        results[kind] = {
            f"run {name}": outcome_of(plan, shard) for name, plan in plans().items() if name not in without(kind)
        }
        results[kind]["refusals"] = refusals(shard)
        results[kind]["pieces"] = pieces_of_runtime(shard, folder)
        out = folder / f"run-{kind}-{runtime.world()}"
        results[kind]["written"] = outcome_of(plans()["adamw"], shard, out)
        results[kind]["read"] = outcome_of(plans()["adamw"], shard, out)
    return results


def work(rank: int, folder: Path) -> None:
    """One of the two processes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    save_tree(folder / f"rank{rank}.safetensors", everything(folder))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reference: one process."""
    return everything(tmp_path_factory.mktemp("one"))["plain"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    source = str(Path(registry.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=LIMIT)[0] for process in started]
    except subprocess.TimeoutExpired:
        pytest.fail(f"two processes hang: nothing after {LIMIT:g} seconds")
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-3000:] for text in said)
    return [load_tree(folder / f"rank{rank}.safetensors") for rank in range(2)]


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


KINDS = ("plain", "fsdp")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(plans()))
def test_two_processes_equal_one(kind: str, name: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    if name in without(kind):
        pytest.skip("needs second derivatives, which sharded parameters do not have: they are refused, as below")
    expected = one[f"run {name}"]
    start, masks = dict(model().named_parameters()), scope_of(model()).masks
    assert apart(expected["weights"], {n: p.detach() for n, p in start.items()}) > 1e-4, "nothing was trained: no test"
    for found in (rank[kind][f"run {name}"] for rank in two):
        assert apart(found["weights"], expected["weights"]) < TOLERANCE
        assert len(found["history"]) == len(expected["history"])
        for row, wanted in zip(found["history"], expected["history"], strict=True):
            assert row == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        assert found["notes"] == expected["notes"]
        for parameter, value in found["weights"].items():
            mask = masks.get(parameter, torch.tensor(False))
            moved = value != start[parameter]
            assert not bool((moved & ~torch.as_tensor(mask)).any()), f"{parameter} moved outside the scope"
    assert apart(two[0][kind][f"run {name}"]["weights"], two[1][kind][f"run {name}"]["weights"]) == 0


def test_guard_stops_both_processes_at_the_same_step(one: dict[str, Any]) -> None:
    """The plan called "stopped" is a test of agreement only if it stops early."""
    assert len(one["run stopped"]["history"]) < 12


def test_every_combiner_is_run() -> None:
    run = {name.split()[0] for name in combiners()}
    assert run == set(registry.parts("combiners")) - {"Turn"}


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_raised_by_every_process(kind: str, two: list[dict[str, Any]]) -> None:
    wanted = ["0 RunFailed", "1 RunFailed", "2 RunFailed", "3 Diverged", "4 Refused", "5 Refused"]
    wanted += ["6 RunFailed"] if without(kind) else []
    assert [rank[kind]["refusals"] for rank in two] == [wanted, wanted]


def test_no_gradient_is_refused_in_one_process(one: dict[str, Any]) -> None:
    assert one["refusals"][:4] == ["0 RunFailed", "1 RunFailed", "2 RunFailed", "3 Diverged"]


@pytest.mark.parametrize("kind", KINDS)
def test_functions_of_runtime_and_scope(kind: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    expected = one["pieces"]
    for found in (rank[kind]["pieces"] for rank in two):
        assert found["dot"] == pytest.approx(expected["dot"], rel=1e-12)
        for exact in ("level", "count", "either", "finite", "damaged", "sum", "kept sharded"):
            assert found[exact] == expected[exact], exact
        assert apart(found["gradient"], expected["gradient"]) < 1e-5
        assert apart(found["mean"], expected["mean"]) < 1e-6
        assert torch.equal(found["edited"], expected["edited"])
        assert apart(found["loaded"], expected["loaded"]) == 0
    assert expected["finite"]
    assert not expected["damaged"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_folder_is_written_once_and_read_by_all(
    kind: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    for found in (rank[kind] for rank in two):
        assert apart(found["written"]["weights"], found["read"]["weights"]) == 0
        assert apart(found["written"]["weights"], one["written"]["weights"]) < TOLERANCE


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
