"""TOFU: published numbers from the published logs, to the last digit printed; and small cases done by hand.

Source of the table: the logs of the wd 0.01 Llama-2-7b models that the authors of TOFU released, in the data folder.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from expunge.benchmarks import tofu
from expunge.benchmarks.tofu_compare import Score, forget_quality, scores
from expunge.benchmarks.tofu_scores import (
    Said,
    forget_truth_score,
    memorisation_score,
    model_utility,
    normalised_probability,
    per_item,
    probability,
    rouge_l_recall,
    truth_probability,
    truth_ratio,
    utility_truth_score,
)
from expunge.core import Key, Refused

needs_data = pytest.mark.skipif("EXPUNGE_DATA" not in os.environ, reason="EXPUNGE_DATA does not say where the data are")

# log: ROUGE, probability and truth-ratio score (geometric) of retain, real authors, world facts; model utility in the
# geometric and the arithmetic form; forget ROUGE, probability, truth-ratio score geometric and arithmetic.
PUBLISHED = {
    "full": (
        ("0.9857", "0.9330", "0.8825", "0.9895", "0.4555", "0.4186", "0.4747", "0.5962", "0.5390"),
        ("0.6227", "0.5859"),
        ("0.9854", "0.9909", "0.5160", "0.5304"),
    ),
    "retain90": (
        ("0.9758", "0.9230", "0.8974", "0.9889", "0.4341", "0.4143", "0.4710", "0.5707", "0.5442"),
        ("0.6137", "0.5752"),
        ("0.4082", "0.1476", "0.6740", "0.6797"),
    ),
    "retain95": (
        ("0.9799", "0.9530", "0.8868", "0.9883", "0.4167", "0.4025", "0.4629", "0.5442", "0.5279"),
        ("0.6006", "0.5613"),
        ("0.3980", "0.1547", "0.6741", "0.6828"),
    ),
    "retain99": (
        ("0.9889", "0.9280", "0.8825", "0.9906", "0.4593", "0.4122", "0.4646", "0.6037", "0.5390"),
        ("0.6207", "0.5812"),
        ("0.3972", "0.1795", "0.6849", "0.6970"),
    ),
}


def folder() -> Path:
    found = Path(os.environ["EXPUNGE_DATA"]) / "tofu"
    if not found.is_dir():
        pytest.skip("EXPUNGE_DATA has no folder tofu")
    return found


def log_path(name: str) -> Path:
    found = folder() / f"published_logs/llama2-7b_{name}_wd0.01.json"
    if not found.is_file():
        pytest.skip("EXPUNGE_DATA has no published logs of TOFU")
    return found


def by_name(found: tuple[Score, ...]) -> dict[str, Score]:
    return {score.name: score for score in found}


@needs_data
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_numbers_to_the_last_digit(name: str) -> None:
    log = tofu.read_log(log_path(name))
    nine, utilities, forget = PUBLISHED[name]
    made = {form: by_name(scores(log, form=form, draws=20)) for form in ("geometric", "arithmetic")}
    geometric, arithmetic = made["geometric"], made["arithmetic"]
    cells = [
        f"{part} {metric}"
        for metric in ("rouge", "probability", "truth_ratio")
        for part in ("retain", "real_authors", "world_facts")
    ]
    assert tuple(f"{geometric[cell].value:.4f}" for cell in cells) == nine
    assert tuple(f"{found['model_utility'].value:.4f}" for found in (geometric, arithmetic)) == utilities
    assert (
        *(f"{geometric[f'forget {metric}'].value:.4f}" for metric in ("rouge", "probability", "truth_ratio")),
        f"{arithmetic['forget truth_ratio'].value:.4f}",
    ) == forget
    assert geometric["forget truth_ratio"].form == "geometric"
    assert arithmetic["model_utility"].form == "arithmetic"
    assert geometric["forget rouge"].form == ""


@needs_data
@pytest.mark.parametrize(
    ("form", "distance", "p_value"), [("geometric", "0.3967", "1.834e-21"), ("arithmetic", "0.4100", "6.03e-23")]
)
def test_published_forget_quality(form: str, distance: str, p_value: str) -> None:
    full, retrained = (tofu.read_log(log_path(name))["forget"] for name in ("full", "retain90"))
    found = forget_quality(full, retrained, form, draws=200)  # type: ignore[arg-type]
    digits = len(p_value.split("e")[0]) - 2
    assert (f"{found.distance:.4f}", f"{found.p_value:.{digits}e}", found.n) == (distance, p_value, 300)
    assert found.log10 == pytest.approx(math.log10(found.p_value), abs=1e-12)
    assert found.least < found.log10_low < found.log10 < found.log10_high < 0
    assert found.low < found.distance < found.high
    assert not found.successful


@needs_data
def test_full_and_retain95_are_compared_on_the_questions_that_both_were_asked() -> None:
    """The full log has the first 300 of forget10, retain95's the 200 of forget05: 100 are in both."""
    full, retrained = (tofu.read_log(log_path(name)) for name in ("full", "retain95"))
    found = forget_quality(full["forget"], retrained["forget"], draws=50)
    assert found.n == 100
    ours, theirs = ([truth_ratio(s.correct, s.wrong, "geometric")] for s in (full["forget"], retrained["forget"]))
    assert full["forget"].questions[200:] == retrained["forget"].questions[:100]
    assert found.p_value == stats.ks_2samp(ours[0][200:], theirs[0][:100]).pvalue
    assert found.p_value != stats.ks_2samp(ours[0], theirs[0]).pvalue
    beside = by_name(scores(full, retrained, draws=50))["forget rouge"]
    assert (beside.n, beside.shared) == (300, 100)
    assert beside.retrained == pytest.approx(retrained["forget"].rouge[:100].mean())
    with pytest.raises(Refused, match="share no question of forget"):
        forget_quality(full["forget"], tofu.read_log(log_path("retain99"))["forget"])


