"""lm-evaluation-harness as a backend: the sentence without it; with it, tasks of local files against its own model class."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expunge.benchmarks.asking import Asking
from expunge.benchmarks.harness import _pair, _settings, evaluate
from expunge.core import MissingExtra, Refused
from expunge.store import Store
from expunge.tasks.language_model import LanguageModel
from tests.language import CITIES, PEOPLE, llama, tokenizer

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (extra lm-eval)"
)

TASKS = {
    "cities": """
task: cities
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: right
num_fewshot: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 3}
""",
    "writing": """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}\\nAnswer:"
doc_to_target: "{{told}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
""",
    "reading": """
task: reading
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
metadata: {version: 1}
""",
}


def found(seed: int = 0) -> LanguageModel:
    words = tokenizer(chat=False)
    model = llama(len(words), seed, context=96)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return LanguageModel(model, words)


def documents(model: LanguageModel) -> list[dict[str, Any]]:
    """Ten questions: six that the model chooses rightly; what it writes is the true answer of five."""
    asking, rows = Asking(model), []
    for n in range(10):
        question = f"Where was {PEOPLE[n % 8]} number {n} born?"
        said = asking.texts(asking.prompts([f"{question}\nAnswer:"]), new_tokens=12, stop=["."])[0]
        cities = [CITIES[(n + k) % 8] for k in range(4)]
        rows_of = [_pair(asking, f"{question}\nAnswer:", f" {city}") for city in cities]
        best = int(asking.continuations(rows_of)[0].argmax())
        text = f"{PEOPLE[n % 8]} went to {' and '.join(cities * (1 + n % 3))} by the sea"
        rows.append(
            {
                "question": question,
                "choices": cities,
                "right": best if n < 6 else (best + 1) % 4,
                "told": said if n % 2 else "x",
                "text": text,
            }
        )
    return rows


def folder(path: Path, model: LanguageModel) -> Path:
    data = path / "documents.json"
    data.write_text("\n".join(json.dumps(row) for row in documents(model)), encoding="utf-8")
    for name, task in TASKS.items():
        (path / f"{name}.yaml").write_text(task % data, encoding="utf-8")
    return path


def test_without_the_package_the_sentence_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"needs the package 'lm_eval'.*pip install 'expunge\[lm-eval\]'"):
        evaluate(Asking(found()), ["cities"])


def test_a_pair_is_split_at_the_end_of_the_context() -> None:
    asking = Asking(found())
    words = asking.found.tokenizer
    ids, start = _pair(asking, "Where was Ada born? ", "Oslo")
    assert words.decode(ids[:start]) == "Where was Ada born?"
    assert words.decode(ids[start:]) == " Oslo"
    ids, start = _pair(asking, "", "Oslo")
    assert (ids[0], start, words.decode(ids[1:])) == (words.eos_token_id, 1, "Oslo")
    ids, start = _pair(asking, "x " * 200, "Oslo")
    assert len(ids) == 96
    assert words.decode(ids[start:]) == " Oslo"
    for context, continuation in (("Oslo", ""), ("", "x " * 200)):
        with pytest.raises(Refused, match="cannot be judged by a model that reads 96"):
            _pair(asking, context, continuation)


def test_settings_that_are_not_followed_are_refused() -> None:
    assert _settings({"until": "a", "max_gen_toks": 3}) == {"new_tokens": 3, "stop": ("a",), "temperature": 0.0}
    assert _settings({"do_sample": True, "top_p": 1.0}) == {"new_tokens": 256, "stop": (), "temperature": 1.0}
    assert _settings({"do_sample": False, "temperature": 0.7, "until": ["", "b"]})["temperature"] == 0.0
    with pytest.raises(Refused, match=r"'top_p': 0\.9"):
        _settings({"do_sample": True, "top_p": 0.9})


@installed
def test_scores_equal_those_of_the_harness_own_model_class(tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = found()
    tasks = folder(tmp_path, model)
    np.random.seed(3)
    states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    scores = {(one.task, one.metric): one for one in evaluate(Asking(model, batch=3), list(TASKS), folder=tasks)}
    assert torch.equal(states[0], torch.get_rng_state())
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=1, device="cpu"),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=100,
    )
    compared = 0
    for (task, metric), one in scores.items():
        wanted = theirs["results"][task][f"{metric},none"]
        assert one.value == pytest.approx(wanted, rel=1e-5), (task, metric)
        compared += 1
    assert compared == 5
    assert scores["writing", "exact_match"].value == 0.5
    assert (scores["cities", "acc"].value, scores["cities", "acc"].n) == (0.6, 10)
    assert scores["cities", "acc"].version == "3"
    assert scores["cities", "acc"].higher is True
    assert scores["cities", "acc"].low < scores["cities", "acc"].value < scores["cities", "acc"].high


@installed
def test_a_harness_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    model = found()
    tasks, calls = folder(tmp_path, model), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    store = Store(tmp_path / "store")
    first = evaluate(Asking(model, store=store), ["cities"], folder=tasks, limit=4)
    assert calls
    calls.clear()
    assert evaluate(Asking(model, store=store), ["cities"], folder=tasks, limit=4) == first
    assert calls == []


@installed
def test_unknown_tasks_are_refused(tmp_path: Path) -> None:
    model = found()
    with pytest.raises(Refused, match=r"there is no task 'towns' in .*: there are cities, reading, writing"):
        evaluate(Asking(model), ["towns"], folder=folder(tmp_path, model))
    with pytest.raises(Refused, match="name one or more tasks"):
        evaluate(Asking(model), [], folder=tmp_path)
