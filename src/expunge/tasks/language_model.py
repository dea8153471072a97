"""Causal language models from and to folders of the Hugging Face layout: weights, tokenizer, chat template, adapters."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from expunge import runtime
from expunge.adapter_files import CONFIG, is_adapter, merge_adapter
from expunge.core import Data, MissingExtra, Refused
from expunge.data.json_lines import Example
from expunge.data.text import Encoded, Template, encode
from expunge.registry import need_extra
from expunge.tasks.causal_lm import CausalLM
from expunge.weights import save_weights

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = "model.safetensors"
LARGE = 1 << 30
"""Bytes of weights from which reading them shows its progress."""
UNBOUNDED = 1 << 30
"""Above this a tokenizer's maximal length means that it has none."""
WORSE_THAN_GUESSING = 3.0
"""Nats per token above a uniform guess at which a model cannot have been trained on this tokenizer's texts."""


@dataclass(frozen=True)
class LanguageModel:
    """A model and the tokenizer that belongs to it.

    Attributes:
        model: any causal language model of transformers. tokenizer: its tokenizer. source: folder or hub id.
    """

    model: nn.Module
    tokenizer: Any
    source: str = field(default="", compare=False)

    @property
    def vocab(self) -> int:
        """Rows of the output layer: tokens that the model can say, padding of its embedding included."""
        return int(self.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]

    @property
    def context(self) -> int:
        """Tokens that the model reads, at most."""
        stated = getattr(self.model.config, "max_position_embeddings", None) or UNBOUNDED
        return int(min(stated, getattr(self.tokenizer, "model_max_length", UNBOUNDED) or UNBOUNDED))

    def task(self, refusals: Sequence[str] = (), template: Literal["auto", "chat", "plain"] = "auto") -> CausalLM:
        """The task of this model; `refusals` are answers that give nothing away, written as `template` writes answers."""
        how, ids = Template(self.tokenizer, template), []
        for text in refusals:
            asked = ({"role": "user", "content": "?"},)
            whole, start = how.ids(Example(asked, text.strip(), f"refusal {text!r}"))
            ids.append(tuple(whole[start:]))
        return CausalLM(self.vocab, tuple(ids), decode=self.decode)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def encode(
        self,
        examples: Sequence[Example],
        template: Literal["auto", "chat", "plain"] = "auto",
        length: int | None = None,
        first_id: int = 0,
    ) -> Encoded:
        """Tokenise examples, up to `length` tokens each or as many as the model reads; see ``data.text.encode``."""
        if length is not None and length > self.context:
            raise Refused(f"length is {length} tokens and the model reads {self.context}: give at most that")
        if length is None and self.context >= UNBOUNDED:
            raise Refused("neither the model nor its tokenizer says how many tokens it reads: give length")
        return encode(examples, Template(self.tokenizer, template), length=length or self.context, first_id=first_id)


