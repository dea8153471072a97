"""MRP against plain torch, the release's numbers, and each defect of the release by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expunge as ex
from expunge import projection
from expunge.core import Case, Key
from expunge.methods.mrp import mrp
from expunge.projection import Projection, attach, fold, initial_rows, load_projected, projections
from expunge.states import chosen_layers, layer_states, second_moments
from tests.fixtures import tiny
from tests.golden.by_hand import ALL

BLOCK, DOWN = "model.layers.0", "model.layers.0.mlp.down_proj"


def case_of(found: Any, model: nn.Module | None = None) -> Case:
    model = found.model if model is None else model
    return Case(model, found.request, found.task, ex.Scope.all(model), {"original": found.model})


def drawn(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=Key(seed).generator(), dtype=torch.float64)


def whole(data: Any) -> Any:
    return data.batch(torch.arange(len(data)))


def logits(model: nn.Module, found: Any) -> Tensor:
    with torch.no_grad():
        return found.task.outputs(model, whole(found.request.forget))


def through(rows: Tensor) -> Tensor:
    """The projector on the span of the rows, by least squares and no QR."""
    return torch.linalg.pinv(rows) @ rows


def unlearned(found: Any, **settings: Any) -> Any:
    return ex.unlearn(found.model, found.request, task=found.task, method=mrp(**settings), seed=5)


def test_rows_are_orthonormal_and_the_projection_is_idempotent() -> None:
    made = Projection(torch.linalg.qr(drawn(6, 2)).Q.T)
    made.begin(drawn(3, 6, 1))
    basis, states = made.basis(), drawn(10, 6, 2)
    torch.testing.assert_close(basis @ basis.T, torch.eye(5, dtype=torch.float64))
    once = made(states)
    torch.testing.assert_close(made(once), once)
    torch.testing.assert_close(once, states - states @ through(torch.cat((made.kept, made.rows))))


@pytest.mark.parametrize("bias", [False, True])
def test_folding_equals_the_hook(bias: bool) -> None:
    layer, states = nn.Linear(7, 5, bias=bias).double(), drawn(9, 7)
    plain = copy.deepcopy(layer)
    attach(layer, torch.linalg.qr(drawn(5, 2)).Q.T)
    hooked = layer(states)
    assert not torch.equal(hooked, plain(states))
    fold(layer)
    assert not layer._forward_hooks
    assert not projections(layer)
    torch.testing.assert_close(layer(states), hooked, rtol=1e-12, atol=1e-12)


def test_folding_a_whole_model_leaves_a_plain_one_with_the_same_answers() -> None:
    found = tiny("causal_lm")
    done = unlearned(found, layers="*.mlp.down_proj", steps=3)
    before = logits(done.model, found)
    plain = fold(done.model)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in found.model.named_parameters()]
    torch.testing.assert_close(logits(plain, found), before, rtol=1e-4, atol=1e-5)
    changed = {n for n, p in found.model.named_parameters() if not torch.equal(p, dict(plain.named_parameters())[n])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}


def test_a_blocks_output_cannot_be_folded_and_nothing_is_half_done() -> None:
    found = tiny("causal_lm")
    done = unlearned(found, layers=f"{BLOCK},*.1.mlp.down_proj", steps=1)
    with pytest.raises(ex.Refused, match=r"'model.layers.0' cannot be folded: expected a torch.nn.Linear"):
        fold(done.model)
    assert set(projections(done.model)) == {BLOCK, "model.layers.1.mlp.down_proj"}


def released(offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Five forget and three retain states of width 6, as the release's ``init_W`` was given them."""
    numbers = torch.arange(1.0, 31.0).view(5, 6)
    return torch.sin(numbers * numbers).double(), torch.cos(3 * numbers[:3] * numbers[:3]).double()


def moments(states: Tensor) -> Tensor:
    return states.T @ states


def test_a_initialisation_is_of_forget_states_outside_of_the_retain_span() -> None:
    """``init_W`` of ChengcanWu/MRP with its arguments exchanged, in float32: the projector on its two directions.

    As it is called there, it gives directions of RETAIN states outside of the forget span: far from these."""
    diagonal = [0.09206410, 0.08364820, 0.69617218, 0.04314162, 0.25227046, 0.83270335]
    first = [0.09206410, -0.01709206, -0.10939434, 0.03820128, -0.00129630, 0.26432559]
    forget, retain = released()
    rows = initial_rows(moments(forget), moments(retain), torch.zeros(0, 6, dtype=torch.float64), 2, 1.0)
    projector = rows.T @ rows
    torch.testing.assert_close(projector.diagonal(), torch.tensor(diagonal, dtype=torch.float64), rtol=0, atol=2e-5)
    torch.testing.assert_close(projector[0], torch.tensor(first, dtype=torch.float64), rtol=0, atol=2e-5)
    assert float((rows @ retain.T).abs().max()) < 1e-9
    exchanged = initial_rows(moments(retain), moments(forget), torch.zeros(0, 6, dtype=torch.float64), 1, 0.9)
    assert float((exchanged @ retain.T).norm()) > 0.5  # it would take out what the retain states have


