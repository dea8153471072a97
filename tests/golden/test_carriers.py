"""Carriers beside LoRA: each one's formula by hand, and the contracts that LoRA is held to, on every one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.adapter_layers import Adapted
from expunge.adapters import LoRA, RandLoRA, SLTrain, carrier, carriers
from expunge.checkpointing import with_checkpointing
from expunge.core import Case, Key, Refused, chain
from expunge.objectives import NLL
from expunge.run import unlearn
from expunge.scope import Scope, edit
from expunge.spectral_adapters import SST, SVFit, WeLore
from expunge.wrap import in_adapter
from tests.fixtures import seeded, tiny
from tests.unit.test_wrap import Dying, Look, Stop, case_of, moved, shape_of, step, weights

peft = pytest.importorskip("peft")
torch.set_num_threads(1)

CARRIERS = [
    LoRA(4),
    LoRA(4, stabilised=True),
    RandLoRA(4, alpha=8.0),
    SVFit(6),
    WeLore(0.5, reduction=0.3),
    SLTrain(2, density=0.1),
    SST(3),
]
DRAWN = (LoRA, RandLoRA, SLTrain, SST)
every = pytest.mark.parametrize("chosen", CARRIERS, ids=repr)
both = pytest.mark.parametrize("name", ["classification", "causal_lm"])


@every
@both
def test_the_function_is_the_base_at_first_and_the_merged_one_at_last(
    chosen: Any, name: str, poisoned_randomness: Any
) -> None:
    """Output equal to the bit before the first step; merged equal to rounding after the last; nothing else moves."""
    found, untouched = tiny(name), tiny(name).model
    batch = found.test.batch(torch.arange(12))
    structure, before = shape_of(found.model), weights(found.model)

    def says(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return found.task.outputs(model, batch)

    def teacher(case: Case) -> bool:
        off = replace(case, teachers={"original": case.teachers["off"]})
        with off.teacher("original") as model:
            return torch.equal(says(model), says(untouched))

    first, last = Look(lambda case: says(case.model)), Look(lambda case: says(case.model))
    off = Look(lambda case: with_off(case, teacher))
    case = case_of(found, teachers={})
    after = in_adapter(chosen, chain(first, step(steps=4), last, off))(case)
    assert torch.equal(first.result, says(untouched))
    assert (last.result - first.result).abs().max() > 1e-3
    torch.testing.assert_close(says(after.model), last.result, rtol=1e-4, atol=1e-4)
    assert off.result
    assert shape_of(after.model) == structure
    assert after.scope is case.scope
    assert moved(before, after.model) == {f"{n}.weight" for n in chosen.layers(untouched, case.scope)}


def with_off(case: Case, look: Any) -> Any:
    return look(replace(case, teachers={"off": case.teachers["original"]}))


@every
def test_a_mask_is_obeyed_to_the_bit_and_the_function_kept(chosen: Any) -> None:
    found = tiny("causal_lm")
    generator = Key(2).generator()
    masks = {n: torch.rand(p.shape, generator=generator) < 0.3 for n, p in found.model.named_parameters() if p.ndim > 1}
    scope = Scope(masks, Scope.all(found.model).universe)
    before, batch = weights(found.model), found.test.batch(torch.arange(12))
    inside = Look(lambda case: case.task.nll(case.model, batch).detach())
    after = in_adapter(chosen, chain(step(steps=4), inside))(case_of(found, scope))
    for layer, value in after.model.state_dict().items():
        mask = masks.get(layer, torch.zeros(value.shape, dtype=torch.bool))
        assert torch.equal(value[~mask], before[layer][~mask])
    assert moved(before, after.model)
    with torch.no_grad():
        merged = found.task.nll(after.model, batch)
    torch.testing.assert_close(merged, inside.result, rtol=1e-4, atol=1e-4)


@every
def test_a_seed_is_the_same_bits_and_another_is_not(chosen: Any) -> None:
    found = tiny("classification")
    runs = [
        unlearn(found.model, found.request, task=found.task, method=in_adapter(chosen, step(steps=2)), seed=s).model
        for s in (1, 1, 2)
    ]
    assert moved(weights(runs[0]), runs[1]) == set()
    assert moved(weights(runs[0]), runs[2])
    starts = []
    for seed in (1, 1, 2):
        look = Look(lambda case: {n: p.detach().clone() for n, p in case.model.state_dict().items()})
        in_adapter(chosen, look)(case_of(found, rng=Key(seed)))
        starts.append(look.result)
    assert all(torch.equal(value, starts[1][n]) for n, value in starts[0].items())
    same = all(torch.equal(value, starts[2][n]) for n, value in starts[0].items() if value.shape == starts[2][n].shape)
    assert same == (not isinstance(chosen, DRAWN))


@every
def test_a_killed_run_ends_in_the_same_bits(chosen: Any, tmp_path: Path) -> None:
    found = tiny("classification")

    def run(retain: Any, **where: Any) -> Any:
        method = in_adapter(chosen, step(retain=retain, steps=4))
        return unlearn(found.model, found.request, task=found.task, method=method, **where)

    whole = run(NLL()).model
    with pytest.raises(Stop):
        run(Dying(3), out=tmp_path / "run", every=0.0)
    assert moved(weights(whole), run(NLL(), out=tmp_path / "run", every=0.0).model) == set()


@every
def test_half_precision_keeps_its_type(chosen: Any) -> None:
    found = tiny("classification")
    model = found.model.bfloat16()
    calls = replace(found.task, call=lambda model, batch: model(batch["x"].bfloat16()).float())
    before = weights(model)
    case = Case(model, found.request, calls, Scope.all(model), {"original": copy.deepcopy(model)})
    after = in_adapter(chosen, step(steps=3))(case)
    assert {p.dtype for p in after.model.parameters()} == {torch.bfloat16}
    assert moved(before, after.model)


# Each formula by hand


def filled(chosen: Any, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The adapter's tensors after its parameters are set to drawn numbers; weights before and after the merge."""
    before, seen = weights(model), Look()

    def fill(case: Case) -> Case:
        drawn = {
            n: p.detach() + 0.3 * torch.randn(p.shape, generator=Key(1).at(n).generator())
            for n, p in case.scope.parameters(case.model).items()
        }
        return edit(case, drawn)

    seen.do = lambda case: {n: t.detach().clone() for n, t in case.model.state_dict().items()}
    task = tiny("classification").task
    case = Case(model, tiny("classification").request, task, Scope.all(model), rng=Key(5))
    after = in_adapter(chosen, chain(fill, seen))(case).model
    return seen.result, before, weights(after)


