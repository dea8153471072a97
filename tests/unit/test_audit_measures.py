"""Measures on models whose every answer is written down: forgot nothing, too much, random; and on real ones."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from expunge.audit import distance
from expunge.audit import report as reporting
from expunge.audit.accuracy import (
    forget_accuracy,
    forget_loss,
    forgotten_class_accuracy,
    retain_accuracy,
    test_accuracy,
)
from expunge.audit.cost import backward_rows, seconds
from expunge.audit.distance import average_gap, average_gap_each, floor, forget_output_distance, jensen_shannon, points
from expunge.audit.membership import (
    attack_confidence,
    attack_entropy,
    best_threshold,
    entropy_of,
    membership_auc,
    membership_auc_two_sided,
    modified_entropy,
)
from expunge.audit.subject import Subject, address_of
from expunge.core import Key, Refused, Request
from expunge.data.sources import as_data
from expunge.data.split import split
from expunge.tasks.classification import Classification
from expunge.tasks.regression import Regression
from tests.fixtures import NAMES, retrained, tiny

C, FORGET, RETAIN, TEST = 4, 200, 400, 300
TOTAL = FORGET + RETAIN + TEST


class Answers(nn.Module):
    """A table of logits [n, C], read by example number; counts the rows it is asked for."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits, self.rows = nn.Parameter(logits), 0

    def forward(self, number: Tensor) -> Tensor:
        assert not self.training
        self.rows += len(number)
        return self.logits[number[:, 0].long()]


def labels() -> Tensor:
    return torch.arange(TOTAL) % C


def answers(seed: int, forget: float, retain: float = 0.95, test: float = 0.9, sure: float = 2.0) -> Answers:
    """A model that is right on the given shares of forget, retain and test examples, chosen at random."""
    rng = np.random.default_rng(seed)
    shares = np.r_[np.full(FORGET, forget), np.full(RETAIN, retain), np.full(TEST, test)]
    right = rng.random(TOTAL) < shares
    chosen = np.where(right, labels().numpy(), (labels().numpy() + rng.integers(1, C, TOTAL)) % C)
    logits = rng.normal(0, 0.3, (TOTAL, C))
    logits[np.arange(TOTAL), chosen] += 2 + np.abs(rng.normal(sure, 1, TOTAL))
    return Answers(torch.tensor(logits))


def subject(
    after: nn.Module, before: nn.Module | None = None, references: tuple[nn.Module, ...] = (), **changes: object
) -> Subject:
    data = as_data((torch.arange(TOTAL)[:, None].float(), labels()))
    parts = [
        data.select(torch.arange(*ends)) for ends in ((0, FORGET), (FORGET, FORGET + RETAIN), (FORGET + RETAIN, TOTAL))
    ]
    request = Request(forget=parts[0], retain=parts[1])
    made = Subject(before or after, after, request, Classification(C), parts[2], references, draws=200)
    return replace(made, **changes)


def retrained_models(count: int = 4) -> tuple[nn.Module, ...]:
    return tuple(answers(100 + seed, forget=0.6) for seed in range(count))


def judged(made: Subject) -> dict[str, str]:
    return {name: reading.verdict for name, reading in reporting.measured(made, "m", "method").readings.items()}


def test_accuracies_are_counts() -> None:
    model = answers(0, 0.37)
    right = (model.logits.argmax(1) == labels()).double()
    made = subject(model)
    for measure, part in (
        (forget_accuracy, right[:FORGET]),
        (retain_accuracy, right[FORGET : FORGET + RETAIN]),
        (test_accuracy, right[FORGET + RETAIN :]),
    ):
        reading = measure(made)
        assert reading.value == pytest.approx(100 * float(part.mean()))
        assert reading.low < reading.value < reading.high
        assert reading.n == len(part)
    assert forget_loss(made) is None
    assert forgotten_class_accuracy(made) is None


