"""A language model that forgets, its weights, gradients and moments sharded over processes. Half a minute on two cores.

    python examples/language_model_fsdp.py                                                  one process
    torchrun --nproc-per-node 2 examples/language_model_fsdp.py                             two, each with half of it
    accelerate launch --multi_gpu --num_processes 2 examples/language_model_fsdp.py         the same, by accelerate
    torchrun --nproc-per-node 2 examples/language_model_fsdp.py --keep-gathered             as ZeRO-2, not ZeRO-3
    torchrun --nproc-per-node 2 examples/language_model_fsdp.py --whole                     the model whole in each

All give the same losses and weights, up to rounding. No launcher is needed in the program: every process makes the same
call, works on its own rows, and the first one writes. Here the model is a tiny random Llama on the CPU; for one of yours,
``load_language_model(PATH)`` and its ``encode`` take the place of ``tiny()`` and ``texts()``.
"""

from __future__ import annotations

import argparse
import json
import os

import torch
import torch.distributed as dist
from torch import nn

import expunge as ex
from expunge.data.text import Texts
from expunge.methods import npo

VOCAB = 64


def tiny() -> nn.Module:
    """A Llama of two layers with random weights, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, **shape)).eval()


def texts(first: int, count: int) -> ex.Data:
    """Prompts and answers of unequal lengths, as token ids."""
    rows = []
    for number in range(first, first + count):
        drawn = torch.randint(2, VOCAB, (6 + number % 5,), generator=torch.Generator().manual_seed(number))
        rows.append(([0, *drawn.tolist(), 1], 4))  # token ids, and how many of them are prompt
    return ex.Data(Texts(rows, pad=1), torch.arange(count), torch.arange(first, first + count))


def sharded(model: nn.Module, keep_gathered: bool) -> nn.Module:
    """FSDP2: each block is gathered for its forward and its backward pass, or kept in between (faster, more memory)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for block in model.model.layers:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, reshard_after_forward=not keep_gathered)
    return fully_shard(model, mesh=mesh, reshard_after_forward=not keep_gathered)


def main() -> None:
    """Unlearn ten texts; the first process prints what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep-gathered", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--out", help="folder for weights and record")
    given = parser.parse_args()
    launched = "RANK" in os.environ
    if launched:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    model = tiny().to("cuda" if torch.cuda.is_available() else "cpu")
    done = ex.unlearn(
        model,
        ex.Request(texts(0, 10), texts(100, 30)),
        task=ex.CausalLM(VOCAB),
        method=npo(steps=10, batch=8, lr=1e-3),
        shard=(lambda net: sharded(net, given.keep_gathered)) if launched and not given.whole else None,
        out=given.out,
    )
    if not launched or dist.get_rank() == 0:
        last = done.record["history"][-1]
        said = {
            "processes": done.record["machine"]["processes"],
            "forget": last["loss/forget"],
            "retain": last["loss/retain"],
        }
        print(json.dumps(said))
    if launched:
        dist.barrier()  # nobody leaves while another still writes
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