def layers_by_hand() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2), nn.Conv2d(2, 3, 2)))(0)


def test_randlora_by_hand() -> None:
    """Sum over bases of B_j diag(lambda_j) A diag(gamma_j), times alpha / rank, on the smaller side.

    peft numbers the columns of all B_j in one row, k * bases + j for column k of base j: another draw of the same law.
    """
    inside, before, after = filled(RandLoRA(2, alpha=6.0), layers_by_hand())
    for layer, (rows, columns) in {"0": (5, 3), "1": (2, 5)}.items():
        lambdas, gammas = inside[f"{layer}.randlora_lambda.default"], inside[f"{layer}.randlora_gamma.default"]
        bases_a, bases_b = inside[f"{layer}.randlora_A.default"], inside[f"{layer}.randlora_B.default"]
        small, large = min(rows, columns), max(rows, columns)
        count = -(-small // 2)
        assert lambdas.shape == (2, count)
        assert gammas.shape == (count, small)
        columns_b = bases_b[:large, :count].flatten(1)
        change = torch.zeros(large, small)
        for k in range(2):
            for j in range(count):
                change += torch.outer(columns_b[:, k * count + j], lambdas[k, j] * bases_a[k, 0, :small] * gammas[j])
        change = change if rows == large else change.T
        torch.testing.assert_close(after[f"{layer}.weight"], before[f"{layer}.weight"] + 3.0 * change)
    assert torch.equal(after["2.weight"], before["2.weight"])  # a convolution is left out


def test_svfit_by_hand() -> None:
    inside, before, after = filled(SVFit(2), layers_by_hand())
    for layer in ("0", "1", "2"):
        matrix = before[f"{layer}.weight"].flatten(1).double()
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
        learnt = values.clone()
        learnt[:2] = inside[f"{layer}.change.values"].double()
        expected = (u @ torch.diag(learnt) @ vt).float().reshape(before[f"{layer}.weight"].shape)
        torch.testing.assert_close(after[f"{layer}.weight"], expected, rtol=1e-5, atol=1e-6)
    parameters = sum(p.numel() for n, p in inside.items() if n.endswith("values"))
    assert parameters == 6


def of_values(*values: float) -> nn.Linear:
    """A layer whose weight has these singular values."""
    size, layer = len(values), nn.Linear(len(values), len(values), bias=False)
    drawn = torch.randn(2, size, size, generator=Key(4).generator(), dtype=torch.float64)
    left, right = torch.linalg.qr(drawn[0])[0], torch.linalg.qr(drawn[1])[0]
    with torch.no_grad():
        layer.weight.copy_(left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right)
    return layer


def test_welore_picks_the_weights_of_low_rank_and_their_rank() -> None:
    """Scaled to their range: (1, .5, .05, .01, 0) keeps two of five at 0.135; (1, .9, .8, .7, 0) keeps four: frozen."""
    model = nn.Sequential(of_values(2.0, 1.5, 1.05, 1.01, 1.0), of_values(2.0, 1.9, 1.8, 1.7, 1.0))
    chosen = WeLore()
    assert set(chosen.layers(model, Scope.all(model))) == {"0"}
    inside, before, after = filled(chosen, model)
    left, right = inside["0.change.left"], inside["0.change.right"]
    assert left.shape == (5, 2)
    u, values, vt = torch.linalg.svd(before["0.weight"].double())
    rest = u[:, 2:] @ torch.diag(values[2:]) @ vt[2:]  # stays, where the authors drop it
    torch.testing.assert_close(after["0.weight"], (rest + left.double() @ right.double()).float())
    assert torch.equal(after["1.weight"], before["1.weight"])
    assert set(WeLore(reduction=0.1).layers(model, Scope.all(model))) == {"0", "1"}
    with pytest.raises(Refused, match="threshold"):
        WeLore(0.01).layers(model, Scope.all(model))


def test_sltrain_by_hand() -> None:
    inside, before, after = filled(SLTrain(2, alpha=6.0, density=0.3), layers_by_hand())
    for layer, count in (("0", 4), ("1", 3), ("2", 7)):  # int of 0.3 times 15, 10 and 24
        support, entries = inside[f"{layer}.change.support"], inside[f"{layer}.change.entries"]
        assert len(support) == count
        assert bool((support[1:] > support[:-1]).all())
        sparse = torch.zeros(before[f"{layer}.weight"].numel())
        sparse[support] = entries
        low = 3.0 * inside[f"{layer}.change.left"] @ inside[f"{layer}.change.right"]
        expected = before[f"{layer}.weight"] + (low.flatten() + sparse).reshape(before[f"{layer}.weight"].shape)
        torch.testing.assert_close(after[f"{layer}.weight"], expected)
    bound = 3**-0.5
    fresh = Look(lambda case: case.model.state_dict())
    model = layers_by_hand()
    in_adapter(SLTrain(2), fresh)(
        Case(model, tiny("classification").request, tiny("classification").task, Scope.all(model))
    )
    assert fresh.result["0.change.right"].abs().max() <= bound
    assert not fresh.result["0.change.left"].any()
    assert not fresh.result["0.change.entries"].any()


def test_sst_by_hand() -> None:
    inside, before, after = filled(SST(2), layers_by_hand())
    for layer in ("0", "1", "2"):
        u, _, vt = torch.linalg.svd(before[f"{layer}.weight"].flatten(1), full_matrices=False)
        drawn = inside[f"{layer}.change.drawn"]
        assert len(drawn) == 2
        u, vt = u.clone(), vt.clone()
        u[:, drawn], vt[drawn] = inside[f"{layer}.change.left"], inside[f"{layer}.change.right"]
        expected = (u @ torch.diag(inside[f"{layer}.change.values"]) @ vt).reshape(before[f"{layer}.weight"].shape)
        torch.testing.assert_close(after[f"{layer}.weight"], expected, rtol=1e-4, atol=1e-5)


def test_sst_draws_large_singular_values_more_often() -> None:
    """One of (8, 1, 1), each drawn in proportion: the first in 0.8 of 400 draws, give or take 0.06 (three deviations)."""
    layer, first = of_values(8.0, 1.0, 1.0), 0
    for seed in range(400):
        first += int(SST(1)._change(layer, Key(seed)).drawn[0] == 0)
    assert abs(first / 400 - 0.8) < 0.06


def test_a_chain_of_sst_brackets_decomposes_and_draws_anew() -> None:
    found = tiny("classification")
    looks = [Look(lambda case: {n: b.clone() for n, b in case.model.named_buffers() if "drawn" in n}) for _ in range(2)]
    rounds = [in_adapter(SST(2), chain(look, step(steps=2))) for look in looks]
    unlearn(found.model, found.request, task=found.task, method=chain(*rounds))
    assert any(not torch.equal(looks[0].result[n], looks[1].result[n]) for n in looks[0].result)


@every
def test_gradients_of_own_layers_are_those_of_finite_differences(chosen: Any) -> None:
    """In float64, of a loss of the output, in every trained number of a small layer: thin path and whole path alike."""
    if isinstance(chosen, (LoRA, RandLoRA)):
        pytest.skip("peft's layers: their formulas are tested above and in test_wrap.py")
    for base, size in ((nn.Linear(4, 3), (2, 4)), (nn.Conv2d(2, 3, 2), (2, 2, 3, 3))):
        layer = nn.Sequential(seeded(lambda base=base: base)(0).double())
        chosen.attach(layer, {"0": layer[0]}, Key(0))
        with torch.no_grad():
            for name, parameter in layer[0].change.named_parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=Key(3).at(name).generator()).double())
        x = torch.randn(size, generator=Key(8).generator(), dtype=torch.float64)
        names = [name for name, _ in layer.named_parameters() if ".change." in name]
        values = [p.detach().clone().requires_grad_(True) for n, p in layer.named_parameters() if n in names]

        def loss(*values: Tensor, layer: Any = layer, names: list[str] = names, x: Tensor = x) -> Tensor:
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)).square().sum()

        assert torch.autograd.gradcheck(loss, values)


