"""Peak memory and time of NPO on language models, beside its losses on the stock trainer, on the same batches.

The other side is what the benchmark's code does, written from the formula: transformers' Trainer with a second copy of
the model as reference, both students' graphs alive until one backward pass, the reference asked at every step. Both
sides take the same batches, padded to the longest of each batch, with AdamW at a constant rate and no gradient clip, in
float32, on one thread.

Memory is measured in a fresh process for each side, twice: the peak of resident memory above what the process held
before it had a model (large blocks are given back to the system at once, ``MALLOC_MMAP_THRESHOLD_``), and the most bytes
of tensors alive at one time, counted at each operation. Time is CPU time from the start of one step to that of the next,
in one process, the sides taking turns.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import expunge as ex
from expunge.combine import Weighted
from expunge.core import Data, Key, Request, Stage
from expunge.data.sources import fingerprint
from expunge.lean import DCTAdamW
from expunge.objectives import NLL, NPO
from expunge.optim import AdamW
from expunge.oracle import positions
from expunge.predict import Live
from expunge.reference import CacheReference
from expunge.version import __version__, revision
from expunge.wrap import LoRA, in_adapter

BETA, RATE, SEED = 0.1, 1e-5, 0
MEMORY_STEPS, TIME_STEPS, ROUNDS = 3, 3, 5
RESULT = Path(__file__).parent / "results" / "llm_memory.json"
TASKS = {"stories": 512, "tiny": 512, "larger": 4096}  # vocabularies


@dataclass(frozen=True)
class Work:
    """A model, what it forgets, and how many examples a step takes of each kind."""

    model: nn.Module
    task: ex.CausalLM
    request: Request
    batch: int
    timed: int


def work(name: str) -> Work:
    """The model and texts of that name; texts are random tokens: only their lengths matter here.

    Of the larger model memory is measured with few texts a step, so that weights outweigh activations, and time with
    more, so that passes through the model outweigh the optimizer's own work, which is the same on both sides.
    """
    vocab = TASKS[name]
    batch, timed, examples, longest = (4, 12, 36, 36) if name == "larger" else (8, 8, 64, 120)
    request = Request(texts(vocab, examples, longest), texts(vocab, examples, longest, 1))
    return Work(model(name), ex.CausalLM(vocab), request, batch, timed)


def texts(vocab: int, examples: int, longest: int, part: int = 0) -> Data:
    """Prompts of 4 to 12 tokens and answers of 4 to the rest, padded to the longest."""
    generator = Key(SEED).at("texts", part).generator()

    def drawn(low: int, high: int) -> list[int]:
        return torch.randint(low, high, (examples,), generator=generator).tolist()

    ids = torch.randint(3, vocab, (examples, longest), generator=generator)
    prompt, whole = drawn(4, 13), drawn(16, longest + 1)
    places = torch.arange(longest)
    real = torch.stack([places < n for n in whole])
    judged = real & torch.stack([places >= n for n in prompt])
    columns = {
        "input_ids": torch.where(real, ids, 0),
        "attention_mask": real.long(),
        "labels": torch.where(judged, ids, -100),
    }
    return ex.as_data(columns, ids=torch.arange(examples) + part * examples)


def model(name: str) -> nn.Module:
    """The 260K-parameter stories Llama, or a random Llama: of its shape, or of 57 million parameters."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if name == "stories":
        return AutoModelForCausalLM.from_pretrained(Path(os.environ["EXPUNGE_DATA"]) / "stories260K").float().eval()
    wide, inner, layers, heads = (768, 2048, 7, 12) if name == "larger" else (64, 172, 5, 8)
    config = LlamaConfig(
        vocab_size=TASKS[name],
        hidden_size=wide,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        return LlamaForCausalLM(config).eval()


class Stamps:
    """A constant schedule that notes when each step begins."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def factor(self, progress: float) -> float:
        self.at.append(time.process_time())
        return 1.0

    def __repr__(self) -> str:
        return "Constant()"


def descent(steps: int, batch: int, stamps: Stamps, **changes: Any) -> ex.Descend:
    """NPO with a retain loss of weight 1."""
    plan = ex.Descend(
        forget=NPO(BETA),
        retain=NLL(),
        combine=Weighted({"retain": 1.0}),
        optimizer=AdamW(RATE, weight_decay=0.0),
        schedule=stamps,
        steps=steps,
        batch=batch,
    )
    return replace(plan, **changes)


def stage(side: str, steps: int, batch: int, stamps: Stamps) -> Stage:
    """One of our ways to run it."""
    changes: dict[str, Any] = {
        "expunge, lean optimizer": {"optimizer": DCTAdamW(RATE, rank=64, weight_decay=0.0)},
        "expunge, two pieces": {"accumulate": 2},
        "expunge, buckets": {"order": "bucketed"},
    }.get(side, {})
    inner: Stage = descent(steps, batch, stamps, **changes)
    if side == "expunge, LoRA":
        inner = in_adapter(LoRA(8), inner)
    return ex.chain(CacheReference(batch=batch), inner)


def ours(side: str, job: Work, steps: int) -> tuple[list[float], list[float]]:
    """Loss of each step, and when each step began."""
    stamps = Stamps()
    done = ex.unlearn(
        job.model, job.request, task=job.task, method=stage(side, steps, job.batch, stamps), seed=SEED, copy=False
    )
    losses = [row["loss/forget"] + row["loss/retain"] for row in done.record["history"]]
    return losses, [*stamps.at, time.process_time()]


def batches(job: Work, steps: int) -> list[dict[str, Any]]:
    """The very batches that our loop draws, each padded to its own longest, as the benchmark's collator does."""
    key, _ = Key(SEED).take()[1].take()  # the stage after the one that caches
    found = []
    for step in range(steps):
        pair = {}
        for part, data in (("forget", job.request.data("forget")), ("retain", job.request.data("retain"))):
            batch = data.batch(positions(key.at("order", part), len(data), job.batch, step))
            width = int(batch["attention_mask"].sum(1).max())
            pair[part] = {name: batch[name][:, :width] for name in ("input_ids", "attention_mask", "labels")}
        found.append(pair)
    return found


def _summed(net: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """[b], the summed NLL of each answer."""
    logits = net(**inputs).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), inputs["labels"][:, 1:], ignore_index=-100, reduction="none").sum(1)