def test_each_model_runs_once_per_data_set(global_randomness: object) -> None:
    references = retrained_models(3)
    model, before = answers(1, 0.6), answers(2, 1.0)
    model.train()
    reporting.audit(subject(model, before, references))
    assert [m.rows for m in (model, before, *references)] == [TOTAL] * 5
    assert model.training
    assert global_randomness.unchanged()


def test_a_forgotten_class_leaves_the_test_set() -> None:
    made = subject(answers(0, 0.5))
    everything = made.test
    forget = made.request.forget.select(torch.nonzero(labels()[:FORGET] == 2).flatten())
    retain = made.request.retain.select(torch.nonzero(labels()[:RETAIN] != 2).flatten())
    made = replace(made, request=Request(forget=forget, retain=retain))
    assert made.forgotten_classes() == (2,)
    right = (made.after.logits.argmax(1) == labels())[FORGET + RETAIN :].double()
    gone = labels()[FORGET + RETAIN :] == 2
    assert test_accuracy(made).value == pytest.approx(100 * float(right[~gone].mean()))
    assert forgotten_class_accuracy(made).value == pytest.approx(100 * float(right[gone].mean()))
    assert test_accuracy(made).n + forgotten_class_accuracy(made).n == len(everything)


def test_a_model_that_forgot_nothing_is_found_out() -> None:
    before = answers(9, 1.0)
    made = subject(before, before, retrained_models(8))
    verdicts = judged(made)
    assert verdicts["forget_accuracy"] == verdicts["membership_auc"] == "under-forgot"
    assert verdicts["average_gap"] == "outside"
    assert verdicts["retain_accuracy"] == verdicts["test_accuracy"] == "within"


def test_over_forgetting_is_a_failure_too() -> None:
    row = reporting.measured(subject(answers(9, 0.1), answers(8, 1.0), retrained_models(8)), "m", "method")
    assert row.readings["forget_accuracy"].verdict == row.readings["membership_auc"].verdict == "over-forgot"
    assert row.verdict == "over-forgotten"


def test_lost_utility_is_a_failure() -> None:
    row = reporting.measured(subject(answers(9, 0.6, retain=0.7, test=0.7), None, retrained_models(8)), "m", "method")
    assert row.readings["retain_accuracy"].verdict == "lost utility"
    assert row.verdict == "over-forgotten"


def test_a_random_model() -> None:
    made = subject(Answers(torch.tensor(np.random.default_rng(3).normal(size=(TOTAL, C)))))
    assert forget_accuracy(made).low < 100 / C < forget_accuracy(made).high
    for measure in (membership_auc, membership_auc_two_sided):
        assert measure(made).low < 0.5 < measure(made).high


def test_membership_auc_equals_sklearn_and_survives_saturation() -> None:
    model = answers(4, 1.0, sure=60.0)  # in float32 every confidence would be exactly 1
    made = subject(model)
    logits = model.logits.detach().double()
    confidence = logits.log_softmax(1).gather(1, labels()[:, None])[:, 0]
    others = logits.scatter(1, labels()[:, None], -math.inf).logsumexp(1)
    margin = (confidence - (others - logits.logsumexp(1))).numpy()
    truth = np.r_[np.ones(FORGET), np.zeros(TEST)]
    wanted = roc_auc_score(truth, np.r_[margin[:FORGET], margin[FORGET + RETAIN :]])
    assert membership_auc(made).value == pytest.approx(wanted, abs=1e-9)


def test_two_sided_membership_sees_what_one_side_cannot() -> None:
    made = subject(answers(5, 1.0))
    logits = made.after.logits.data
    spread = torch.linspace(-4, 4, TEST).abs() * torch.linspace(-1, 1, TEST).sign()
    logits.zero_()
    logits[torch.arange(TOTAL), labels()] = torch.cat([torch.full((FORGET + RETAIN,), 0.0), spread]).double()
    assert membership_auc(made).value == pytest.approx(0.5, abs=0.01)
    assert membership_auc_two_sided(made).value < 0.05  # forget examples all sit at the median