# Names and settings


def test_carriers_by_name() -> None:
    assert list(carriers()) == ["lora", "randlora", "svfit", "welore", "sltrain", "sst"]
    assert carrier("lora", rank=4, targets=["q_proj"]) == LoRA(4, targets=("q_proj",))
    assert carrier("SVFit", rank=3, targets="fc") == SVFit(3, targets=("fc",))
    with pytest.raises(Refused, match="did you mean 'randlora'"):
        carrier("rand-lora")
    with pytest.raises(Refused, match="did you mean 'rank'"):
        carrier("lora", ranks=4)
    with pytest.raises(Refused, match="rank must be a whole number, found '8'"):
        carrier("lora", rank="8")
    with pytest.raises(Refused, match="targets must be names"):
        carrier("lora", targets=[3])


def test_bad_settings_are_refused_by_name() -> None:
    bad: list[tuple[Any, dict[str, Any]]] = [
        (RandLoRA, {"rank": 0}),
        (RandLoRA, {"alpha": 0.0}),
        (SVFit, {"rank": 0}),
        (WeLore, {"threshold": 1.0}),
        (WeLore, {"reduction": 1.0}),
        (SLTrain, {"rank": 0}),
        (SLTrain, {"alpha": -1.0}),
        (SLTrain, {"density": 0.0}),
        (SST, {"rank": 0}),
    ]
    for kind, settings in bad:
        with pytest.raises(Refused, match=next(iter(settings))):
            kind(**settings)
    found = tiny("classification")
    with pytest.raises(Refused, match="adapters already"):
        in_adapter(SVFit(2), in_adapter(SVFit(2), step()))(case_of(found))
    with pytest.raises(Refused, match="SVFit target 'fc'"):
        in_adapter(SVFit(2, targets=("fc",)), step())(case_of(found))


