"""Tensors as the bytes of a safetensors file, one tensor after the other, so that writing needs no copy of them all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The pieces of a safetensors file: its header, then each tensor's own memory.

    A tensor of an accelerator is brought over when its turn comes and let go after. The widest types stand first, so
    that every tensor is aligned for a reader that maps the file.

    Args:
        tensors: name -> tensor; two names may share memory, which is then written twice.
        metadata: text for the header.

    Raises:
        TypeError: for a type that such a file cannot hold.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in KINDS:
            raise TypeError(f"tensor {name!r} is {tensor.dtype}, which a safetensors file cannot hold")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data
