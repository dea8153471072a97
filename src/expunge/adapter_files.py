"""Adapters to and from folders, as peft lays them out: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from expunge import runtime
from expunge.adapter_layers import Adapted, quantised, turned
from expunge.adapters import ADAPTER
from expunge.core import Refused
from expunge.journal import write_bytes
from expunge.registry import need_extra

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(folder: str | Path, model: nn.Module, layers: Mapping[str, Any], tuner: Any) -> None:
    """Write the adapter that is attached to a model, so that ``PeftModel.from_pretrained(base, folder)`` reads it.

    The configuration comes last and an old one is removed first: a folder holds a whole adapter or none. With several
    processes each must call it; the first one writes.

    Args:
        folder: made where it is not there.
        model: with adapted `layers` in place, by name.
        tuner: peft's, or None where the layers are expunge's own: what they learnt is then written as a LoRA.
    """
    peft = need_extra("peft", "llm", "saving an adapter")
    folder = Path(folder)
    made = _of_peft(peft, tuner) if tuner is not None else _as_lora(peft, layers)
    config, tensors = made
    config.inference_mode = True
    config.target_modules = _named(model, list(layers))
    config.base_model_name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config.task_type = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
    with tempfile.TemporaryDirectory() as place:
        config.save_pretrained(place)
        told = (Path(place) / CONFIG).read_bytes()
    tensors = {name: runtime.whole(value.detach()).cpu().contiguous().clone() for name, value in tensors.items()}

    def write() -> None:
        (folder / CONFIG).unlink(missing_ok=True)
        write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_bytes(folder / CONFIG, told)

    runtime.on_first(write)


def _named(model: nn.Module, layers: Sequence[str]) -> list[str] | str:
    """The layers by name; by an exact pattern where a name is also the end of another module's, which peft would take."""
    others = [name for name, _ in model.named_modules() if name not in set(layers)]
    if any(other.endswith(f".{name}") for other in others for name in layers):
        return "|".join(name.replace(".", r"\.") for name in layers)
    return list(layers)


def _of_peft(peft: Any, tuner: Any) -> tuple[Any, dict[str, Tensor]]:
    found = peft.get_peft_model_state_dict(tuner, adapter_name=ADAPTER, save_embedding_layers=False)
    tensors, seen = {}, set()
    for name, value in sorted(found.items(), key=lambda item: item[0].count(".")):  # what is shared: its shortest name
        place = value.data_ptr(), value.shape
        if place not in seen:
            seen.add(place)
            tensors[f"base_model.{name}"] = value
    return copy.copy(tuner.peft_config[ADAPTER]), tensors


def _as_lora(peft: Any, layers: Mapping[str, Adapted]) -> tuple[Any, dict[str, Tensor]]:
    """Each change as B A with alpha = rank; peft wants one rank, so thinner ones are filled with zeros."""
    factors = {name: _factors(layer) for name, layer in layers.items()}
    rank = max(left.shape[1] for left, _ in factors.values())
    tensors = {}
    for name, (left, right) in factors.items():
        more, base = rank - left.shape[1], layers[name].base_layer
        up = torch.nn.functional.pad(left, (0, more))
        down = torch.nn.functional.pad(right, (0, 0, 0, more))
        if type(base) is nn.Conv2d:
            up, down = up[:, :, None, None], down.reshape(rank, *base.weight.shape[1:])
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    swapped = any(turned(layer.base_layer) for layer in layers.values())
    return peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", fan_in_fan_out=swapped), tensors


def _factors(layer: Adapted) -> tuple[Tensor, Tensor]:
    """left [out, r] and right [r, in] whose product is the change, r at most the smaller side."""
    pairs = [(left.detach(), right.detach()) for left, right in layer.change.pairs() if right is not None]
    left, right = torch.cat([pair[0] for pair in pairs], 1), torch.cat([pair[1] for pair in pairs])
    if left.shape[1] <= min(len(left), right.shape[1]):
        return left, right
    u, values, vt = torch.linalg.svd(left @ right, full_matrices=False)
    return u * values, vt


def merge_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Merge a local peft adapter into a model, in place, and return the plain model. Runs no code of the folder.

    Args:
        model: the base that the adapter was made for, in floating numbers.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        Refused: for a folder that holds no whole adapter, one for another model, a pickle, a kind that cannot be
            merged, or a quantised model.
        MissingExtra: where peft is not installed.
    """
    peft = need_extra("peft", "llm", "reading an adapter")
    folder = Path(folder)
    names = _saved_names(folder)
    if hasattr(model, "peft_config"):
        raise Refused("the model has adapters already: merge or remove them before reading another")
    if any(quantised(layer) for layer in model.modules()):
        raise Refused(f"the adapter in {folder} cannot be merged into a quantised model: load the model unquantised")
    if getattr(peft.PeftConfig.from_pretrained(str(folder)), "is_prompt_learning", False):
        raise Refused(f"the adapter in {folder} is made of prompts, not of weights: it cannot be merged")
    modules = {name for name, _ in model.named_modules()}
    strange = [name for name in names if _module_of(name) not in modules]
    if strange:
        raise Refused(f"the adapter in {folder} was made for another model: this one has no {_module_of(strange[0])!r}")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with _quietly(folder):
        loaded = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        wanted = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
        if len(_own(wanted)) > len(_own(names)):
            raise ValueError("tensors are missing")
        plain = loaded.merge_and_unload(safe_merge=True)
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    return plain


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter of peft's, whole or not."""
    return (Path(folder) / CONFIG).is_file()


def _own(names: Any) -> set[str]:
    """Names of tensors of single layers, without the bases that all layers share."""
    return {name for name in names if "randlora_A" not in name and "randlora_B" not in name}


def _module_of(name: str) -> str:
    """base_model.model.fc.lora_A.weight -> fc."""
    path = name.removeprefix("base_model.").removeprefix("model.").split(".")
    at = next((i for i, part in enumerate(path) if "lora_" in part or part.startswith(("hada_", "lokr_"))), None)
    return ".".join(path[:-1] if at is None else path[:at])


def _saved_names(folder: Path) -> list[str]:
    """Names of the adapter's tensors; refuses a folder that holds no whole adapter."""
    if not is_adapter(folder):
        raise Refused(f"{folder} holds no adapter: expected a folder with {CONFIG} and {WEIGHTS}")
    try:
        json.loads((folder / CONFIG).read_text())
        if not (folder / WEIGHTS).is_file():
            raise Refused(
                f"{folder} has no {WEIGHTS}: a pickle (adapter_model.bin) could run code, so it is not read; save the "
                f"adapter as safetensors"
            )
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return list(file.keys())
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, OSError) as error:
        raise Refused(f"{folder} holds no whole adapter ({error}): save it again") from error


@contextlib.contextmanager
def _quietly(folder: Path) -> Iterator[None]:
    """peft's own complaints about an adapter, in one sentence, and its warnings not at all."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise Refused(f"the adapter in {folder} cannot be merged into this model: {said[-1].strip()}") from error
