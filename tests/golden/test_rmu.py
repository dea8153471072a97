"""RMU against plain torch, the benchmark code's numbers and the known mistakes of other code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expunge as ex
from expunge.core import Batch, Case, Key, map_tensors
from expunge.methods.rmu import rmu
from expunge.oracle import example_weights
from expunge.steer import HoldStates, Misdirect, blocks, chosen_layer, direction, hidden, mean_norm
from expunge.wrap import LoRA, in_adapter
from tests.fixtures import tiny
from tests.golden.by_hand import ALL

BLOCK = "model.layers.0"
ROWS = torch.arange(12)


def case_of(found: Any, model: nn.Module | None = None, **changes: Any) -> Case:
    model = found.model if model is None else model
    return Case(model, found.request, found.task, ex.Scope.all(model), {"original": found.model}, **changes)


def states(model: nn.Module, batch: Batch, block: int = 0) -> Tensor:
    """What transformers itself calls the hidden states after a block that is not the last one."""
    output = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    return output.hidden_states[block + 1]


def by_hand(difference: Tensor, mask: Tensor) -> list[float]:
    """Each example on its own: the plain mean over its counted tokens and the width."""
    return [float(row[kept].square().mean()) for row, kept in zip(difference.detach().double(), mask, strict=True)]


@pytest.mark.parametrize("tokens", ["attended", "answer"])
def test_losses_are_their_formulas(tokens: Any) -> None:
    found = tiny("causal_lm")
    moved = copy.deepcopy(found.model)
    with torch.no_grad():
        moved.model.layers[0].mlp.down_proj.weight.mul_(1.3)
    case, batch = case_of(found, moved), found.request.forget.batch(ROWS)
    mask = batch["attention_mask"] == 1 if tokens == "attended" else batch["labels"] != -100
    assert len(mask.sum(1).unique()) > 1, "examples are all as long: no test of the mask"
    target = 3.0 * direction(32, 5)
    values = Misdirect(BLOCK, 3.0, 5, tokens)(case, batch)
    assert values.tolist() == pytest.approx(by_hand(states(moved, batch) - target, mask), rel=1e-5)
    hold = HoldStates(BLOCK, tokens)
    values = hold(case, hold.draw(case, batch, Key(0)))
    expected = by_hand(states(moved, batch) - states(found.model, batch), mask)
    assert values.tolist() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(example_weights(case, hold, batch).cpu(), mask.sum(1).double())


class Table(nn.Module):
    """A model whose hidden states are known: a table of vectors, and logits that nobody reads."""

    def __init__(self, factor: float):
        super().__init__()
        token, place = torch.arange(6.0)[:, None], torch.arange(3.0)[None]
        self.block = nn.Embedding.from_pretrained((token + 1) * (place + 2) % 7 / 4 * factor, freeze=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.block(input_ids).mean(2, keepdim=True).expand(-1, -1, 6)


def test_the_benchmarks_numbers_at_batch_one_and_its_broadcast_above() -> None:
    """``compute_activation_loss`` of locuslab/open-unlearning, on the two rows alone and together.

    It divides sums [b] by counts [b, 1], so that together it gives (mean of sums) times (mean of 1 / counts)."""
    alone, together = [0.2569444444444445, 0.2604166666666667], 0.34375000000000006
    batch = {
        "id": torch.arange(2),
        "input_ids": torch.tensor([[0, 1, 2, 3], [4, 5, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, 1, 2, 3], [-100, 5, -100, -100]]),
    }
    case = Case(Table(1.0).double(), ex.Request(), ex.CausalLM(6), ex.Scope({}, ()), {"original": Table(0.5).double()})
    hold = HoldStates("block", "answer")
    values = hold(case, hold.draw(case, batch, Key(0))).detach()
    assert values.tolist() == pytest.approx(alone, rel=1e-12)
    sums, counts = values * torch.tensor([3.0, 1.0]), torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert float(sums.mean() * (1 / counts).mean()) == pytest.approx(together, rel=1e-12)
    assert abs(float(values.mean()) - together) > 0.05


def test_the_vector_is_one_for_the_run_positive_and_of_the_scale() -> None:
    u = direction(64, 9)
    assert float(u.norm()) == pytest.approx(1.0, rel=1e-6)
    assert bool((u > 0).all())
    assert torch.equal(u, direction(64, 9))
    assert not torch.equal(u, direction(64, 10))
    assert float(u.std() / u.mean()) == pytest.approx(3**-0.5, rel=0.25)  # of a uniform distribution on 0 to 1


@pytest.mark.parametrize("objective", [Misdirect(BLOCK, 2.0), HoldStates(BLOCK), Misdirect("model.layers.1", 2.0)])
def test_padding_and_cuts_change_no_value(objective: Any) -> None:
    """Wider padding, padding on the left, rows on their own: all the same."""
    found = tiny("causal_lm")
    case, batch = case_of(found, found.make(3)), found.request.forget.batch(ROWS)
    drawn = objective.draw if hasattr(objective, "draw") else lambda _case, batch, _rng: batch
    whole = objective(case, drawn(case, batch, Key(0)))
    fill = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    for side in ((0, 4), (4, 0)):
        wide = {n: nn.functional.pad(batch[n], side, value=fill[n]) if n in fill else batch[n] for n in (*fill, "id")}
        torch.testing.assert_close(objective(case, drawn(case, wide, Key(0))), whole, rtol=1e-5, atol=1e-7)
    ready = drawn(case, batch, Key(0))
    parts = [objective(case, map_tensors(lambda t, i=i: t[i : i + 1], ready)) for i in range(len(ROWS))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-7)


def test_nothing_is_run_beyond_the_block_and_no_hook_is_left() -> None:
    found = tiny("causal_lm")
    ran = []
    for layer in found.model.model.layers:
        layer.register_forward_pre_hook(lambda module, _args: ran.append(module))
    hooks = sum(len(m._forward_hooks) for m in found.model.modules())
    hidden(case_of(found), found.model, found.request.forget.batch(ROWS), BLOCK)
    assert ran == [found.model.model.layers[0]]
    assert sum(len(m._forward_hooks) for m in found.model.modules()) == hooks


def test_golden_steps() -> None:
    """Four steps of torch's AdamW on the one down-projection, on hidden states that transformers gives."""
    found = tiny("causal_lm")
    method = rmu(layer=BLOCK, scale=1.5, retain_weight=4.0, lr=1e-3, steps=4, batch=ALL)
    done = ex.unlearn(found.model, found.request, task=found.task, method=method, seed=11)
    forget, retain = (d.batch(torch.arange(len(d))) for d in (found.request.forget, found.request.retain))
    target = 1.5 * direction(32, used_seed(found, method, 11))
    net = copy.deepcopy(found.model).requires_grad_(False)
    weight = net.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([weight], 1e-3, weight_decay=0.0)
    for _ in range(4):
        up = (states(net, forget) - target)[forget["attention_mask"] == 1].square().mean()
        held = (states(net, retain) - states(found.model, retain).detach())[retain["attention_mask"] == 1]
        optimizer.zero_grad()
        (up + 4.0 * held.square().mean()).backward()
        optimizer.step()
    start = dict(found.model.named_parameters())
    for name, parameter in done.model.named_parameters():
        if name == f"{BLOCK}.mlp.down_proj.weight":
            torch.testing.assert_close(parameter, weight, rtol=1e-4, atol=2e-6)
            assert not torch.equal(parameter, start[name])
        else:
            assert torch.equal(parameter, start[name]), name