# Checkpointing


def gradients(found: Any, *, bracket: bool, adapter: Any) -> tuple[dict[str, Tensor], int, int]:
    """Gradients of the NLL in the adapter's parameters, bytes that the graph kept, and forward calls of blocks."""
    kept, calls = [0], [0]
    batch = found.test.batch(torch.arange(12))

    def pack(tensor: Tensor) -> Tensor:
        kept[0] += tensor.numel() * tensor.element_size()
        return tensor

    def look(case: Case) -> dict[str, Tensor]:
        parameters = case.scope.parameters(case.model)
        for parameter in case.model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for block in case.model.model.layers:
            block.mlp.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = case.task.nll(case.model, batch).sum()
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    seen = Look(look)
    stage = in_adapter(adapter, chain(step(steps=2), seen))
    (with_checkpointing(stage) if bracket else stage)(case_of(found))
    return seen.result, kept[0], calls[0]


@pytest.mark.parametrize("adapter", [LoRA(4), RandLoRA(4, 8.0), SVFit(6)], ids=repr)
def test_checkpointing_trains_adapters_with_the_same_gradients_in_less_memory(adapter: Any) -> None:
    """In eval mode, with frozen embeddings: the switch of transformers does nothing here, and its old form no gradient."""
    plain, much, once = gradients(tiny("causal_lm"), bracket=False, adapter=adapter)
    lean, little, twice = gradients(tiny("causal_lm"), bracket=True, adapter=adapter)
    assert plain.keys() == lean.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(lean[name], grad, rtol=1e-6, atol=1e-6 * float(grad.abs().max()))
    assert sum(float(grad.abs().sum()) for grad in lean.values()) > 0
    assert little < 0.5 * much
    assert twice == 2 * once == 4