def test_b_more_tokens_than_dimensions_leave_something_to_take_out() -> None:
    """A whole span of ten tokens in four dimensions is the whole space; ours is truncated, whatever share is asked."""
    forget, retain, none = drawn(10, 4), drawn(10, 4, 1), torch.zeros(0, 4, dtype=torch.float64)
    whole_span = torch.linalg.qr(retain.T).Q
    assert float((forget - forget @ whole_span @ whole_span.T).norm()) < 1e-12
    for share in (0.5, 0.9, 1.0):
        rows = initial_rows(moments(forget), moments(retain), none, 2, share)
        torch.testing.assert_close(rows @ rows.T, torch.eye(2, dtype=torch.float64))
        assert float((forget @ rows.T).norm()) > 0.1


def test_b_the_span_is_as_few_directions_as_carry_the_share() -> None:
    retain = torch.diag(torch.tensor([6.0, 3.0, 1.0, 0.0, 0.0])).double()
    forget, none = torch.diag(torch.tensor([100.0, 50.0, 20.0, 2.0, 1.0])).double(), torch.zeros(0, 5).double()
    taken = {
        share: int(initial_rows(forget, retain, none, 1, share).abs().argmax())
        for share in (0.0, 0.5, 0.6, 0.7, 0.9, 0.95, 1.0)
    }
    assert taken == {0.0: 0, 0.5: 1, 0.6: 1, 0.7: 2, 0.9: 2, 0.95: 3, 1.0: 3}
    with pytest.raises(ex.Refused, match=r"at most 2"):
        initial_rows(forget, retain, torch.eye(5).double()[:2], 4, 0.5)
    with pytest.raises(ex.Refused, match="fewer than 1 directions outside"):
        initial_rows(torch.diag(torch.tensor([1.0, 0, 0, 0, 0])).double(), retain, none, 1, 0.5)


def test_c_without_earlier_directions_none_is_taken_out() -> None:
    """The release's row of zeros: QR answers with an axis, which is then missing from every state."""
    zeros = torch.cat((torch.zeros(1, 5), torch.ones(1, 5))).double()
    assert len(torch.linalg.qr(zeros.T).Q.T) == 2
    states = drawn(4, 5)
    assert torch.equal(Projection(torch.zeros(0, 5, dtype=torch.float64))(states), states)
    found = tiny("causal_lm")
    done = unlearned(found, layers=BLOCK, rank=1, steps=1)
    assert projections(done.model)[BLOCK].kept.shape == (1, 32)


def test_d_states_are_of_the_very_place_that_is_projected() -> None:
    """Outputs of the block, as a hook on it sees them: transformers' hidden_states[i] is the input of block i."""
    found = tiny("causal_lm")
    batch = whole(found.request.forget)
    aligned = found.task.aligned(batch)
    with torch.no_grad():
        ours = layer_states(case_of(found), batch, [BLOCK])[BLOCK]
        given = found.model(
            aligned["input_ids"], attention_mask=aligned["attention_mask"], output_hidden_states=True
        ).hidden_states
    real = aligned["attention_mask"] == 1
    torch.testing.assert_close(ours[real], given[1][real])
    assert not torch.allclose(ours[real], given[0][real], atol=0.1)


def test_e_directions_stay_in_float32_in_a_model_of_bfloat16() -> None:
    layer = nn.Linear(6, 6).bfloat16()
    made = attach(layer, projection.empty(layer, 6))
    made.begin(drawn(2, 6))
    states = drawn(5, 6, 3).bfloat16()
    assert made.basis().dtype == torch.float32
    assert layer(states).dtype == torch.bfloat16
    wanted = Projection(made.basis().detach().double())(nn.Linear.forward(layer, states).double()).bfloat16()
    assert torch.equal(layer(states), wanted)


