"""Utility on the tasks of lm-evaluation-harness, of a model in memory, with its own scorers (extra ``lm-eval``).

The harness makes the requests and scores the answers; the model answers through ``asking``: sharded over processes and kept in
a store, so that a run that was killed goes on. Tasks in a folder of yours are read from there alone: with local data files
nothing is fetched. Without a folder, the harness's own tasks are there, whose data it takes from the user's hub or cache.

Departures from the harness's own model class: a text that is too long for the context is cut on the left as there, but one
token earlier, the last one being read too; settings of sampling other than the temperature are refused.

Source: EleutherAI's lm-evaluation-harness (MIT).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge import runtime
from expunge.audit import intervals
from expunge.benchmarks.asking import Asking, Row
from expunge.core import Key, Refused, own_streams
from expunge.registry import need_extra
from expunge.tasks.generation import encode_prompt

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
NEUTRAL: Mapping[str, Any] = {"top_p": 1.0, "num_beams": 1, "repetition_penalty": 1.0, "top_k": 0}
"""Settings of a task's generation that may be given, with the only value that is meant here anyway."""
COUNTED = ("acc", "acc_norm", "exact_match")
"""Metrics that count right answers: their interval is Wilson's, others' two standard errors."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, in the task's own unit.

    Attributes:
        task, metric: as the harness names them; of a metric behind a filter, "metric,filter".
        value, low, high: with a 95 % interval over documents; NaN ends where the harness gives no error.
        n: documents. higher: whether more is better; None where the task does not say. version: of the task.
    """

    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    higher: bool | None
    version: str