@pytest.mark.filterwarnings("ignore")
def test_the_switch_of_transformers_does_nothing_in_eval_mode() -> None:
    """Why there is a bracket: Descend trains in eval mode by default, and there that switch keeps every activation."""
    _, much, _ = gradients(tiny("causal_lm"), bracket=False, adapter=LoRA(4))
    switched = tiny("causal_lm")
    switched.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert gradients(switched, bracket=False, adapter=LoRA(4))[1] >= much
    assert gradients(switched, bracket=True, adapter=LoRA(4))[1] < 0.5 * much


def test_checkpointing_leaves_no_trace_and_counts_the_same_rows() -> None:
    found = tiny("causal_lm")
    structure = shape_of(found.model)
    runs = {}
    for name, method in (
        ("plain", in_adapter(LoRA(4), step())),
        ("lean", with_checkpointing(in_adapter(LoRA(4), step()))),
    ):
        runs[name] = unlearn(found.model, found.request, task=found.task, method=method)
    assert shape_of(found.model) == structure
    assert [type(m) for m in runs["lean"].model.modules()] == [type(m) for m in found.model.modules()]
    assert runs["lean"].record["cost"]["forward"] == runs["plain"].record["cost"]["forward"]
    for name, value in runs["plain"].model.state_dict().items():
        torch.testing.assert_close(runs["lean"].model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_checkpointing_finds_blocks_or_says_that_there_are_none() -> None:
    language, digits = tiny("causal_lm").model, tiny("classification").model
    assert with_checkpointing(step()).find(language) == list(language.model.layers)
    assert with_checkpointing(step(), ("model.layers.1*",)).find(language) == [language.model.layers[1]]
    with pytest.raises(Refused, match="blocks="):
        with_checkpointing(step()).find(digits)
    with pytest.raises(Refused, match=r"model\.layer"):
        with_checkpointing(step(), ("model.layer",)).find(language)


@pytest.mark.filterwarnings("ignore")
def test_the_users_own_reentrant_checkpointing_trains_adapters_too() -> None:
    """Its inputs need a gradient, and frozen embeddings give none: the adapter's gradients would be None."""
    results = []
    for switched in (False, True):
        found = tiny("causal_lm")
        if switched:
            found.model.gradient_checkpointing_enable({"use_reentrant": True})
        live = step(norm_stats="live", steps=4)
        results.append(in_adapter(LoRA(4), live)(case_of(found)).model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)


def test_own_layers_copy_with_the_model() -> None:
    """A deep copy inside the bracket is a model of its own: it does not run the original's weights."""
    found = tiny("causal_lm")
    batch = found.test.batch(torch.arange(4))

    def look(case: Case) -> None:
        other = copy.deepcopy(case.model)
        with torch.no_grad():
            for parameter in case.model.parameters():
                kept = parameter.clone()
                parameter.zero_()
                parameter.copy_(kept)
            assert torch.equal(case.task.nll(other, batch), case.task.nll(case.model, batch))
            for parameter in other.parameters():
                parameter.zero_()
            assert not torch.equal(case.task.nll(other, batch), case.task.nll(case.model, batch))
        assert any(isinstance(module, Adapted) for module in other.modules())

    with_checkpointing(in_adapter(SVFit(4), chain(step(steps=1), Look(look))))(case_of(found))