def test_modified_entropy_uses_one_minus_p() -> None:
    rng = np.random.default_rng(6)
    p, y = rng.dirichlet(np.ones(5) / 2, 40), rng.integers(0, 5, 40)
    wanted = [
        -(1 - row[k]) * math.log(row[k]) - sum(row[i] * math.log(1 - row[i]) for i in range(5) if i != k)
        for row, k in zip(p, y, strict=True)
    ]
    assert np.allclose(modified_entropy(p, y), wanted, rtol=1e-9)
    copied = [
        -(1 - row[k]) * math.log(row[k]) - sum(row[i] * math.log(row[i]) for i in range(5) if i != k)
        for row, k in zip(p, y, strict=True)
    ]
    assert not np.allclose(modified_entropy(p, y), copied, rtol=0.1)


def test_one_column_per_row() -> None:
    """A batch equals its rows one by one: the label of one row must not touch another's."""
    rng = np.random.default_rng(7)
    p, y = rng.dirichlet(np.ones(6), 30), rng.integers(0, 6, 30)
    alone = [modified_entropy(p[i : i + 1], y[i : i + 1])[0] for i in range(30)]
    assert np.allclose(modified_entropy(p, y), alone, rtol=1e-12)


def test_modified_entropy_of_sure_answers() -> None:
    right = modified_entropy(np.array([[1 - 1e-17, 1e-17]]), np.array([0]))[0]
    wrong = modified_entropy(np.array([[1 - 1e-17, 1e-17]]), np.array([1]))[0]
    assert right == pytest.approx(0.0, abs=1e-12)
    assert wrong == pytest.approx(2 * 17 * math.log(10), rel=1e-6)
    assert np.isfinite(modified_entropy(np.array([[1.0, 0.0]]), np.array([1]))[0])


def test_the_threshold_is_the_best_there_is() -> None:
    rng = np.random.default_rng(8)
    for _ in range(20):
        members, others = rng.integers(2, 9, 15).astype(float), rng.integers(0, 7, 12).astype(float)

        def balanced(t: float, m: np.ndarray = members, o: np.ndarray = others) -> float:
            return float((m >= t).mean() + (o < t).mean())

        every = [balanced(t) for t in np.arange(-1, 11, 0.5)]
        assert balanced(best_threshold(members, others)) == pytest.approx(max(every))


def test_the_attack_calls_members_members() -> None:
    """Retain examples score high, test examples low: forget examples like either are called so."""
    made = subject(answers(10, 1.0))
    logits = made.after.logits.data
    for level, unseen in ((6.0, 0.0), (-6.0, 100.0)):
        score = torch.cat([torch.full((FORGET,), level), torch.full((RETAIN,), 6.0), torch.full((TEST,), -6.0)])
        logits.zero_()
        logits[torch.arange(TOTAL), labels()] = score.double()
        fresh = subject(made.after)
        for attack in (attack_confidence, attack_entropy):
            reading = attack(fresh)
            assert reading.value == reading.low == reading.high == unseen
            assert reading.detail["attacker_accuracy"] == 100
            assert reading.detail["repeats"] >= 20
    outputs = fresh.outputs("forget")
    assert np.allclose(entropy_of(outputs), modified_entropy(outputs.probabilities, outputs.labels))


def test_jensen_shannon_agrees_with_scipy() -> None:
    rng = np.random.default_rng(11)
    p, q = rng.dirichlet(np.ones(5), 20), rng.dirichlet(np.ones(5), 20)
    assert np.allclose(jensen_shannon(p, q), [jensenshannon(a, b, base=2) for a, b in zip(p, q, strict=True)])
    assert jensen_shannon(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))[0] == 1.0
    assert jensen_shannon(p, p).max() == 0.0


def test_output_distance_and_its_floor() -> None:
    references = retrained_models(3)
    made = subject(references[0], None, references[1:])
    soft = [m.logits.detach().softmax(1).numpy()[:FORGET] for m in references]
    wanted = np.mean([jensen_shannon(soft[0], other).mean() for other in soft[1:]])
    reading = forget_output_distance(made)
    assert reading.value == pytest.approx(wanted)
    assert reading.low < wanted < reading.high
    assert reading.detail["floor"] == pytest.approx(jensen_shannon(soft[1], soft[2]).mean())


