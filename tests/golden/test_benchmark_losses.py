"""Ours beside the benchmark's code: equal where it is right, and different in the documented way where it is wrong.

Every number in capitals was computed by locuslab/open-unlearning at d3d7cf9 (src/trainer/utils.py, src/trainer/unlearn/
and src/evals/metrics/) on the tiny random Llama and the padded batch of unequal lengths of ``tiny_llama``: student and
judged model ``random_llama(0)``, reference model ``random_llama(1)``, forget answers ``ROWS``, refusals ``WINS``.
A pair is (mean loss, norm of its gradient on all weights).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expunge as ex
from expunge.attacks.gradient_norm import gradient_norms
from expunge.audit.extraction import matched, released_strength, strength
from expunge.confidence import LogitSpread
from expunge.core import Batch, Case, Key, Objective
from expunge.data.sources import as_data
from expunge.objectives import NPO, Distill, SimNPO
from expunge.oracle import example_weights, per_example
from expunge.preference import DPO
from expunge.tasks.causal_lm import IGNORED
from expunge.token_objectives import CEU, UNDIAL, WGA, SatImp
from tests.golden.tiny_llama import ROWS, VOCAB, WINS, answers, flat_gradient, random_llama

TASK = ex.CausalLM(VOCAB)
EQUAL: list[tuple[Objective, tuple[float, float]]] = [
    (NPO(0.1), (42.6116982, 40.2657822)),
    (NPO(1.0), (39.921402, 45.7329517)),
    (SimNPO(2.5, 0.0), (0.0173166767, 0.282565144)),
    (SimNPO(0.7, 0.5), (1.12002754, 4.66474318)),
    (DPO(0.1), (43.4546432, 56.9085003)),
    (DPO(1.0), (40.8206406, 66.3038081)),
    (WGA(0.5), (-0.658382833, 2.94084581)),
    (WGA(1.0), (-0.309513152, 1.49873668)),
    (SatImp(5.0, 1.0), (-0.00303662778, 0.0353702839)),
    (SatImp(5.0, 0.1), (-0.00551912049, 0.0725447423)),
    (CEU(0), (3.3393662, 2.48813354)),
    (CEU(1), (3.33217239, 3.42537323)),
    (CEU(2), (3.55227828, 5.40648479)),
]
UNDIAL_BY_PADDING = {0: (6.62355661, 4.041821), 4: (6.89027691, 3.58704104)}
"""At strength 3, padded to the longest example and by four tokens more: it moves with the padding."""
KL_BY_PADDING = {0: (3.79424143, 3.86064137), 4: (3.92073536, 3.63823215)}
PDU_FORGET = 36.269962310791016
EXTRACTION_STRENGTH = (1.0, 1 / 3, 1 / 2, 1.0)
"""Of the answers ``WINS``, of which the model writes no last token by itself: the floor 1/T with T = 1, 3, 2, 1."""
GRADIENT_NORMS = (1.9660509824752808, 1.5806766748428345, 6.2155280113220215, 1.8740928173065186)
"""Of the answers but for their last token, at batch 1, the only size at which that code runs."""


def case_of() -> Case:
    model = random_llama(0)
    return Case(model, ex.Request(), TASK, ex.Scope.all(model), {"original": random_llama(1)})


def batch_of(right: int = 0) -> Batch:
    """Forget answers, with refusals as winners for those losses that read them; `right` more tokens of padding."""
    return {**answers(0, right), "win": answers(0, right, rows=WINS)}


def value_and_norm(case: Case, objective: Objective, batch: Batch) -> tuple[float, float]:
    """The loss of a logical batch as a run forms it, and the norm of its gradient."""
    draw = getattr(objective, "draw", None)
    batch = batch if draw is None else draw(case, batch, Key(0))
    weight = example_weights(case, objective, batch)
    values = per_example(case, objective, batch)
    mean = (values * (weight / weight.sum()).to(values.dtype)).sum()
    return mean.item(), float(flat_gradient(mean, case.model).double().norm())


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# Where that code is right: equal to 1e-5, in value and in gradient, whatever the padding.


@pytest.mark.parametrize("right", [0, 4])
@pytest.mark.parametrize(("objective", "published"), EQUAL, ids=[repr(objective) for objective, _ in EQUAL])
def test_equal_to_the_benchmark(objective: Objective, published: tuple[float, float], right: int) -> None:
    assert value_and_norm(case_of(), objective, batch_of(right)) == pytest.approx(published, rel=1e-5, abs=0)


# Where that code is wrong: first its number by its own formula, then ours, and how far they are apart.


@pytest.mark.parametrize("right", sorted(UNDIAL_BY_PADDING))
def test_undial_masks_prompt_and_padding_where_the_benchmark_does_not(right: int) -> None:
    """Theirs is ours on answers, and elsewhere a distillation that holds down token V - 100 (the label -100 read as an
    index), all in one mean."""
    case, batch, strength_ = case_of(), batch_of(right), 3.0
    logits, told = (logits_of(net, batch)[:, :-1] for net in (case.model, case.teachers["original"]))
    labels = batch["labels"][:, 1:]
    answer = labels != IGNORED
    held_down = torch.where(answer, labels, VOCAB - 100)
    target = (told - strength_ * F.one_hot(held_down, VOCAB)).softmax(-1)
    each = -(target * logits.log_softmax(-1)).sum(-1)
    published = UNDIAL_BY_PADDING[right][0]
    assert float(each.mean()) == pytest.approx(published, rel=1e-5)
    ours, norm = value_and_norm(case, UNDIAL(strength_), batch)
    assert ours == pytest.approx(float(each[answer].mean()), rel=1e-5)
    assert (ours, norm) == pytest.approx(value_and_norm(case, UNDIAL(strength_), batch_of(0)), rel=1e-5)
    assert abs(ours - published) > 0.1


@pytest.mark.parametrize("right", sorted(KL_BY_PADDING))
def test_kl_is_over_answer_tokens_where_the_benchmark_counts_prompt_and_padding(right: int) -> None:
    case, batch = case_of(), batch_of(right)
    now, then = (logits_of(net, batch).log_softmax(-1) for net in (case.model, case.teachers["original"]))
    each = (then.exp() * (then - now)).sum(-1)
    published = KL_BY_PADDING[right][0]
    assert float(each.mean()) == pytest.approx(published, rel=1e-5)
    ours, norm = value_and_norm(case, Distill(), batch)
    judged = batch["labels"][:, 1:] != IGNORED
    assert ours == pytest.approx(float(each[:, :-1][judged].mean()), rel=1e-5)
    assert (ours, norm) == pytest.approx(value_and_norm(case, Distill(), batch_of(0)), rel=1e-5)
    assert abs(ours - published) > 0.1


def test_pdu_judges_the_logits_that_predict_the_answer_where_the_benchmark_is_one_place_late() -> None:
    """Theirs takes the logits AT the labelled tokens, which predict the tokens after them; ours those one before."""
    case, batch = case_of(), batch_of()
    logits = logits_of(case.model, batch)
    each = (logits.amax(-1) - logits.mean(-1)).square()
    answer = batch["labels"] != IGNORED
    assert float(each[answer].mean()) == pytest.approx(PDU_FORGET, rel=1e-5)
    ours, norm = value_and_norm(case, LogitSpread(), batch)
    assert ours == pytest.approx(float(each[:, :-1][answer[:, 1:]].mean()), rel=1e-5)
    assert (ours, norm) == pytest.approx(value_and_norm(case, LogitSpread(), batch_of(4)), rel=1e-5)
    assert abs(ours - PDU_FORGET) > 0.5


def test_extraction_strength_has_a_true_zero_where_the_benchmark_has_a_floor_of_one_over_t() -> None:
    """No suffix of these answers is what the model writes, not even their last judged token."""
    batch, model = answers(rows=WINS), random_llama(0)
    found = {
        name: part.numpy() for name, part in matched(TASK.logits(model, batch).detach(), TASK.labels(batch)).items()
    }
    assert found["tokens"].tolist() == [1, 3, 2, 1]
    assert found["suffix"].tolist() == [0, 0, 0, 0]
    assert released_strength(found).tolist() == pytest.approx(EXTRACTION_STRENGTH, rel=1e-12)
    assert strength(found).tolist() == [0.0, 0.0, 0.0, 0.0]


def test_gradient_norms_hold_at_any_batch_size_where_the_benchmark_fails_above_one() -> None:
    """Theirs differentiates one shared graph example by example, which torch refuses at the second example; at batch 1
    the numbers are ours: the mean over tensors of the norm, without the last token of each answer."""
    batch, model = answers(), random_llama(0)
    last = [len(prompt) + len(answer) - 1 for prompt, answer in ROWS]
    batch["labels"][torch.arange(len(ROWS)), torch.tensor(last)] = IGNORED
    data = as_data({name: column for name, column in batch.items() if name != "id"})
    for size in (1, 2, 4):
        ours = gradient_norms(model, TASK, data, size, Key(0))["by_tensor"]
        assert ours.tolist() == pytest.approx(GRADIENT_NORMS, rel=1e-5)
    first, second, *_ = TASK.nll(model, batch)
    first.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        second.backward()