def load_language_model(
    source: str | Path,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    four_bit: bool = False,
    tokenizer: str | Path | None = None,
) -> LanguageModel:
    """Load a model and its tokenizer. Never runs code from the files: no remote code, no pickle of more than tensors.

    Args:
        source: a local folder as ``save_pretrained`` writes it, or the id of a model on the user's hub. A folder of a
            PEFT adapter gives its base model with the adapter merged into it.
        dtype: of the weights; "auto" as they are stored.
        four_bit: quantise the base to 4 bits with bitsandbytes: then only an adapter can be trained.
        tokenizer: another folder or id for the tokenizer.

    Raises:
        Refused: for a folder that holds no such model, or a tokenizer that cannot belong to the model.
        MissingExtra: where transformers, or bitsandbytes for `four_bit`, is not installed.
    """
    transformers = need_extra("transformers", "llm", "language models")
    if dtype not in DTYPES:
        raise Refused(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    folder = Path(source)
    looks_local = folder.exists() or str(source).startswith((".", "/", "~"))
    if looks_local and not (folder / "config.json").is_file() and not is_adapter(folder):
        raise Refused(f"{source} holds no language model: expected a folder with config.json, weights and a tokenizer")
    how: dict[str, Any] = {"dtype": DTYPES[dtype], "trust_remote_code": False}
    if four_bit:
        need_extra("bitsandbytes", "four-bit", "a 4-bit base")
        how["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    base = _base(source)
    own = tokenizer or _own(source, base)
    with _one_sentence(base), _quiet(transformers, base):
        words = transformers.AutoTokenizer.from_pretrained(str(own), trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, **how)
    if base != str(source):
        model = merge_adapter(model, source)
    found = LanguageModel(model.eval(), words, str(source))
    _belongs(found, str(own))
    return found


def _base(source: str | Path) -> str:
    """What an adapter says that it was made for; the source itself where it is no adapter."""
    if not is_adapter(source):
        return str(source)
    try:
        found = json.loads((Path(source) / CONFIG).read_text()).get("base_model_name_or_path")
    except ValueError as error:
        raise Refused(f"{Path(source) / CONFIG} is not JSON ({error}): it is cut short or edited") from error
    if not isinstance(found, str) or not found:
        raise Refused(f"the adapter in {source} does not say which model it is for: load that, and merge_adapter")
    return found


def _own(source: str | Path, base: str) -> str:
    """Where the tokenizer is: beside an adapter, where it was saved there, else with its base."""
    return str(source) if source == base or (Path(source) / "tokenizer_config.json").is_file() else base


@contextlib.contextmanager
def _quiet(transformers: Any, source: str | Path) -> Iterator[None]:
    """No progress bars of transformers for what is read in no time; its setting is put back."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    here = Path(source)
    small = here.is_dir() and sum(file.stat().st_size for file in here.glob("*.safetensors")) < LARGE
    try:
        if small:
            transformers.utils.logging.disable_progress_bar()
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def _one_sentence(source: str | Path) -> Iterator[None]:
    """Whatever a library says of files that it cannot read, in one sentence."""
    try:
        yield
    except (Refused, MissingExtra):
        raise
    except Exception as error:  # of safetensors, tokenizers, transformers, peft: each has kinds of its own
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Refused(f"cannot load a language model from {source}: {said}") from error


def _belongs(found: LanguageModel, tokenizer: str) -> None:
    """Refuse a tokenizer whose ids the model has no embedding for, or whose end token is another than the model's."""
    rows = int(found.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    highest = max(found.tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise Refused(
            f"the tokenizer of {tokenizer} has ids up to {highest} and the model's embedding {rows} rows: they do not "
            f"belong together, or tokens were added and the embedding was not resized"
        )
    if found.vocab != rows:
        raise Refused(
            f"the model's embedding has {rows} rows and its output layer {found.vocab}: resize both to the same number of "
            f"tokens"
        )
    stated, own = getattr(found.model.config, "eos_token_id", None), found.tokenizer.eos_token_id
    ends = set(stated if isinstance(stated, list) else [stated]) - {None}
    generation = getattr(getattr(found.model, "generation_config", None), "eos_token_id", None)
    ends |= set(generation if isinstance(generation, list) else [generation]) - {None}
    if ends and own is not None and own not in ends:
        raise Refused(
            f"the tokenizer of {tokenizer} ends a text with token {own} and the model with {sorted(ends)}: they do not "
            f"belong together; give the model's own tokenizer, or correct eos_token_id in config.json"
        )


def check_fit(model: nn.Module, task: CausalLM, data: Data) -> None:
    """Refuse texts that the model finds less likely than guessing would: its tokenizer or its weights are others.

    Looks at up to eight examples, in one forward pass.

    Raises:
        Refused: with both numbers, in nats per token.
    """
    batch = runtime.to_device(data.batch(torch.arange(min(8, len(data)))), runtime.device_of(model))
    with torch.no_grad():
        loss = float(task.nll(model, batch).sum() / task.units(batch).sum())
    chance = task.chance(batch)
    if not math.isfinite(loss):
        raise Refused(
            "the model gives losses that are not numbers before anything was changed: its weights are damaged, or it "
            "overflows in half precision; load it in float32 or bfloat16"
        )
    if not loss <= chance + WORSE_THAN_GUESSING:
        raise Refused(
            f"the model gives the answers to forget a loss of {loss:.1f} nats per token, where guessing gives {chance:.1f}: "
            f"the tokenizer or the weights belong to another model"
        )


def save_language_model(found: LanguageModel, folder: str | Path, *, weights: Path | None = None) -> Path:
    """Write a folder that transformers loads: config, tokenizer with its chat template, safetensors. Whole or not at all.

    Args:
        found: the model and its tokenizer. folder: new, or one that this wrote before.
        weights: a safetensors file of these weights that is there already; it is linked to, and takes no second place on
            the disk where the file system allows.

    Raises:
        Refused: where the folder holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise Refused(f"{folder} is not empty and holds no model: give an empty or new folder")
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        config: Any = found.model.config
        config.save_pretrained(draft)
        generation = getattr(found.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(draft)
        found.tokenizer.save_pretrained(draft)
        _put(found.model, weights, draft / WEIGHTS)
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _put(model: nn.Module, weights: Path | None, target: Path) -> None:
    if weights is None:
        save_weights(model, target)
        return
    try:
        os.link(weights, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(weights, target)
