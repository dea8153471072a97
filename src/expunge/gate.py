"""Adapters that act on some questions only (O3, arXiv:2407.10223): a detector says which, a gate says how much.

Everything that decides is a tensor or a number: the whole of a gated model is in one file of weights, without pickle.

A gate hides, it does not erase. Under it stands the model as it was, to the bit: who holds the weights can leave the gate
out, and a question that the detector takes for something else is answered as before.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Case, Data, Key, Refused, eval_mode
from expunge.detector import Detector, fit
from expunge.gated_layers import CHILD, Adapter, adapters, attach, detach, opened
from expunge.oracle import prepared
from expunge.scope import Scope
from expunge.states import kept_states, pooled, wide
from expunge.tasks.causal_lm import IGNORED
from expunge.weights import load_weights, read_tensors

HEAD = "gate_settings"
NU = 0.1
"""Share of the known examples that the one-class machine may leave outside, as published."""


class GatedModel(nn.Module):
    """A model with adapters that each example opens as far as a detector takes it for one to forget.

    The gate is one number per example, w = max over requests, from the QUERY alone: the tokens before the answer. In
    a call with `input_ids` they are those where `query_mask` is 1 (task ``causal_lm`` gives it), else all that are
    attended, so that scoring an answer by hand without a `query_mask` lets the answer itself into the gate. In
    ``generate`` they are the prompt, once for all new tokens. Costs one more pass of the query than the model alone.

    Args:
        model: with adapters attached.
        found: detectors, one per request.
        layers: names of the modules whose states are the detectors' features; unused with an encoder.
        encoder: a module ``(input_ids [b, T], mask [b, T]) -> (states, mask)``, states a sequence of [b, T', d], to be
            pooled over its own mask [b, T']; None takes the model's own states, adapters shut.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Sequence[Detector],
        layers: Sequence[str],
        encoder: nn.Module | None = None,
    ):
        super().__init__()
        self.model, self.detectors, self.encoder = model, nn.ModuleList(found), encoder
        self.layers = tuple(layers)
        scales = {name: adapter.scale for name, adapter in adapters(model).items()}
        written = json.dumps({"layers": self.layers, "scales": scales}, sort_keys=True).encode()
        self.register_buffer(HEAD, torch.frombuffer(bytearray(written), dtype=torch.uint8).clone())
        self.training = model.training
        self._last: Tensor | None = None

    @property
    def config(self) -> Any:
        """The model's own, for what reads sizes of it."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The model's own."""
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is."""
        return next(self.model.parameters()).device

    def features(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """[b, d] per layer, states pooled over the query's tokens."""
        return features(self.model, self.layers, self.encoder, ids, mask)

    def weights(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[b], how far each query opens the adapters: the largest of the detectors' weights."""
        found = self.features(ids, mask)
        return torch.stack([detector(found) for detector in detectors(self)]).amax(0)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **rest: Any,
    ) -> Any:
        """What the model says, its adapters opened as far as each example's query asks for."""
        cache = rest.get("past_key_values")
        if _filled(cache):  # a generation that goes on: its prompt was judged when the cache was made
            if self._last is None:
                raise Refused("a gated model was given a cache that it did not make: give it the prompt first")
        else:
            self._last = self.weights(input_ids, query_tokens(input_ids, attention_mask, query_mask))
        given = {"attention_mask": attention_mask, "use_cache": use_cache, **rest}
        with opened(self.model, self._last):
            return call(self.model, input_ids, {name: value for name, value in given.items() if value is not None})

    @property
    def generate(self) -> Callable[..., Any]:
        """The model's own ``generate``, where it has one, with the gate judged once, on the prompt."""
        inner: Any = self.model
        write = inner.generate

        def gated(input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> Any:
            weight = self.weights(input_ids, query_tokens(input_ids, attention_mask, None))
            given = rest if attention_mask is None else {"attention_mask": attention_mask, **rest}
            with opened(inner, weight):
                return write(input_ids, **given)

        return gated


def detectors(model: nn.Module) -> list[Detector]:
    """Those of a gated model, in the order of the requests; none of a plain one."""
    return [part for part in model.detectors if isinstance(part, Detector)] if isinstance(model, GatedModel) else []


def _filled(cache: Any) -> bool:
    if cache is None:
        return False
    return bool(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else len(cache) > 0


def query_tokens(ids: Tensor, attention: Tensor | None, query: Tensor | None) -> Tensor:
    """[b, T] bool, the query's tokens; all that are attended, of a row that names none (a text without a question)."""
    attended = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention != 0
    if query is None:
        return attended
    chosen = attended & (query != 0)
    return torch.where(chosen.any(1, keepdim=True), chosen, attended)


def call(model: nn.Module, ids: Tensor, given: Mapping[str, Any]) -> Any:
    """The model on token ids and those of the named arguments that it takes."""
    takes = inspect.signature(model.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    named = {name: value for name, value in given.items() if anything or name in takes}
    return model(input_ids=ids, **named) if anything or "input_ids" in takes else model(ids, **named)


def features(
    model: nn.Module, layers: Sequence[str], encoder: nn.Module | None, ids: Tensor, mask: Tensor
) -> list[Tensor]:
    """[b, d] per layer of the encoder, or of the model's own with its adapters shut; no gradient, eval mode."""
    order = torch.argsort(mask.int(), dim=1, descending=True, stable=True)[:, : max(1, int(mask.sum(1).max()))]
    ids, mask = ids.gather(1, order), mask.gather(1, order)  # the query first, wherever the padding is
    with torch.no_grad():
        if encoder is not None:
            with eval_mode(encoder):
                states, real = encoder(ids, mask)
            return [pooled(wide(part), real != 0) for part in states]
        with opened(model, None), eval_mode(model), kept_states(model, layers) as found:
            call(model, ids, {"attention_mask": mask.to(ids.dtype), "use_cache": False})
        return [pooled(wide(found[name]), mask) for name in layers]


def fitted(
    case: Case, data: Data, layers: Sequence[str], encoder: nn.Module | None, key: Key, held: float, offset: float
) -> Detector:
    """A detector of the questions of `data`, from one metered pass of the encoder, or of the case's model ungated.

    A text without a question counts whole. `held` and `offset` as in ``detector.fit``.
    """
    task: Any = case.task
    if not hasattr(task, "aligned"):
        raise Refused(f"a gate by tokens needs a language model, found task {case.task.name!r}: use task causal_lm")
    parts: list[list[Tensor]] = []
    with case.meter.watch(encoder or case.model):
        for batch in prepared(case, data, 16, key):
            aligned = task.aligned(batch)
            asked = (aligned["labels"] != IGNORED).cumsum(1) == 0
            mask = query_tokens(aligned["input_ids"], aligned["attention_mask"], asked)
            found = features(case.model, layers, encoder, aligned["input_ids"], mask)
            parts.append([part.cpu() for part in found])
    states = [torch.cat(rows) for rows in zip(*parts, strict=True)]
    return fit(states, key.at("held"), held, NU, offset).to(runtime.device_of(case.model))


def alike(one: nn.Module | None, other: nn.Module | None) -> bool:
    """Whether two encoders say the same: none both, or of equal weights."""
    if one is None or other is None:
        return one is other
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


def inner_scope(scope: Scope) -> Scope:
    """The scope of a gated model under the names of the model in it."""
    masks = {name.removeprefix("model."): mask for name, mask in scope.masks.items() if name.startswith("model.")}
    return Scope(masks, tuple(masks))


def outer_scope(scope: Scope) -> Scope:
    """The scope of a model under the names that it has in a gated one."""
    names = tuple(f"model.{name}" for name in scope.universe)
    return Scope({f"model.{name}": mask for name, mask in scope.masks.items()}, names)


def rebuilt(model: nn.Module, weights: Mapping[str, Tensor], encoder: nn.Module | None = None) -> nn.Module:
    """`model` gated in the places and shapes that saved `weights` have, to be read into; as it is where they have none.

    Raises:
        Refused: for weights of a gated model with an encoder, where none is given.
    """
    if HEAD not in weights:
        return model
    if encoder is None and any(name.startswith("encoder.") for name in weights):
        raise Refused(
            "these weights are of a gated model with an encoder of its own: give a module of its class, encoder="
        )
    inner = model.model if isinstance(model, GatedModel) else model
    try:
        settings = json.loads(bytes(weights[HEAD].tolist()))
    except ValueError as error:
        raise Refused(f"the settings of the gated model cannot be read ({error}): the file is damaged") from error
    for name in adapters(inner):
        detach(inner.get_submodule(name))
    for name, scale in settings["scales"].items():
        parts = [torch.zeros_like(weights[f"model.{name}.{CHILD}.{part}"]) for part in ("down", "up", "earlier")]
        attach(inner.get_submodule(name), Adapter(parts[0], parts[1], scale, parts[2]))
    count = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("detectors."))
    made = [Detector.shaped(weights, f"detectors.{number}.") for number in range(count)]
    return GatedModel(inner, made, settings["layers"], encoder)


def load_gated(model: nn.Module, path: str | Path, encoder: nn.Module | None = None) -> GatedModel:
    """Read weights that ``save_weights`` wrote of a gated model; `model` is plain, and becomes the one under the gate.

    Raises:
        Refused: for a file that holds no gated model, or does not fit.
    """
    whole = rebuilt(model, read_tensors(Path(path)), encoder)
    if not isinstance(whole, GatedModel):
        raise Refused(f"{path} holds no gated model: read it with expunge.load_weights")
    load_weights(whole, path)
    return whole