def test_f_only_directions_are_trained_and_they_do_move() -> None:
    found = tiny("causal_lm")
    models = [unlearned(found, layers=BLOCK, steps=steps).model for steps in (1, 6)]
    kept = [projections(model)[BLOCK].kept for model in models]
    assert float((through(kept[0]) - through(kept[1])).norm()) > 1e-3
    for name, p in found.model.named_parameters():
        assert torch.equal(p, dict(models[1].named_parameters())[name])
    assert len(list(models[1].parameters())) == len(list(found.model.parameters()))


def test_g_drawn_blocks_are_a_function_of_the_key_and_never_the_last() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    found = tiny("causal_lm")
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=6, n_head=2)
    with torch.random.fork_rng([]):
        case = case_of(found, GPT2LMHeadModel(config).eval())
    draws = [tuple(chosen_layers(case, None, Key(seed), 2)) for seed in range(40)]
    assert draws == [tuple(chosen_layers(case, None, Key(seed), 2)) for seed in range(40)]
    assert all(len(draw) == 2 and draw == tuple(sorted(draw)) for draw in draws)
    assert {name for draw in draws for name in draw} == {f"transformer.h.{i}" for i in range(5)}


@pytest.mark.parametrize("tokens", ["attended", "answer"])
def test_h_padding_is_not_in_the_moments(tokens: Any) -> None:
    """Row by row without any padding, on what transformers says; and the same at any width of padding, on any side."""
    found = tiny("causal_lm")
    case, data = case_of(found), found.request.forget
    ours = second_moments(case, data, [BLOCK], Key(0), tokens)[BLOCK]
    total = torch.zeros(32, 32, dtype=torch.float64)
    batch = whole(data)
    assert len(batch["attention_mask"].sum(1).unique()) > 1, "examples are all as long: no test of the mask"
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        with torch.no_grad():
            states = found.model(ids[mask == 1][None], output_hidden_states=True).hidden_states[1][0].double()
        states = states if tokens == "attended" else states[labels[mask == 1] != -100]
        total += states.T @ states
    torch.testing.assert_close(ours, total, rtol=1e-4, atol=1e-4)
    fill = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    for side in ((0, 5), (5, 0)):
        wide = {name: nn.functional.pad(batch[name], side, value=value) for name, value in fill.items()}
        padded = second_moments(case, ex.as_data(wide), [BLOCK], Key(0), tokens)[BLOCK]
        torch.testing.assert_close(padded, ours, rtol=1e-5, atol=1e-5)


