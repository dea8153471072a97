"""Adapters in folders as peft lays them out, and adapters on a base whose weights cannot be read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge import adapter_files
from expunge.adapter_files import is_adapter, merge_adapter
from expunge.adapter_layers import Adapted
from expunge.adapters import LoRA, RandLoRA, SLTrain
from expunge.core import Case, Key, Refused, chain
from expunge.objectives import NLL
from expunge.run import unlearn
from expunge.scope import Scope
from expunge.spectral_adapters import SST, SVFit, WeLore
from expunge.wrap import in_adapter
from tests.fixtures import seeded, tiny
from tests.unit.test_wrap import Look, case_of, moved, shape_of, step, weights

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
torch.set_num_threads(1)

SAVED = [LoRA(4), LoRA(4, stabilised=True), RandLoRA(4, 8.0), SVFit(6), WeLore(0.5, reduction=0.3), SST(3)]
SAVED += [SST(20), LoRA(4, targets=("layers.1.mlp.*",))]


def says(model: nn.Module, found: Any) -> Tensor:
    with torch.no_grad():
        return found.task.outputs(model, found.test.batch(torch.arange(16)))


@pytest.mark.parametrize("chosen", SAVED, ids=repr)
def test_peft_reads_back_the_unlearned_model(chosen: Any, tmp_path: Path) -> None:
    found, base = tiny("causal_lm"), tiny("causal_lm").model
    folder = tmp_path / "out" / "adapter"
    outcome = unlearn(found.model, found.request, task=found.task, method=in_adapter(chosen, step(), save=folder))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"] is True
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    wanted = says(outcome.model, found)
    assert (wanted - says(base, found)).abs().max() > 0.05
    torch.testing.assert_close(says(loaded.eval(), found), wanted, rtol=1e-4, atol=1e-4)
    structure = shape_of(base)
    merged = merge_adapter(base, folder)
    assert merged is base
    assert [row[:2] for row in shape_of(merged)[0]] == [row[:2] for row in structure[0]]
    for name, value in outcome.model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("chosen", [LoRA(4), SVFit(6)], ids=repr)
def test_convolutions_and_names_that_end_alike(chosen: Any, tmp_path: Path) -> None:
    """Layers are called "0", "3" ...: as a list, peft would also adapt every other module whose name ends so."""
    found = tiny("classification")
    base = nn.Sequential(copy.deepcopy(found.model), nn.Identity())
    names = tuple(n for n, m in base.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    case = Case(base, found.request, found.task, Scope.all(base), {"original": copy.deepcopy(base)})
    before = copy.deepcopy(base)
    in_adapter(chosen, step(), save=tmp_path)(case)
    assert set(names) == set(chosen.layers(before, Scope.all(before)))
    torch.testing.assert_close(says(merge_adapter(before, tmp_path), found), says(base, found), rtol=1e-4, atol=1e-4)


def gpt2() -> nn.Module:
    """A GPT-2 of one layer, 16 wide: its projections are Conv1D, whose weights are [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    "chosen", [LoRA(4), RandLoRA(4, 8.0), SVFit(6), WeLore(0.8, reduction=0.1), SLTrain(2), SST(3)]
)
def test_weights_the_other_way_round(chosen: Any, tmp_path: Path) -> None:
    """GPT-2: the base at first to the bit, the merged function at last, and peft reads what was saved."""
    found, base = tiny("causal_lm"), seeded(gpt2)(0)
    model = copy.deepcopy(base)
    first, last = Look(lambda case: says(case.model, found)), Look(lambda case: says(case.model, found))
    folder = tmp_path if chosen.as_peft else None
    stage = in_adapter(chosen, chain(first, step(retain=None, forget=NLL(), steps=4), last), save=folder)
    stage(Case(model, found.request, found.task, Scope.all(model)))
    assert torch.equal(first.result, says(base, found))
    assert (last.result - first.result).abs().max() > 1e-3
    torch.testing.assert_close(says(model, found), last.result, rtol=1e-4, atol=1e-4)
    if folder is not None:
        torch.testing.assert_close(says(merge_adapter(base, folder), found), last.result, rtol=1e-4, atol=1e-4)


def test_ambiguous_names_become_an_exact_pattern() -> None:
    inner = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "inner": inner})
    assert adapter_files._named(model, ["fc"]) == "fc"
    assert isinstance(adapter_files._named(model, ["fc"]), str)
    assert adapter_files._named(model, ["inner.fc"]) == ["inner.fc"]