def test_average_gap_by_hand() -> None:
    """Against the mean, against each, and the floor: from accuracies and areas computed apart."""
    models = (answers(20, 0.8), *retrained_models(3))
    truth = np.r_[np.ones(FORGET), np.zeros(TEST)]

    def metrics(model: Answers) -> np.ndarray:
        logits = model.logits.detach()
        right = (logits.argmax(1) == labels()).double().numpy()
        p = logits.softmax(1).gather(1, labels()[:, None])[:, 0].numpy()
        auc = roc_auc_score(truth, np.r_[p[:FORGET], p[FORGET + RETAIN :]])
        return 100 * np.array(
            [right[:FORGET].mean(), right[FORGET : FORGET + RETAIN].mean(), right[FORGET + RETAIN :].mean(), auc]
        )

    mine, *theirs = (metrics(model) for model in models)
    made = subject(models[0], None, models[1:])
    assert np.allclose(points(made, models[0]), mine)
    gap = average_gap(made)
    assert gap.value == pytest.approx(np.abs(mine - np.mean(theirs, axis=0)).mean())
    assert average_gap_each(made).value == pytest.approx(np.mean([np.abs(mine - other).mean() for other in theirs]))
    alone = [np.abs(theirs[i] - np.mean([theirs[j] for j in range(3) if j != i], axis=0)).mean() for i in range(3)]
    level = floor(made)
    assert level.value == gap.detail["floor"] == pytest.approx(np.mean(alone))
    assert level.limit >= max(alone)
    assert gap.detail["forget_accuracy"] == pytest.approx(mine[0] - np.mean(theirs, axis=0)[0])


def test_gap_interval_covers_the_true_gap() -> None:
    """True metrics are known up to the AUC, which is left out with the test data: |0.75 - 0.6|, |0.95 - 0.95|."""
    truth, hits = 100 * (0.15 + 0.0) / 2, 0
    for trial in range(40):
        references = tuple(answers(5000 + 10 * trial + i, 0.6) for i in range(4))
        made = subject(answers(5009 + 10 * trial, 0.75), None, references, test=None, key=Key(trial))
        reading = average_gap(made)
        hits += reading.low <= truth <= reading.high
    assert hits >= 36


def test_the_same_key_gives_the_same_bits() -> None:
    first, again = (reporting.audit(subject(answers(1, 0.7), answers(2, 1.0), retrained_models(3))) for _ in range(2))
    assert first.to_json() == again.to_json()
    other = reporting.audit(subject(answers(1, 0.7), answers(2, 1.0), retrained_models(3), key=Key(1)))
    assert other.row("unlearned").readings["average_gap"].high != first.row("unlearned").readings["average_gap"].high


def test_cost_is_read_from_the_record() -> None:
    prices = ({"seconds": 8.0, "backward": 400}, {"cost": {"seconds": 12.0, "backward": 400}})
    made = subject(
        answers(0, 0.5), record={"cost": {"seconds": 2.5, "backward": 100, "forward": 300}}, retrain_records=prices
    )
    assert (seconds(made).value, seconds(made).detail["ratio_to_retraining"]) == (2.5, 0.25)
    assert backward_rows(made).detail["ratio_to_retraining"] == 0.25
    assert seconds(subject(answers(0, 0.5))) is None


def test_a_model_without_numbers_is_refused() -> None:
    broken = answers(0, 0.5)
    broken.logits.data[3] = math.nan
    with pytest.raises(Refused, match="not finite"):
        forget_accuracy(subject(broken))


