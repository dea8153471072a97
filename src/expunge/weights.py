"""Weights to and from files: safetensors, whole or not at all, never running code from a file."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Refused
from expunge.journal import write_bytes
from expunge.stream import chunks


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write parameters and buffers as safetensors, under canonical names (tied weights once), whole or not at all.

    With several processes each must call it; the first one writes.
    """
    tensors = _whole(model)
    runtime.on_first(lambda: write_bytes(Path(path), chunks(tensors, {"format": "pt"})))


def packed(model: nn.Module) -> bytes:
    """The content of the file that ``save_weights`` writes; for one process."""
    return save(_whole(model), metadata={"format": "pt"})


def _whole(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and those buffers that belong to a model's state, on the CPU, tied ones once."""
    saved = model.state_dict().keys()
    return {
        name: runtime.whole(t.detach()).cpu().contiguous()
        for name, t in (*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in saved))
    }


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Read weights into a model, in place. Never runs code from the file.

    Args:
        model: of the architecture that the weights belong to.
        path: a ``.safetensors`` file, or a ``.pt``/``.pth`` state dict, which is read with ``weights_only=True``.

    Raises:
        Refused: for a file that is missing, damaged, holds more than tensors, or does not fit the model.
    """
    path = Path(path)
    if not path.is_file():
        raise Refused(f"there is no weights file {path}")
    tensors = read_tensors(path)
    wanted = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = _canonical(model, tensors, wanted)
    saved = model.state_dict().keys()  # buffers that are not saved with a model may be absent
    missing = [name for name in wanted if name in saved and name not in tensors]
    unknown = [name for name in tensors if name not in wanted]
    if missing or unknown:
        raise Refused(
            f"{path} does not fit the model: "
            + "; ".join(
                f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            )
        )
    wanted = {name: target for name, target in wanted.items() if name in tensors}
    for name, target in wanted.items():
        if tensors[name].shape != target.shape:
            raise Refused(
                f"{path} does not fit the model: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(target.shape)}"
            )
    with torch.no_grad():
        for name, target in wanted.items():
            target.copy_(runtime.shard_like(tensors[name], target))
    return model


def _canonical(model: nn.Module, tensors: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under canonical names: what is tied or shared has several, of which a file may hold any."""
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = {id(value): name for name, value in wanted.items()}
    aliases = {name: names[id(value)] for name, value in every}
    if not any(name in aliases for name in tensors):  # as DataParallel and DistributedDataParallel save them
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    found = {aliases[name]: value for name, value in tensors.items() if name in aliases}
    return found | {name: value for name, value in tensors.items() if name not in aliases or name in wanted}


def read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise Refused(f"{path} is not a whole safetensors file ({error})") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # of a file that is about to be refused, or is safe
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for pickles that hold more than tensors
        raise Refused(
            f"{path} is not a plain file of tensors: loading a pickle could run code, so it is refused; save the "
            f"state dict as safetensors"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise Refused(f"{path} holds no state dict: expected a mapping of names to tensors")
    return found


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """blake2b of names, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        value = runtime.whole(tensors[name].detach()).cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict; a module may keep other things there (``get_extra_state``)."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