def test_a_write_that_is_cut_short_leaves_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tiny("causal_lm")
    in_adapter(LoRA(4), step(steps=1), save=tmp_path)(case_of(found))
    assert is_adapter(tmp_path)
    real = adapter_files.write_bytes

    def dies(path: Path, content: bytes) -> None:
        if path.name.endswith(".json"):
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(adapter_files, "write_bytes", dies)
    with pytest.raises(KeyboardInterrupt):
        in_adapter(LoRA(4), step(steps=2), save=tmp_path)(case_of(tiny("causal_lm")))
    assert not is_adapter(tmp_path)
    with pytest.raises(Refused, match="holds no adapter"):
        merge_adapter(tiny("causal_lm").model, tmp_path)


def test_what_cannot_be_saved_is_refused_before_any_work(tmp_path: Path) -> None:
    found = tiny("causal_lm")
    ran = Look()
    with pytest.raises(Refused, match="SLTrain"):
        in_adapter(SLTrain(2), ran, save=tmp_path)
    masks: dict[str, Any] = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in found.model.named_parameters()}
    masked = Scope(masks, tuple(masks))
    for settings in ({"save": tmp_path}, {"merge": False}):
        with pytest.raises(Refused, match="mask"):
            in_adapter(LoRA(4), ran, **settings)(case_of(found, masked))
    assert ran.case is None
    assert not list(tmp_path.iterdir())


def test_adapters_that_cannot_be_read_are_refused_in_one_sentence(tmp_path: Path) -> None:
    found = tiny("causal_lm")
    good = tmp_path / "good"
    in_adapter(LoRA(4), step(steps=1), save=good)(case_of(found))
    config, tensors = (good / "adapter_config.json").read_text(), load_file(good / "adapter_model.safetensors")

    def folder(name: str, told: str = config, saved: dict[str, Tensor] | None = tensors) -> Path:
        place = tmp_path / name
        place.mkdir()
        (place / "adapter_config.json").write_text(told)
        if saved is not None:
            save_file(saved, place / "adapter_model.safetensors")
        return place

    some = dict(list(tensors.items())[2:])
    other = {name.replace("q_proj", "query"): value for name, value in tensors.items()}
    wide = {name: value.repeat(2, 1) for name, value in tensors.items()}
    prompts = json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2})
    cut = folder("cut")
    (cut / "adapter_model.safetensors").write_bytes(b"torn")
    pickled = folder("pickled", saved=None)
    (pickled / "adapter_model.bin").write_bytes(b"")
    for place, told in (
        (tmp_path / "nowhere", "holds no adapter"),
        (pickled, "pickle"),
        (cut, "no whole adapter"),
        (folder("json", told="{"), "no whole adapter"),
        (folder("some", saved=some), "tensors are missing"),
        (folder("other", saved=other), "another model"),
        (folder("wide", saved=wide), "cannot be merged"),
        (folder("prompts", prompts, {"prompt_embeddings": torch.zeros(2, 32)}), "prompts"),
    ):
        with pytest.raises(Refused, match=told) as refusal:
            merge_adapter(tiny("causal_lm").model, place)
        assert "\n" not in str(refusal.value)
    loaded = peft.PeftModel.from_pretrained(tiny("causal_lm").model, str(good))
    with pytest.raises(Refused, match="adapters already"):
        merge_adapter(loaded, good)


# An adapter that stays


@pytest.mark.parametrize("chosen", [LoRA(4), RandLoRA(4, 8.0), SVFit(6), SLTrain(2)], ids=repr)
def test_an_adapter_that_stays_attached(chosen: Any, tmp_path: Path) -> None:
    """The model keeps its weights to the bit, says what the merged one says, and a finished run is read back."""
    found = tiny("causal_lm")
    before = weights(found.model)
    merged = unlearn(found.model, found.request, task=found.task, method=in_adapter(chosen, step())).model
    method = in_adapter(chosen, step(), merge=False)
    kept = unlearn(found.model, found.request, task=found.task, method=method, out=tmp_path / "run")
    torch.testing.assert_close(says(kept.model, found), says(merged, found), rtol=1e-4, atol=1e-4)
    plain = {name.replace(".base_layer.", "."): value for name, value in kept.model.state_dict().items()}
    assert all(torch.equal(plain[name], value) for name, value in before.items())
    names = dict(kept.model.named_parameters())
    assert all(name in names for name in kept.case.scope.universe)
    assert not any("lora" in name or "change" in name or "randlora" in name for name in kept.case.scope.masks)
    again = unlearn(found.model, found.request, task=found.task, method=method, out=tmp_path / "run")
    assert again.case is None
    assert torch.equal(says(again.model, found), says(kept.model, found))
    with pytest.raises(Refused, match="adapters already"):
        in_adapter(chosen, step())(case_of(found, model=kept.model, scope=kept.case.scope))


# A quantised base