def evaluate(
    asking: Asking,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    key: Key = Key(0),
) -> tuple[TaskScore, ...]:
    """Scores of a model on named tasks; the random streams of the process are put back afterwards.

    Args:
        tasks: names. folder: of task files (YAML); without it, the harness's own. shots: answered examples before each
            question, in place of the task's number. limit: documents per task, for a trial. chat: write prompts with the
            tokenizer's chat template. key: of samples and of shots.

    Raises:
        MissingExtra: without lm-evaluation-harness. Refused: for no tasks or an unknown one, or a generation setting that
            is not followed.
    """
    harness = need_extra("lm_eval", "lm-eval", "utility on the tasks of lm-evaluation-harness")
    managers = need_extra("lm_eval.tasks", "lm-eval", "utility on the tasks of lm-evaluation-harness")
    if not tasks:
        raise Refused("there is nothing to evaluate: name one or more tasks of lm-evaluation-harness")
    seed = key.at("harness").seed % 2**31
    with own_streams(seed):
        manager = managers.TaskManager(
            include_path=None if folder is None else str(folder), include_defaults=folder is None
        )
        unknown = [name for name in tasks if name not in manager.all_tasks]
        if unknown:
            raise Refused(
                f"there is no task {unknown[0]!r}{' in ' + str(folder) if folder is not None else ''}: there "
                f"{'are ' + ', '.join(sorted(manager.all_tasks)) if len(manager.all_tasks) <= 20 else 'are others'}"
            )
        found = harness.simple_evaluate(
            model=_adapter(asking, key),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
            apply_chat_template=chat,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return runtime.on_first(lambda: tuple(_scores(found)))


def _adapter(asking: Asking, key: Key) -> Any:
    """The model as the harness wants one. A class of its own kind is the only thing that it takes."""
    api = need_extra("lm_eval.api.model", "lm-eval", "utility on the tasks of lm-evaluation-harness")
    utils = need_extra("lm_eval.utils", "lm-eval", "utility on the tasks of lm-evaluation-harness")

    class Adapter(api.LM):  # type: ignore[name-defined]  # the base is imported where it is needed
        tokenizer_name = asking.found.source or "tokenizer"

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            rows = [_pair(asking, *request.args) for request in requests]
            log, greedy = asking.continuations(rows, "reading")
            return [(float(value), bool(same)) for value, same in zip(log, greedy, strict=True)]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            rows, owner = [], []
            for number, request in enumerate(requests):
                windows = _windows(asking, utils, request.args[0])
                rows += windows
                owner += [number] * len(windows)
            log, _ = asking.continuations(rows, "reading")
            return [float(log[[at == number for at in owner]].sum()) for number in range(len(requests))]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return _written(asking, [request.args for request in requests], key)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return str(
                asking.found.tokenizer.apply_chat_template(
                    chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return asking.found.tokenizer.chat_template if chat_template else None

    return Adapter()


def _pair(asking: Asking, context: str, continuation: str) -> Row:
    """Tokens of both as one text, spaces at the border belonging to the continuation; cut on the left to the context."""
    words = asking.found.tokenizer
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if context:
        ids, start = encode_prompt(words, context + continuation), len(encode_prompt(words, context))
    else:
        told = list(words(continuation, add_special_tokens=False)["input_ids"])
        begin = _beginning(words)
        ids, start = (told, 1) if told[:1] == [begin] else ([begin, *told], 1)
    over = max(0, len(ids) - asking.found.context)
    if start >= len(ids) or over >= start:
        raise Refused(
            f"a continuation of {max(0, len(ids) - start)} tokens cannot be judged by a model that reads "
            f"{asking.found.context}: is it empty, or longer than the context?"
        )
    return ids[over:], start - over


def _windows(asking: Asking, utils: Any, text: str) -> list[Row]:
    """A whole text in rows, each of its tokens judged once."""
    words = asking.found.tokenizer
    windows = utils.get_rolling_token_windows(
        token_list=encode_prompt(words, text),
        prefix_token=_beginning(words),
        max_seq_len=asking.found.context - 1,
        context_len=1,
    )
    pairs = [utils.make_disjoint_window(window) for window in windows]
    return [([*before, *judged], len(before)) for before, judged in pairs]


def _beginning(words: Any) -> int:
    found = words.bos_token_id if getattr(words, "bos_token_id", None) is not None else words.eos_token_id
    if found is None:
        raise Refused(
            "the tokenizer has neither a token that begins a text nor one that ends it: nothing to go on from"
        )
    return int(found)


def _written(asking: Asking, requests: Sequence[tuple[str, Mapping[str, Any]]], key: Key) -> list[str]:
    """What the model writes; requests with the same settings go together."""
    groups: dict[str, list[int]] = {}
    for number, (_, settings) in enumerate(requests):
        groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(number)
    texts = [""] * len(requests)
    for numbers in groups.values():
        how = _settings(requests[numbers[0]][1])
        room = asking.found.context - how["new_tokens"]
        if room < 1:
            raise Refused(
                f"the task writes up to {how['new_tokens']} tokens and the model reads {asking.found.context}, the prompt among "
                f"them: set max_gen_toks in the task"
            )
        prompts = [encode_prompt(asking.found.tokenizer, requests[number][0])[-room:] for number in numbers]
        for number, text in zip(numbers, asking.texts(prompts, rng=key.at("harness"), **how), strict=True):
            texts[number] = text
    return texts


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    rest = dict(given)
    until = rest.pop("until", None) or []
    lengths = [rest.pop(name) for name in LENGTHS if name in rest]
    sample, heat = bool(rest.pop("do_sample", False)), rest.pop("temperature", None)
    odd = {name: value for name, value in rest.items() if name not in NEUTRAL or float(value) != float(NEUTRAL[name])}
    if odd:
        raise Refused(
            f"a task's generation has the settings {odd}, which are not followed here: leave them out of the task"
        )
    temperature = (1.0 if heat is None else float(heat)) if sample else 0.0
    stop = tuple(word for word in ([until] if isinstance(until, str) else until) if word)
    return {"new_tokens": int(lengths[0]) if lengths else 256, "stop": stop, "temperature": temperature}


def _scores(found: Mapping[str, Any]) -> list[TaskScore]:
    scores = []
    for task, metrics in found["results"].items():
        n = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
        better = found.get("higher_is_better", {}).get(task, {})
        version = str(found.get("versions", {}).get(task, ""))
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not filtered:
                continue
            low, high = _interval(metric, float(value), metrics.get(f"{metric}_stderr,{filtered}"), n)
            shown = metric if filtered == "none" else name
            scores.append(TaskScore(task, shown, float(value), low, high, n, better.get(metric), version))
    return scores


def _interval(metric: str, value: float, error: Any, n: int) -> tuple[float, float]:
    if metric in COUNTED and n and 0 <= value <= 1:
        low, high = intervals.wilson(value * n, n)
        return float(low), float(high)
    if not isinstance(error, (int, float)):
        return math.nan, math.nan
    return value - 1.96 * error, value + 1.96 * error