def used_seed(found: Any, method: Any, seed: int) -> int:
    """The seed of the direction that a run draws: seen on the objective itself."""
    seen: list[int] = []
    original = Misdirect.__call__

    def spy(self: Misdirect, case: Case, batch: Batch) -> Tensor:
        seen.append(self.seed)
        return original(self, case, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Misdirect, "__call__", spy)
        ex.unlearn(found.model, found.request, task=found.task, method=method, seed=seed)
    assert len(set(seen)) == 1, "the control vector changed within a run"
    return seen[0]


def test_another_seed_draws_another_vector() -> None:
    found, method = tiny("causal_lm"), rmu(steps=1)
    assert used_seed(found, method, 1) != used_seed(found, method, 2)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=40, n_positions=32, n_embd=16, n_layer=5, n_head=2, bos_token_id=0, eos_token_id=1
        )
        return GPT2LMHeadModel(config).eval()


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {name for (name, p), q in pairs if not torch.equal(p, q)}


def test_the_layer_and_the_few_matrices_are_found_in_another_family() -> None:
    """The middle of five blocks, and the last matrix of its perceptron and of the two below."""
    found, model = tiny("causal_lm"), gpt2()
    case = case_of(found, model)
    names = blocks(case)
    assert names == [f"transformer.h.{i}" for i in range(5)]
    assert chosen_layer(case, None, names) == "transformer.h.2"
    done = ex.unlearn(model, found.request, task=found.task, method=rmu(steps=2, batch=4))
    assert changed(model, done.model) == {f"transformer.h.{i}.mlp.c_proj.weight" for i in range(3)}
    done = ex.unlearn(model, found.request, task=found.task, method=rmu(layer="*.h.4", steps=2, batch=4))
    assert changed(model, done.model) == {f"transformer.h.{i}.mlp.c_proj.weight" for i in (2, 3, 4)}