class Eighth(nn.Module):
    """A linear layer in eighths of its largest weight, as whole numbers: enough to be unreadable and unwritable."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = float(layer.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def squeezed(model: nn.Module, make: Any) -> nn.Module:
    """The projections of a Llama quantised."""
    for name, layer in list(model.named_modules()):
        if name.endswith("_proj"):
            model.set_submodule(name, make(layer))
    return model


def check_on(make: Any, tmp_path: Path) -> None:
    """LoRA on a quantised base: starts as the base, trains, stays, moves nothing else, and peft reads it back."""
    found = tiny("causal_lm")
    base = squeezed(found.model, make)
    before, first = {n: t.clone() for n, t in base.state_dict().items() if isinstance(t, Tensor)}, says(base, found)
    inside = Look(lambda case: says(case.model, found))
    with pytest.raises(Refused, match="merge=False"):
        in_adapter(LoRA(4), inside)(case_of(found))
    assert inside.case is None
    assert {n: t for n, t in base.named_modules()}.keys() == {n: t for n, t in found.model.named_modules()}.keys()
    method = in_adapter(LoRA(4), chain(inside, step()), merge=False, save=tmp_path / "adapter")
    after = unlearn(base, found.request, task=found.task, method=method, copy=False).model
    assert torch.equal(inside.result, first)
    assert (says(after, found) - first).abs().max() > 0.05
    now = {name.replace(".base_layer.", "."): t for name, t in after.state_dict().items() if isinstance(t, Tensor)}
    assert all(torch.equal(now[name], value) for name, value in before.items())
    for layer in after.modules():  # the same base, switched off
        if isinstance(layer, Adapted):
            layer.enable_adapters(False)
    assert torch.equal(says(after, found), first)
    for chosen in (SVFit(4), RandLoRA(4)):
        with pytest.raises(Refused, match="only LoRA"):
            in_adapter(chosen, step(), merge=False)(case_of(found, model=squeezed(tiny("causal_lm").model, make)))
    with pytest.raises(Refused, match="quantised"):
        merge_adapter(squeezed(tiny("causal_lm").model, make), tmp_path / "adapter")


def test_lora_on_a_quantised_base(tmp_path: Path) -> None:
    check_on(Eighth, tmp_path)


def test_the_adapter_of_a_quantised_base_fits_its_weights_in_floating_numbers(tmp_path: Path) -> None:
    """On a model whose weights are exactly what the quantised one computes with, peft's reading says the same."""
    found = tiny("causal_lm")
    rounded = tiny("causal_lm").model
    with torch.no_grad():
        for name, layer in rounded.named_modules():
            if name.endswith("_proj"):
                eighth = Eighth(layer)
                layer.weight.copy_(eighth.weight.float() * eighth.scale)
    base = squeezed(found.model, Eighth)
    method = in_adapter(LoRA(4), step(), merge=False, save=tmp_path)
    after = unlearn(base, found.request, task=found.task, method=method).model
    loaded = peft.PeftModel.from_pretrained(rounded, str(tmp_path)).eval()
    torch.testing.assert_close(says(loaded, found), says(after, found), rtol=1e-4, atol=1e-4)


def test_the_teacher_of_a_quantised_base_is_the_base_to_the_bit() -> None:
    found = tiny("causal_lm")
    base = squeezed(found.model, Eighth)
    first = says(base, found)

    def look(case: Case) -> None:
        with case.teacher("original") as teacher:
            assert torch.equal(says(teacher, found), first)
        assert not torch.equal(says(case.model, found), first)

    method = in_adapter(LoRA(4), chain(step(), Look(look)), merge=False)
    unlearn(base, found.request, task=found.task, method=method, copy=False)


class Packed(Eighth):
    """A kernel for inference only: nothing flows back through it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


def test_a_quantised_layer_that_cuts_gradients_is_refused() -> None:
    """As bitsandbytes' packed 4-bit layers do on some CPUs in eval mode: earlier adapters would train on a part."""
    found = tiny("causal_lm")
    base = squeezed(found.model, Packed)
    with pytest.raises(Refused, match="passes no gradient"):
        unlearn(base, found.request, task=found.task, method=in_adapter(LoRA(4), step(), merge=False))


def test_four_bits_by_bitsandbytes(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")

    def four(layer: nn.Linear) -> nn.Module:
        made = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
        )
        made.support_avx512bf16_for_cpu = False  # packs weights in place in eval mode, by blocks of 64: these have 32
        made.load_state_dict({"weight": layer.weight.detach().clone()})
        return made.to("cpu")

    check_on(four, tmp_path)


def test_a_seed_is_the_same_bits_on_a_quantised_base() -> None:
    found = tiny("causal_lm")
    base = squeezed(found.model, Eighth)
    method = in_adapter(LoRA(4), step(steps=3), merge=False)
    runs = [unlearn(base, found.request, task=found.task, method=method, seed=s).model for s in (1, 1, 2)]
    assert moved(weights(runs[0]), runs[1]) == set()
    assert moved(weights(runs[0]), runs[2])
    assert Key(1) != Key(2)