@needs_data
def test_a_gap_to_the_retrained_model_is_paired() -> None:
    full, retrained = (tofu.read_log(log_path(name)) for name in ("full", "retain90"))
    found = by_name(scores(full, retrained, draws=400))
    gap = found["model_utility"].gap
    assert gap is not None
    assert gap[0] == pytest.approx(found["model_utility"].value - 0.6137, abs=5e-5)
    assert gap[1] < gap[0] < gap[2]
    apart = by_name(scores(retrained, draws=400))["model_utility"]
    alone = found["model_utility"]
    assert gap[2] - gap[1] < math.hypot(alone.high - alone.low, apart.high - apart.low) / 1.5
    same = by_name(scores(full, full, draws=50))
    assert all(score.gap == (0.0, 0.0, 0.0) and score.retrained == score.value for score in same.values())


@needs_data
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_rouge_of_the_published_texts_is_the_published_rouge(name: str) -> None:
    """817 texts a log, each generated text and answer scored anew."""
    pytest.importorskip("rouge_score")
    tree = json.loads(log_path(name).read_text())
    for key in tofu.LOGS.values():
        texts, wanted = tree[key]["generated_text"], tree[key]["rougeL_recall"]
        found = rouge_l_recall([texts[item][2] for item in texts], [texts[item][1] for item in texts])
        np.testing.assert_allclose(found, [wanted[item] for item in texts], rtol=0, atol=1e-12)


@needs_data
@pytest.mark.parametrize("share", [1, 5, 10])
def test_the_files_of_a_job_are_those_of_the_paper(share: int) -> None:
    found = tofu.read(folder(), share)
    everything = {item.id: item for item in tofu.items(folder(), "full")}
    assert len(found.forget) == 40 * share
    assert sorted(item.id for item in (*found.forget, *found.retain)) == list(range(4000))
    assert all(everything[item.id] == item for item in (*found.forget, *found.retain))
    assert [item.id for item in found.forget] == [item.id for item in found.forget_perturbed]
    assert [item.id for item in found.retain_perturbed] == list(range(400))
    for item in (*found.forget_perturbed, *found.retain_perturbed):
        assert (everything[item.id].question, everything[item.id].answer) == (item.question, item.answer)
        assert (len(item.wrong), item.correct) == (5, item.paraphrased_answer)
    for items, start in ((found.real_authors, 4000), (found.world_facts, 4100)):
        assert [item.id for item in items] == list(range(start, start + len(items)))
        assert all(len(item.wrong) == 3 and item.correct == item.answer for item in items)