def stock(job: Work, steps: int) -> tuple[list[float], list[float]]:
    """The same on transformers' Trainer, with a second copy of the model."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    losses: list[float] = []
    stamps: list[float] = []

    class Peer(Trainer):
        """NPO as a trainer class."""

        def __init__(self, *args: Any, **settings: Any):
            super().__init__(*args, **settings)
            self.reference = copy.deepcopy(self.model).eval()

        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(self.train_dataset, batch_size=1, collate_fn=lambda rows: rows[0])

        def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
            now = _summed(model, inputs["forget"])
            with torch.no_grad():
                before = _summed(self.reference, inputs["forget"])
            forget = (-2.0 / BETA * F.logsigmoid(BETA * (now - before))).mean()
            loss = forget + model(**inputs["retain"]).loss
            losses.append(float(loss.detach()))
            return loss

    class Begin(TrainerCallback):
        """Notes when each step begins, and when the last one ends."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            stamps.append(time.process_time())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=RATE,
            weight_decay=0.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            seed=SEED,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its own summary
            Peer(job.model, arguments, train_dataset=batches(job, steps), callbacks=[Begin()]).train()
    return losses, stamps


STOCK = "stock Trainer, second model"
SIDES = ("expunge", "expunge, two pieces", "expunge, lean optimizer", "expunge, LoRA")
BOUNDS = {"expunge": 0.82, "expunge, LoRA": 0.35}
TIMED = ("expunge", "expunge, buckets")
TIME_BOUND = 0.9


def take(side: str, job: Work, steps: int) -> tuple[list[float], list[float]]:
    """One run of a side."""
    return stock(job, steps) if side == STOCK else ours(side, job, steps)


def own_memory(name: str, side: str) -> None:
    """In a fresh process: print what one run of a side holds at its peak, its losses, and what was predicted."""
    with quiet():
        take(side, work("tiny"), 1)  # what is imported and built at the first step is not memory of the run
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = _kib("VmRSS")
    with quiet():
        losses, _ = take(side, work(name), MEMORY_STEPS)
    resident = (_kib("VmHWM") - before) / 1024
    with quiet(), Live() as live:
        take(side, work(name), MEMORY_STEPS)
    print(json.dumps({"resident_mib": resident, "tensors_mib": live.peak / 2**20, "losses": losses}))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings of the trainer about what it was not given."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield


def _kib(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def memory(name: str, side: str) -> dict[str, Any]:
    """``own_memory`` in a fresh process."""
    command = [sys.executable, __file__, "--memory", name, side]
    told = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    return json.loads(told.stdout.splitlines()[-1])


def seconds(name: str) -> dict[str, dict[str, float]]:
    """Median over rounds of the median step of each side, and its ratio to the stock trainer's of the same round."""
    sides = (STOCK, *TIMED)
    found: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side in sides:
            with quiet():
                job = work(name)
                _, stamps = take(side, replace(job, batch=job.timed), TIME_STEPS + 1)
            steps = [b - a for a, b in itertools.pairwise(stamps)][1:]  # the first step makes the moments
            found[side].append(sum(steps) / len(steps))
    table = {}
    for side, values in found.items():
        ratios = [value / other for value, other in zip(values, found[STOCK], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table[side] = {"seconds": statistics.median(values), "ratio": middle, "low": low, "high": high}
    return table


def measure(name: str) -> dict[str, Any]:
    """Memory, time and loss curves on one model."""
    job = work(name)
    rows = {side: memory(name, side) for side in (STOCK, *SIDES)}
    base = rows[STOCK]
    for row in rows.values():
        row["resident_ratio"] = row["resident_mib"] / base["resident_mib"]
        row["tensors_ratio"] = row["tensors_mib"] / base["tensors_mib"]
        curve = zip(row["losses"], base["losses"], strict=True)
        row["furthest_loss"] = max(abs(a - b) / abs(b) for a, b in curve)
    return {
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "examples": [len(job.request.data(part)) for part in ("forget", "retain")],
        "batch": {"memory": job.batch, "time": job.timed},
        "data": {part: fingerprint(job.request.data(part)) for part in ("forget", "retain")},
        "memory": rows,
        "time": seconds(name),
    }


def failures(name: str, found: dict[str, Any]) -> list[str]:
    """Bounds that are not held. Memory is held to its bounds where weights outweigh what a step needs."""
    over = []
    rows = found["memory"]
    if name == "larger":
        over += [f"{side}: memory" for side, bound in BOUNDS.items() if rows[side]["resident_ratio"] > bound]
        if rows["expunge, lean optimizer"]["resident_mib"] >= rows["expunge"]["resident_mib"]:
            over.append("lean optimizer: no less memory")
        over += [f"{side}: time" for side in TIMED if found["time"][side]["ratio"] > TIME_BOUND]
    over += [f"{side}: loss curve" for side in ("expunge", "expunge, two pieces") if rows[side]["furthest_loss"] > 1e-5]
    return [f"{name}, {what}" for what in over]


def main() -> None:
    """Print the table and write the result."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--memory"]:
        own_memory(*sys.argv[2:4])
        return
    names = ("stories" if "EXPUNGE_DATA" in os.environ else "tiny", "larger")
    models = {name: measure(name) for name in names}
    result = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "seed": SEED,
        "expunge": __version__,
        "revision": revision(),
        "beta": BETA,
        "steps": {"memory": MEMORY_STEPS, "time": TIME_STEPS, "rounds": ROUNDS},
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": 1,
        },
        "bounds": {"memory": BOUNDS, "time": TIME_BOUND, "loss": 1e-5},
        "models": models,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    show(models)
    over = [what for name, found in models.items() for what in failures(name, found)]
    if over:
        sys.exit(f"over their bound: {'; '.join(over)}")


def show(models: dict[str, Any]) -> None:
    """The tables."""
    from rich.console import Console
    from rich.table import Table

    for name, found in models.items():
        shown = Table("side", "resident MiB", "ratio", "tensors MiB", "ratio", "furthest loss", title=f"{name}, memory")
        for side, row in found["memory"].items():
            shown.add_row(
                side,
                f"{row['resident_mib']:.0f}",
                f"{row['resident_ratio']:.2f}",
                f"{row['tensors_mib']:.1f}",
                f"{row['tensors_ratio']:.2f}",
                f"{row['furthest_loss']:.1e}",
            )
        Console().print(shown)
        timed = Table("side", "seconds a step", "ratio", "quartiles", title=f"{name}, time")
        for side, row in found["time"].items():
            timed.add_row(
                side, f"{row['seconds']:.3f}", f"{row['ratio']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"
            )
        Console().print(timed)


if __name__ == "__main__":
    main()