def test_golden_steps() -> None:
    """Four steps of gradient descent on W by hand, with a projector that is made without QR."""
    found = tiny("causal_lm")
    start = unlearned(found, layers=BLOCK, steps=1, lr=1e-12, batch=ALL)
    done = unlearned(found, layers=BLOCK, steps=4, lr=0.3, retain_weight=1.5, batch=ALL)
    rows = projections(start.model)[BLOCK].kept.clone().requires_grad_(True)
    forget, retain = whole(found.request.forget), whole(found.request.retain)
    net = copy.deepcopy(found.model)

    def project(_module: nn.Module, _args: Any, output: Any) -> Any:
        states = output if isinstance(output, Tensor) else output[0]
        inner = torch.linalg.solve(rows @ rows.T, rows @ states.transpose(1, 2)).transpose(1, 2)
        return states - inner @ rows if isinstance(output, Tensor) else (states - inner @ rows, *output[1:])

    net.model.layers[0].register_forward_hook(project)
    for _ in range(4):
        up, down = (found.task.nll(net, b).sum() / found.task.units(b).sum() for b in (forget, retain))
        (grad,) = torch.autograd.grad(-up + 1.5 * down, rows)
        rows = (rows - 0.3 * grad).detach().requires_grad_(True)
    kept = projections(done.model)[BLOCK].kept
    torch.testing.assert_close(kept.T @ kept, through(rows.detach()), rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(logits(done.model, found), logits(net, found), rtol=1e-3, atol=2e-3)


def test_further_requests_keep_earlier_directions_out_and_add_their_own() -> None:
    found = tiny("causal_lm")
    one = unlearned(found, layers=BLOCK, steps=3)
    two = ex.unlearn(one.model, found.request, task=found.task, method=mrp(steps=3, rank=1), seed=6)
    old, new = projections(one.model)[BLOCK].kept, projections(two.model)[BLOCK].kept
    assert old.shape == (2, 32), "the first model was changed by the second request"
    assert new.shape == (3, 32)
    torch.testing.assert_close(old @ new.T @ new, old, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new @ new.T, torch.eye(3), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        states = layer_states(case_of(found, two.model), whole(found.request.retain), [BLOCK])[BLOCK]
    assert float((states @ old.T).abs().max()) < 1e-4 * float(states.abs().max())


def test_saved_weights_answer_alike_also_after_a_copy(tmp_path: Any) -> None:
    found = tiny("causal_lm")
    done = unlearned(found, steps=3)
    ex.save_weights(done.model, tmp_path / "weights.safetensors")
    again = load_projected(found.make(9), tmp_path / "weights.safetensors")
    assert torch.equal(logits(again, found), logits(done.model, found))
    assert torch.equal(logits(copy.deepcopy(again), found), logits(done.model, found))
    with pytest.raises(ex.Refused, match="does not fit"):
        ex.load_weights(found.make(9), tmp_path / "weights.safetensors")


def test_a_finished_run_is_read_back_with_its_projection(tmp_path: Any) -> None:
    found = tiny("causal_lm")
    first, second = (
        ex.unlearn(found.model, found.request, task=found.task, method=mrp(steps=2), out=tmp_path / "run")
        for _ in range(2)
    )
    assert torch.equal(logits(first.model, found), logits(second.model, found))
    assert projections(second.model)


def test_a_run_that_fails_leaves_no_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tiny("causal_lm")

    def broken(*_: Any) -> Any:
        raise ex.RunFailed("broken")

    monkeypatch.setattr(ex.Descend, "__call__", broken)
    with pytest.raises(ex.RunFailed):
        ex.unlearn(found.model, found.request, task=found.task, method=mrp(), copy=False)
    assert not projections(found.model)
    assert not found.model.model.layers[0]._forward_hooks


def test_layers_that_cannot_be_projected_are_refused() -> None:
    found = tiny("causal_lm")
    with pytest.raises(ex.Refused, match="matches no module"):
        unlearned(found, layers="*.layers.7", steps=1)
    with pytest.raises(ex.Refused, match="one vector per token"):
        unlearned(found, layers="*rotary_emb", steps=1)


def test_it_forgets_more_than_it_harms() -> None:
    found = tiny("causal_lm")
    done = unlearned(found)
    forget, retain = whole(found.request.forget), whole(found.request.retain)
    with torch.no_grad():
        rises = [
            float((found.task.nll(done.model, b) - found.task.nll(found.model, b)).sum() / found.task.units(b).sum())
            for b in (forget, retain)
        ]
    assert rises[0] > 0.5
    assert rises[0] > 2 * rises[1]


@pytest.mark.parametrize("weight", [0.0, 1.2])
def test_the_declared_price_is_what_is_paid(weight: float) -> None:
    """The contract stops at its declared departure before it comes to this."""
    found = tiny("causal_lm")
    cost = unlearned(found, steps=3, batch=7, sample=30, retain_weight=weight).record["cost"]
    rows = 3 * (7 + (weight > 0) * 7)
    assert (cost["forward"], cost["backward"]) == (rows + 20 + 30, rows)


def test_taking_all_there_is_is_refused() -> None:
    """A state without any direction left is 0 for every token: no projection, a model that says the same to all."""
    for rank in (32, 33):
        with pytest.raises(ex.Refused, match=r"one at least must be left, give a rank of at most 31"):
            unlearned(tiny("causal_lm"), layers=BLOCK, rank=rank, steps=1)


def test_a_pattern_does_not_project_an_earlier_projection() -> None:
    found = tiny("causal_lm")
    one = unlearned(found, layers=BLOCK, steps=1)
    pattern = f"{BLOCK},{BLOCK}.proj*"
    two = ex.unlearn(one.model, found.request, task=found.task, method=mrp(layers=pattern, steps=1)).model
    assert {name: len(made.kept) for name, made in projections(two).items()} == {BLOCK: 4}


def test_the_tokens_that_are_asked_for_start_the_directions() -> None:
    found = tiny("causal_lm")
    case = case_of(found)
    for tokens in ("attended", "answer"):
        done = unlearned(found, layers=BLOCK, steps=1, lr=1e-30, tokens=tokens)
        moment = [
            second_moments(case, d, [BLOCK], Key(0), tokens)[BLOCK]
            for d in (found.request.forget, found.request.retain)
        ]
        rows = initial_rows(*moment, torch.zeros(0, 32, dtype=torch.float64), 2, 0.9).float()
        kept = projections(done.model)[BLOCK].kept
        torch.testing.assert_close(through(kept), through(rows), rtol=1e-3, atol=1e-4)


def test_the_scope_of_the_case_comes_back() -> None:
    found = tiny("causal_lm")
    done = unlearned(found, layers=BLOCK, steps=1)
    assert done.case is not None
    assert done.case.scope.parameters(done.model).keys() == {name for name, _ in found.model.named_parameters()}