@needs_data
def test_every_file_of_the_folder_is_read() -> None:
    read = [name for name in tofu.FILES if (folder() / f"{name}.json").is_file()]
    assert set(read) == {path.stem for path in folder().glob("*.json")}
    everything = {item.id: item for item in tofu.items(folder(), "full")}
    for name in read:
        plain = tofu.items(folder(), name)
        assert len(plain) == tofu.FILES[name].lines
        if name.startswith(("forget", "retain")) and not name.endswith("_perturbed"):
            assert all(everything[item.id] == item for item in plain), name


# By hand. Two items; probabilities are powers of 2, so that every mean is a short fraction.
LOG2 = math.log(2)
CORRECT = np.array([1, 4]) * LOG2  # probabilities 1/2 and 1/16
WRONG = np.array([[2, 4], [1, 3]]) * LOG2  # 1/4, 1/16 and 1/2, 1/8


def said(**changes: np.ndarray) -> Said:
    parts = {"answer": CORRECT, "correct": CORRECT, "wrong": WRONG, "rouge": np.array([1.0, 0.25]), **changes}
    return Said(("first?", "second?"), **parts)


def test_truth_ratio_in_both_forms_by_hand() -> None:
    """Geometric: sqrt(1/4 1/16) = 1/8 over 1/2; sqrt(1/2 1/8) = 1/4 over 1/16. Arithmetic: 5/32 over 1/2; 5/16 over 1/16."""
    np.testing.assert_allclose(truth_ratio(CORRECT, WRONG, "geometric"), [1 / 4, 4], rtol=1e-14)
    np.testing.assert_allclose(truth_ratio(CORRECT, WRONG, "arithmetic"), [5 / 16, 5], rtol=1e-14)
    np.testing.assert_allclose(forget_truth_score([1 / 4, 4, 1]), [1 / 4, 1 / 4, 1])
    np.testing.assert_allclose(utility_truth_score([1 / 4, 4, 1]), [3 / 4, 0, 0])
    wanted = [0.5 / (0.5 + 0.125 + 1e-10), 0.0625 / (0.0625 + 0.25 + 1e-10)]
    np.testing.assert_allclose(truth_probability(CORRECT, WRONG, "geometric"), wanted, rtol=1e-14)
    with pytest.raises(Refused, match="geometric and arithmetic"):
        truth_ratio(CORRECT, WRONG, "harmonic")  # type: ignore[arg-type]


def test_probabilities_by_hand() -> None:
    np.testing.assert_allclose(probability(CORRECT), [1 / 2, 1 / 16], rtol=1e-14)
    wanted = [0.5 / (0.5 + 0.25 + 0.0625 + 1e-10), 0.0625 / (0.0625 + 0.5 + 0.125 + 1e-10)]
    np.testing.assert_allclose(normalised_probability(CORRECT, WRONG), wanted, rtol=1e-14)


def test_each_set_has_its_own_probability_and_truth_score() -> None:
    other = said(answer=np.zeros(2))
    np.testing.assert_allclose(per_item(other, "forget")["probability"], [1, 1])
    np.testing.assert_allclose(per_item(other, "retain")["probability"], [1, 1])
    np.testing.assert_allclose(
        per_item(other, "real_authors")["probability"], [1 / (1 + 5 / 16), 1 / (1 + 5 / 8)], rtol=1e-9
    )
    np.testing.assert_allclose(per_item(other, "forget")["truth_ratio"], [1 / 4, 1 / 4])
    np.testing.assert_allclose(per_item(other, "world_facts")["truth_ratio"], [3 / 4, 0])


def test_a_collapsed_model_has_a_ratio_and_no_nan() -> None:
    """All probabilities underflow, as after unbounded ascent: only the losses know the ratio."""
    correct, wrong = np.array([900.0, 5000.0, 2.0]), np.array([[905.0, 905.0], [3.0, 3.0], [4000.0, 4000.0]])
    for form in ("geometric", "arithmetic"):
        ratio = truth_ratio(correct, wrong, form)  # type: ignore[arg-type]
        assert ratio[0] == pytest.approx(math.exp(-5))
        np.testing.assert_allclose(forget_truth_score(ratio), [math.exp(-5), 0, 0])
        np.testing.assert_allclose(utility_truth_score(ratio), [1 - math.exp(-5), 0, 1])