@pytest.mark.parametrize("name", NAMES)
def test_every_task_can_be_audited(name: str) -> None:
    """Real models: the retrained one reads as the target, the original one as the opposite of forgetting."""
    case = tiny(name)
    references = tuple(retrained(name, seed=seed) for seed in range(2))
    made = Subject(case.model, case.model, case.request, case.task, case.test, references, draws=100)
    report = reporting.audit(made)
    original = report.row("original").readings
    assert original["average_gap"].value == report.row("unlearned").readings["average_gap"].value
    if name == "classification":
        return
    assert "forget_accuracy" not in original
    model_loss = original["forget_loss"]
    target = report.row("retrain").readings["forget_loss"]
    assert model_loss.value < target.value
    total = units = 0.0
    with torch.no_grad():
        batch = next(iter(case.request.forget.batches(len(case.request.forget))))
        batch = case.task.prepare(batch, made.key.at("audit", "forget").at("prepare", 0))
        total, units = float(case.task.nll(case.model, batch).double().sum()), float(case.task.units(batch).sum())
    assert model_loss.value == pytest.approx(total / units, rel=1e-5)
    assert model_loss.low <= model_loss.value <= model_loss.high


def test_points_of_a_loss_are_on_the_scale_of_what_is_kept() -> None:
    """The forgotten targets are all alike: their own variance is 0, and no scale."""
    targets = torch.cat([torch.full((5,), 9.0), torch.linspace(-1.0, 1.0, 40)])
    request = split((torch.zeros(45, 2), targets), forget="y > 5")
    found = Subject(nn.Linear(2, 1), nn.Linear(2, 1), request, Regression())
    assert distance.chance(found) == pytest.approx(float(targets[5:].double().var(correction=0)) / 2)


def test_a_changed_subject_forgets_what_it_knew() -> None:
    """``dataclasses.replace`` hands the cache on: what is kept of other data must not be."""
    made = subject(answers(0, 0.5))
    whole, first = test_accuracy(made), made.test.select(torch.arange(10))
    assert whole.n == TEST
    assert test_accuracy(replace(made, test=first)).n == 10
    others = retrained_models(3)
    assert replace(made, retrained=others).family == others
    assert replace(replace(made, retrained=others[:2]), retrained=others).family == others
    held = replace(made, retrained=others).held_out(0)
    assert held.family == others
    assert held.cache is replace(made, retrained=others).cache or held.retrained == others[1:]


def test_outputs_that_are_not_finite_are_refused_whatever_the_task() -> None:
    huge = answers(0, 0.5)
    huge.logits.data *= 1e39  # finite in float64, not in the float32 that is kept
    with pytest.raises(Refused, match="not finite"):
        forget_accuracy(subject(huge))
    line = nn.Linear(1, 1)
    nn.init.constant_(line.weight, math.nan)
    data = as_data((torch.randn(8, 1), torch.randn(8, 1)))
    with pytest.raises(Refused, match="not finite"):
        forget_loss(Subject(line, line, Request(forget=data), Regression()))


class Heated(nn.Linear):
    """A linear layer whose outputs depend on an attribute and on a buffer that is not saved."""

    def __init__(self, temperature: float, offset: float):
        super().__init__(2, 2)
        self.temperature = temperature
        self.register_buffer("offset", torch.tensor(offset), persistent=False)


def test_models_that_print_alike_have_addresses_of_their_own() -> None:
    made = [Heated(1.0, 0.0), Heated(2.0, 0.0), Heated(1.0, 1.0), Heated(1.0, 0.0)]
    for other in made[1:]:
        other.load_state_dict(made[0].state_dict())
    first, *others = (address_of(model) for model in made)
    assert others[0] != first
    assert others[1] != first
    assert others[2] == first
    assert len({str(model) for model in made}) == 1


def test_draws_of_other_keys_and_batches_are_kept_apart() -> None:
    class Drawn(Classification):
        """Says that it draws."""

    task = Drawn(C)
    object.__setattr__(task, "stochastic", True)
    one, other = (subject(answers(0, 0.5), task=task, key=Key(k), batch=b) for k, b in ((1, 225), (12, 25)))
    assert one.data_address("forget") != other.data_address("forget")


def test_the_same_answers_are_the_same_model_however_given() -> None:
    made = subject(answers(0, 0.5), answers(1, 0.5))
    assert made.answers(answers(0, 0.5)) == made.answers(made.after) != made.answers(made.before)