def test_patterns_and_the_users_scope_decide_what_moves() -> None:
    found = tiny("causal_lm")
    method = rmu(layer=BLOCK, train="*layers.0.self_attn.[qk]*, *layers.0*v_proj*", steps=2)
    done = ex.unlearn(found.model, found.request, task=found.task, method=method)
    assert changed(found.model, done.model) == {f"{BLOCK}.self_attn.{n}_proj.weight" for n in "qkv"}
    with pytest.raises(ex.Refused, match="no_such"):
        ex.unlearn(found.model, found.request, task=found.task, method=rmu(train="no_such*", steps=2))
    scope = ex.Scope.match(found.model, "*gate_proj*")
    done = ex.unlearn(found.model, found.request, task=found.task, scope=scope, method=rmu(layer=BLOCK, steps=2))
    assert changed(found.model, done.model) == {f"{BLOCK}.mlp.gate_proj.weight"}
    head = ex.Scope.match(found.model, "lm_head*")
    with pytest.raises(ex.RunFailed, match="depends on none"):
        ex.unlearn(found.model, found.request, task=found.task, scope=head, method=rmu(steps=2))


def test_in_an_adapter_with_no_second_model() -> None:
    """The teacher is the model with its adapter off; only the adapted matrix comes back changed."""
    found = tiny("causal_lm")
    start = copy.deepcopy(found.model)
    method = in_adapter(LoRA(4), rmu(layer="*layers.0", steps=6, retain_weight=1.0))
    done = ex.unlearn(found.model, found.request, task=found.task, method=method, copy=False)
    assert changed(start, done.model) == {f"{BLOCK}.mlp.down_proj.weight"}


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("*layers.7", "no module"), ("*layers.*", "modules"), (f"{BLOCK}.self_attn.q_norm", "no module")],
)
def test_a_layer_that_is_not_one_module_is_refused(pattern: str, words: str) -> None:
    found = tiny("causal_lm")
    with pytest.raises(ex.Refused, match=f"{words}.*exactly one.*model.layers.0"):
        ex.unlearn(found.model, found.request, task=found.task, method=rmu(layer=pattern, steps=1))


def test_a_model_without_blocks_asks_for_a_layer_and_takes_one() -> None:
    found = tiny("causal_lm")
    task = ex.CausalLM(40)
    with pytest.raises(ex.Refused, match=r"no blocks were found.*layer="):
        ex.unlearn(Wide(), found.request, task=task, method=rmu(steps=1))
    done = ex.unlearn(Wide(), found.request, task=task, method=rmu(layer="mix", steps=2, retain_weight=1.0))
    assert "mix.weight" in changed(Wide(), done.model)
    with pytest.raises(ex.Refused, match="one vector per token"):
        ex.unlearn(Wide(), found.request, task=task, method=rmu(layer="flat", steps=1))


class Wide(nn.Module):
    """No list of blocks, and a module whose output is no hidden state."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.embed, self.flat, self.mix, self.head = (
                nn.Embedding(40, 8), nn.Flatten(0, 1), nn.Linear(8, 8), nn.Linear(8, 40),
            )  # fmt: skip

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded = self.embed(input_ids)
        return self.head(self.mix(self.flat(embedded).view_as(embedded)))


def test_pieces_do_not_matter() -> None:
    found = tiny("causal_lm")
    roles = {"forget": Misdirect(BLOCK, 1.0), "retain": HoldStates(BLOCK)}
    done = [
        ex.unlearn(
            found.model, found.request, task=found.task,
            method=ex.Descend(**roles, optimizer=ex.optim.SGD(0.1), steps=3, batch=13, accumulate=pieces),
        ).model
        for pieces in (1, 4)
    ]  # fmt: skip
    for p, q in zip(done[0].parameters(), done[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-7)


def test_the_scale_by_default_is_twice_the_mean_norm() -> None:
    found = tiny("causal_lm")
    batch = found.request.forget.batch(torch.arange(20))
    norms = states(found.model, batch).norm(dim=2)[batch["attention_mask"] == 1]
    assert mean_norm(case_of(found), BLOCK, "attended") == pytest.approx(float(norms.detach().mean()), rel=1e-5)
    measured = ex.unlearn(found.model, found.request, task=found.task, method=rmu(layer=BLOCK, steps=2))
    given = rmu(layer=BLOCK, steps=2, scale=2 * mean_norm(case_of(found), BLOCK, "attended"))
    given = ex.unlearn(found.model, found.request, task=found.task, method=given)
    assert changed(measured.model, given.model) == set()


def test_it_forgets_more_than_it_harms() -> None:
    found = tiny("causal_lm")
    done = ex.unlearn(found.model, found.request, task=found.task, method=rmu())
    forget, retain = (d.batch(torch.arange(len(d))) for d in (found.request.forget, found.request.retain))
    with torch.no_grad():
        rises = [
            float((found.task.nll(done.model, b) - found.task.nll(found.model, b)).sum() / found.task.units(b).sum())
            for b in (forget, retain)
        ]
    assert rises[0] > 0.3
    assert rises[0] > 2 * rises[1]