def test_a_collapsed_model_is_not_scored_by_the_small_number_that_open_unlearning_adds() -> None:
    """It takes wrong / (correct + 1e-10). Both answers at 60 nats a token are as likely as each other: 1, there e-16."""
    loss = np.array([60.0])
    ratio = truth_ratio(loss, loss[:, None], "geometric")
    released = np.exp(-60.0) / (np.exp(-60.0) + 1e-10)
    assert forget_truth_score(ratio)[0] == 1
    assert forget_truth_score(released) == pytest.approx(math.exp(-60) * 1e10, rel=1e-9)
    np.testing.assert_allclose(truth_ratio(CORRECT, WRONG, "geometric"), [0.125 / (0.5 + 1e-10), 4], rtol=1e-8)


def test_model_utility_by_hand() -> None:
    assert model_utility([0.5] * 9) == pytest.approx(0.5)
    assert model_utility([1.0] * 8 + [0.1]) == pytest.approx(9 / 18)
    assert model_utility([1.0] * 8 + [0.0]) == 0
    with pytest.raises(Refused, match="nine numbers, found 3"):
        model_utility([1.0, 1.0, 1.0])
    whole = by_name(scores(dict.fromkeys(("retain", "real_authors", "world_facts"), said()), draws=20))
    nine = [score.value for name, score in whole.items() if name != "model_utility"]
    assert whole["model_utility"].value == pytest.approx(9 / sum(1 / value for value in nine))
    assert "model_utility" not in by_name(scores({"retain": said(), "forget": said()}, draws=20))


@pytest.mark.parametrize(("n", "least"), [(40, "1.86e-23"), (200, "1.94e-119"), (400, "1.06e-239")])
def test_the_smallest_forget_quality_is_the_published_one(n: int, least: str) -> None:
    """Two samples that do not overlap: 2 / binomial(2n, n), the p of collapsed models in published tables."""
    zeros = np.zeros(n)
    asked = tuple(f"{place}?" for place in range(n))
    spread = np.linspace(0.1, 0.2, n)
    low, high = (Said(asked, zeros, spread, (spread + shift)[:, None], zeros) for shift in (1.0, spread))
    found = forget_quality(low, high, draws=50)
    assert f"{found.p_value:.2e}" == least
    exact = math.log10(2) - (math.lgamma(2 * n + 1) - 2 * math.lgamma(n + 1)) / math.log(10)
    assert found.log10 == pytest.approx(exact, abs=1e-9)
    assert found.least == pytest.approx(exact, abs=1e-9)
    turned = forget_quality(high, low, draws=50)
    assert turned.p_value == found.p_value


def test_forget_quality_of_a_model_like_the_retrained_one() -> None:
    rng = np.random.default_rng(1)
    asked = tuple(f"{place}?" for place in range(200))
    level = rng.gamma(2, size=200)

    def model(seed: int) -> Said:
        own = np.random.default_rng(seed)
        return Said(asked, level, level, level[:, None] + own.gamma(2, size=(200, 5)), np.zeros(200))

    same = forget_quality(model(1), model(1), draws=100)
    assert (same.p_value, same.log10, same.distance, same.low, same.high) == (1, 0, 0, 0, 0)
    near = forget_quality(model(1), model(2), draws=300, key=Key(3))
    assert near.successful
    assert (near.low, near.log10_high) == (0, 0)
    assert near.log10_low < near.log10 <= near.log10_high
    assert near == forget_quality(model(1), model(2), draws=300, key=Key(3))


def test_the_interval_of_the_distance_holds_the_truth() -> None:
    """Two normal laws one apart, answers to one question alike: the true distance is 2 Phi(1/2) - 1."""
    truth, hits = 2 * stats.norm.cdf(0.5) - 1, 0
    asked = tuple(map(str, range(80)))
    for trial in range(100):
        rng = np.random.default_rng(trial)
        common = rng.normal(size=80) * math.sqrt(0.5)
        ours, theirs = (common + math.sqrt(0.5) * rng.normal(size=80) + shift for shift in (9.0, 10.0))
        both = [Said(asked, ours, np.full(80, 20.0), 20 - part[:, None], np.zeros(80)) for part in (ours, theirs)]
        found = forget_quality(both[0], both[1], draws=200, key=Key(trial))
        hits += found.low <= truth <= found.high
    assert hits >= 93


