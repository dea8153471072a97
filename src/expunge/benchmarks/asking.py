"""What a model says of texts, item by item: kept as it comes, and shared between processes.

The items of one call are put in a fixed order, longest first, and cut into chunks; a chunk is one forward pass or one batch of
writing. Processes take chunks in turn and exchange what they found, so that any number of them gives the same bits as one.
Where there is a store, each chunk is written there under the model's and its own content: a run that was killed finds what
was done, and a changed model, prompt or setting finds nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from expunge import runtime
from expunge.audit.language import min_k
from expunge.audit.subject import address_of
from expunge.core import Key, Refused, only_looked_at
from expunge.data.text import Template, Texts
from expunge.progress import enabled, progress
from expunge.store import Store
from expunge.tasks.causal_lm import IGNORED, CausalLM
from expunge.tasks.generation import encode_prompt, generate_ids
from expunge.tasks.language_model import LanguageModel

Row = tuple[list[int], int]
"""Token ids of a prompt and an answer, and how many of them are prompt."""
_CELLS = 1 << 26  # logits held at once: bounds the memory of a pass, whatever the vocabulary
_CHUNK = "asking 1"


@dataclass
class Asking:
    """One model, asked.

    Args:
        found: the model and its tokenizer. template: how questions are written; the tokenizer's own by default.
        store: where answers are kept between runs; None keeps them in memory only.
        batch: items at a time at most. The order of sums inside a batch moves a float32 result in the seventh digit, so
            a store answers only for the batch that it was filled with.

    Raises:
        Refused: for a batch below 1.
    """

    found: LanguageModel
    template: Template | None = None
    store: Store | None = None
    batch: int = 16
    _address: str = field(default="", init=False, repr=False)
    _in_step: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise Refused(f"batch must be at least 1, found {self.batch}")
        # weights in shards: every process takes part in every forward pass; asked now, before a pass gathers them
        self._in_step = any(runtime.sharded(parameter) for parameter in self.found.model.parameters())

    @property
    def written(self) -> Template:
        """The template in use."""
        return self.template or Template(self.found.tokenizer)

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts that are to be gone on from."""
        return [encode_prompt(self.found.tokenizer, text) for text in texts]

    def losses(self, rows: Sequence[Row], what: str = "reading") -> tuple[np.ndarray, np.ndarray]:
        """[n] summed nats of each answer after its prompt, and [n] its tokens, both float64.

        Raises:
            Refused: for a row longer than the model's context (a score of a cut answer is another score), or losses that
                are not finite.
        """
        said = self._read(rows, what)
        return said["nll"], said["units"]

    def continuations(self, rows: Sequence[Row], what: str = "reading") -> tuple[np.ndarray, np.ndarray]:
        """[n] log-probability of each answer after its prompt, and [n] bool whether greedy writing would give it."""
        said = self._read(rows, what)
        return -said["nll"], said["right"] == said["units"]

    def _read(self, rows: Sequence[Row], what: str) -> dict[str, np.ndarray]:
        """``nll``, ``units`` and ``right``, the tokens that are the likeliest at their place, of each row's answer."""
        task = CausalLM(self.found.vocab)
        for ids, _ in rows:
            self._fits(len(ids))

        def compute(chosen: list[int]) -> dict[str, np.ndarray]:
            batch = self._batch([rows[place] for place in chosen])
            with torch.no_grad(), only_looked_at(self.found.model):
                logits, labels = task.answer_logits(self.found.model, batch), task.labels(batch)
            judged = labels != IGNORED
            each = F.cross_entropy(logits.float(), labels[judged], reduction="none")
            right = logits.argmax(1) == labels[judged]
            owner = judged.nonzero()[:, 0]
            parts = {"nll": each, "units": torch.ones_like(each), "right": right}
            empty = torch.zeros(len(chosen), dtype=torch.float64, device=logits.device)
            return {name: empty.index_add(0, owner, part.double()).cpu().numpy() for name, part in parts.items()}

        keys = [json.dumps(["read", ids, start]) for ids, start in rows]
        said = self._shared(keys, [len(ids) for ids, _ in rows], self._size(rows), compute, what)
        self._finite(said["nll"])
        return said

    def least(self, rows: Sequence[Row], share: float, what: str = "reading") -> np.ndarray:
        """[n] mean log-probability of the `share` least likely answer tokens of each row (``audit.language.min_k``)."""
        for ids, _ in rows:
            self._fits(len(ids))
        task = CausalLM(self.found.vocab)

        def compute(chosen: list[int]) -> dict[str, np.ndarray]:
            batch = self._batch([rows[place] for place in chosen])
            with torch.no_grad(), only_looked_at(self.found.model):
                logs, labels = -task.token_nll(self.found.model, batch), task.labels(batch)
            return {"least": min_k(logs.cpu().numpy(), (labels != IGNORED).cpu().numpy(), share)}

        keys = [json.dumps(["least", share, ids, start]) for ids, start in rows]
        return self._finite(self._shared(keys, [len(ids) for ids, _ in rows], self._size(rows), compute, what)["least"])

    def endings(self, rows: Sequence[tuple[list[int], tuple[int, ...]]], what: str = "choosing") -> np.ndarray:
        """[n, k] log-probability of each of k single tokens to come next after the ids of a row."""
        for ids, _ in rows:
            self._fits(len(ids))
        task, size = CausalLM(self.found.vocab), self._size([(ids, 0) for ids, _ in rows])

        def compute(chosen: list[int]) -> dict[str, np.ndarray]:
            told = [([*rows[place][0], 0], len(rows[place][0])) for place in chosen]  # any token, to be predicted
            batch = self._batch(told)
            with torch.no_grad(), only_looked_at(self.found.model):
                logs = F.log_softmax(task.answer_logits(self.found.model, batch).float(), -1)
            wanted = torch.tensor([rows[place][1] for place in chosen], device=logs.device)
            return {"log": logs.gather(1, wanted).double().cpu().numpy()}

        keys = [json.dumps(["ending", ids, list(ends)]) for ids, ends in rows]
        return self._finite(self._shared(keys, [len(ids) for ids, _ in rows], size, compute, what)["log"])

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        rng: Key | None = None,
        what: str = "writing",
    ) -> list[str]:
        """What the model writes after each prompt, as ``tasks.generation.generate``.

        Above temperature 0 the draws depend on the key and on the place among the prompts of this call.
        """
        seed = None if rng is None else rng.seed

        def compute(chosen: list[int]) -> dict[str, np.ndarray]:
            quiet = enabled.set(False)  # one bar at a time: the one over the chunks
            try:
                found = generate_ids(
                    self.found.model,
                    self.found.tokenizer,
                    [prompts[place] for place in chosen],
                    new_tokens=new_tokens,
                    batch=self.batch,
                    temperature=temperature,
                    rng=rng,
                    stop=stop,
                    streams=chosen,
                )
            finally:
                enabled.reset(quiet)
            return {"text": np.array(found, dtype=np.str_)}

        settings = ["text", new_tokens, list(stop), temperature, seed]
        keys = [
            json.dumps([*settings, list(ids), *([place] if temperature else [])]) for place, ids in enumerate(prompts)
        ]
        said = self._shared(keys, [len(ids) for ids in prompts], self.batch, compute, what)
        return [str(text) for text in said["text"]] if prompts else []

    def _batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        batch = {**Texts(rows, 0).fetch(torch.arange(len(rows))), "id": torch.arange(len(rows))}
        return runtime.to_device(batch, runtime.device_of(self.found.model))

    def _finite(self, values: np.ndarray) -> np.ndarray:
        if not np.isfinite(values).all():
            raise Refused("the model's losses are not finite: its weights are broken, or its precision is too low")
        return values

    def _fits(self, size: int) -> None:
        if size > self.found.context:
            raise Refused(
                f"a prompt with its answer has {size} tokens and the model reads {self.found.context}: leave the item out, or "
                f"take a model that reads more"
            )

    def _size(self, rows: Sequence[Row]) -> int:
        width = max((len(ids) for ids, _ in rows), default=1)
        return max(1, min(self.batch, _CELLS // (width * self.found.vocab)))

    def _shared(
        self,
        keys: Sequence[str],
        lengths: Sequence[int],
        size: int,
        compute: Callable[[list[int]], dict[str, np.ndarray]],
        what: str,
    ) -> dict[str, np.ndarray]:
        """`compute` over chunks of positions, each once among all processes; what comes back is in the order of `keys`."""
        first = {key: place for place, key in reversed(list(enumerate(keys)))}  # a repeated item is asked once
        order = sorted(first.values(), key=lambda place: (-lengths[place], place))
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        try:
            found = _exchanged(lambda: self._own(keys, chunks, size, compute, what))
        finally:
            shards: list[Any] = [
                part for part in self.found.model.modules() if self._in_step and hasattr(part, "reshard")
            ]
            for part in shards:  # FSDP2 leaves the outermost gathered after a pass without gradient
                part.reshard()
        names = next(iter(found.values()), {})
        result = {}
        for name in names:
            values = {
                keys[place]: row
                for at, chunk in enumerate(chunks)
                for place, row in zip(chunk, found[at][name], strict=True)
            }
            result[name] = np.stack([np.asarray(values[key]) for key in keys])
        return result or {
            "nll": np.zeros(0),
            "units": np.zeros(0),
            "right": np.zeros(0),
            "log": np.zeros((0, 0)),
            "text": np.zeros(0, "U1"),
        }

    def _own(
        self,
        keys: Sequence[str],
        chunks: Sequence[list[int]],
        size: int,
        compute: Callable[[list[int]], dict[str, np.ndarray]],
        what: str,
    ) -> dict[int, Mapping[str, np.ndarray]]:
        """This process's chunks: a share of them, or all where processes go in step."""
        mine = range(len(chunks)) if self._in_step else range(runtime.rank(), len(chunks), runtime.world())
        found: dict[int, Mapping[str, np.ndarray]] = {}
        with progress(what, len(mine)) as update:
            for done, number in enumerate(mine):
                chunk = chunks[number]
                found[number] = self._kept([keys[place] for place in chunk], size, partial(compute, chunk))
                update(done + 1)
        return found

    def _kept(
        self, keys: list[str], size: int, compute: Callable[[], dict[str, np.ndarray]]
    ) -> Mapping[str, np.ndarray]:
        if self.store is None:
            return compute()
        if not self._address:
            self._address = address_of(self.found.model)
        name = hashlib.blake2b(json.dumps([_CHUNK, size, keys]).encode(), digest_size=16).hexdigest()
        if not self._in_step:
            return self.store.fill(self._address, name, lambda: {"id": np.arange(len(keys)), **compute()})
        store, address = self.store, self._address
        if runtime.on_first(lambda: store.has(address, name)):  # all look or none: a forward pass takes all of them
            return runtime.on_first(lambda: store.get(address, name))
        said = compute()
        runtime.on_first(lambda: store.put(address, name, {"id": np.arange(len(keys)), **said}))
        return said


def _exchanged(work: Callable[[], dict[int, Mapping[str, np.ndarray]]]) -> dict[int, Mapping[str, np.ndarray]]:
    """What all processes found; an error of one is every one's, or the others would wait for it for ever."""
    if runtime.world() == 1:
        return work()
    said: tuple[dict[int, Mapping[str, np.ndarray]], Exception | None]
    try:
        said = (work(), None)
    except Exception as error:  # handed to all
        said = ({}, error)
    everyone: list[Any] = [None] * runtime.world()
    dist.all_gather_object(everyone, said)
    for _, wrong in everyone:
        if wrong is not None:
            raise wrong
    return {number: values for part, _ in everyone for number, values in part.items()}