def test_rouge_by_hand() -> None:
    """Recall over the answer's words: order counts, case and word endings do not, more words cost nothing."""
    pytest.importorskip("rouge_score")
    answers = ["The cats sat down", "The cats sat down", "one two three four", "yes"]
    texts = ["the cat sitting sat, down there", "down the cats", "four three two one", ""]
    np.testing.assert_allclose(rouge_l_recall(answers, texts), [1, 2 / 4, 1 / 4, 0])
    with pytest.raises(Refused, match="2 answers and 1 texts"):
        rouge_l_recall(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("parts", "wanted"), [((0.321, 0.032, 0.895, 0.318), "0.103"), ((0.941, 0.410, 0.945, 0.433), "0.582")]
)
def test_memorisation_score_of_the_published_ranking(parts: tuple[float, ...], wanted: str) -> None:
    """The rows "full" and "retain90" of the ranking of unlearning-depth-score (1B, forget10), given as 1 - each."""
    assert memorisation_score(*(1 - part for part in parts)) == pytest.approx(float(wanted), abs=7e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rouge": np.array([1.2, 0.0])}, "rouge must lie in"),
        ({"answer": np.array([np.nan, 0.0])}, "answer: expected finite losses"),
        ({"wrong": -WRONG}, "wrong: expected finite losses"),
        ({"wrong": WRONG[:1]}, "found shapes"),
        ({"wrong": WRONG[:, :0]}, "found shapes"),
    ],
)
def test_bad_scores_are_refused(changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(Refused, match=message):
        said(**changes)


def write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def real_authors() -> list[str]:
    return [
        json.dumps({"question": f"Who wrote {place}?", "answer": "A", "perturbed_answer": ["B", "C", "D"]})
        for place in range(100)
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 7 is not JSON"),
        ("[1]", "line 7 is a list"),
        ('{"question": "Who?", "perturbed_answer": ["B", "C", "D"]}', "line 7: 'answer' is missing"),
        ('{"question": " ", "answer": "A", "perturbed_answer": ["B", "C", "D"]}', "line 7: 'question' is empty"),
        ('{"question": "Who?", "answer": "A", "perturbed_answer": ["B", "C"]}', "line 7: 'perturbed_answer' has 2"),
        ('{"question": "Who?", "answer": "A", "perturbed_answer": "B"}', "line 7: 'perturbed_answer' has no list"),
        ('{"question": "Who?", "answer": "A", "perturbed_answer": ["B", 3, "D"]}', "'perturbed_answer' 2 is a int"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    """Counted as an editor counts, blank lines too."""
    lines = real_authors()
    write(tmp_path / "real_authors_perturbed.json", [*lines[:4], "", lines[4], line, *lines[6:]])
    with pytest.raises(Refused, match=message):
        tofu.items(tmp_path, "real_authors_perturbed")


def test_missing_cut_and_unknown_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"there is no file real_authors_perturbed\.json"):
        tofu.items(tmp_path, "real_authors_perturbed")
    write(tmp_path / "real_authors_perturbed.json", real_authors()[:-1])
    with pytest.raises(Refused, match="has 99 items where TOFU has 100"):
        tofu.items(tmp_path, "real_authors_perturbed")
    write(tmp_path / "real_authors_perturbed.json", real_authors())
    assert tofu.items(tmp_path, "real_authors_perturbed")[99].id == 4099
    with pytest.raises(Refused, match="did you mean 'forget10'"):
        tofu.items(tmp_path, "forget_10")
    with pytest.raises(Refused, match="1, 5 or 10 percent"):
        tofu.read(tmp_path, 20)
    (tmp_path / "world_facts.json").write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(Refused, match="line 1 is not UTF-8"):
        tofu.items(tmp_path, "world_facts")


def test_refusals_are_plain_lines(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"there is no file idontknow\.jsonl"):
        tofu.refusals(tmp_path)
    write(tmp_path / tofu.REFUSALS, ["I'm not sure.", "", "I can't say. "])
    assert tofu.refusals(tmp_path) == ("I'm not sure.", "I can't say.")
    write(tmp_path / tofu.REFUSALS, [""])
    with pytest.raises(Refused, match="has no line"):
        tofu.refusals(tmp_path)


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    with pytest.raises(Refused, match="there is no evaluation log"):
        tofu.read_log(path)
    for text in ("{", "{}", "[]", '{"eval_log.json": {"avg_gt_loss": {"0": 1}}}'):
        path.write_text(text)
        with pytest.raises(Refused, match="not an aggregated evaluation log"):
            tofu.read_log(path)
