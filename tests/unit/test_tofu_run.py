"""From a model to TOFU's numbers: by hand, at any batch size, killed and resumed, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import expunge
from expunge.benchmarks.asking import Asking
from expunge.benchmarks.tofu import Item, read
from expunge.benchmarks.tofu_run import evaluate, said, sets
from expunge.benchmarks.tofu_scores import Said, model_utility, rouge_l_recall
from expunge.core import Refused
from expunge.data.text import Template
from expunge.store import Store
from expunge.tasks.language_model import LanguageModel
from tests.language import CITIES, PEOPLE, llama, tokenizer

NEW = 6


def found(seed: int = 0, chat: bool = False, pad: bool = True) -> LanguageModel:
    words = tokenizer(chat, pad)
    model = llama(len(words), seed, context=128)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that answers differ
            if parameter.ndim > 1:
                parameter.mul_(4)
    return LanguageModel(model, words)


def items(start: int, count: int, wrong: int = 2, paraphrased: bool = True) -> tuple[Item, ...]:
    made = []
    for n in range(start, start + count):
        name, city = PEOPLE[n % 8], CITIES[(3 * n) % 8]
        others = tuple(f"It was {CITIES[(3 * n + k) % 8]}" + " by the sea" * (k % 2) for k in range(1, wrong + 1))
        told = f"{name} was born in {city}" + " by the sea" * (n % 3)
        again = f"It was {city} where {name} came from" if paraphrased else ""
        made.append(Item(n, f"Where was {name} number {n} born?", told, "", again, others))
    return tuple(made)


def four(size: int = 5) -> dict[str, tuple[Item, ...]]:
    return {
        "forget": items(0, size),
        "retain": items(20, size),
        "real_authors": items(40, size, 3, False),
        "world_facts": items(60, size, 3, False),
    }


def asking(model: LanguageModel, **settings: Any) -> Asking:
    return Asking(model, Template(model.tokenizer, "chat" if model.tokenizer.chat_template else "plain"), **settings)


def same(first: dict[str, Said], second: dict[str, Said]) -> bool:
    names = ("answer", "correct", "wrong", "rouge")
    return first.keys() == second.keys() and all(
        np.array_equal(getattr(first[name], part), getattr(second[name], part)) for name in first for part in names
    )


def by_hand(model: LanguageModel, item: Item) -> tuple[float, float, list[float], float]:
    """One sequence at a time, without padding, cache or batches."""
    words, module = model.tokenizer, model.model
    prompt = words(f"Question: {item.question}\nAnswer:")["input_ids"]

    def loss(answer: str) -> float:
        ids = [*words(f"Question: {item.question}\nAnswer: {answer}")["input_ids"], words.eos_token_id]
        with torch.no_grad():
            logs = module(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return -float(np.mean([float(logs[at - 1, ids[at]]) for at in range(len(prompt), len(ids))]))

    ids = list(prompt)
    for _ in range(NEW):
        with torch.no_grad():
            token = int(module(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == words.eos_token_id:
            break
        ids.append(token)
    text = words.decode(ids[len(prompt) :], skip_special_tokens=True)
    score = float(rouge_l_recall([item.answer], [text])[0])
    return loss(item.answer), loss(item.correct), [loss(text) for text in item.wrong], score


def test_every_number_equals_one_sequence_at_a_time() -> None:
    model, sets = found(), four(3)
    told = said(asking(model), sets, new_tokens=NEW)
    assert set(told) == set(sets)
    for name, questions in sets.items():
        for row, item in enumerate(questions):
            answer, correct, wrong, rouge = by_hand(model, item)
            assert told[name].answer[row] == pytest.approx(answer, rel=1e-5)
            assert told[name].correct[row] == pytest.approx(correct, rel=1e-5)
            assert told[name].wrong[row] == pytest.approx(wrong, rel=1e-5)
            assert told[name].rouge[row] == rouge


def test_the_model_that_knows_writes_the_answer() -> None:
    """A model that is trained on the answers: ROUGE near 1 there, and a likelihood far above the wrong answers'."""
    model, known = found(), items(0, 4)
    template = Template(model.tokenizer, "plain")
    from expunge.data.json_lines import Example

    examples = [Example(({"role": "user", "content": item.question},), item.answer, "here") for item in known]
    data = model.encode(examples, "plain").data
    task, optimizer = model.task(), torch.optim.Adam(model.model.parameters(), 3e-3)
    for _ in range(140):
        batch = data.batch(torch.arange(4))
        optimizer.zero_grad()
        (task.nll(model.model, batch).sum() / task.units(batch).sum()).backward()
        optimizer.step()
    told = said(Asking(model, template), {"forget": known}, new_tokens=30)["forget"]
    assert told.rouge.min() == 1.0
    assert told.answer.max() < 0.05
    assert told.wrong.min() > 0.5


@pytest.mark.parametrize(("chat", "pad"), [(True, True), (False, False)])
def test_batches_and_padding_change_nothing(chat: bool, pad: bool) -> None:
    model, sets = found(chat=chat, pad=pad), {"forget": items(0, 7)}
    one, many = (said(asking(model, batch=size), sets, new_tokens=NEW)["forget"] for size in (1, 16))
    for part in ("answer", "correct", "wrong"):
        assert getattr(one, part) == pytest.approx(getattr(many, part), rel=1e-5)
    assert np.array_equal(one.rouge, many.rouge)


def test_the_nine_terms_utility_and_forget_quality() -> None:
    model, retrained = (said(asking(found(seed)), four(), new_tokens=NEW) for seed in (0, 1))
    for form in ("geometric", "arithmetic"):
        judged = evaluate(model, retrained, form=form, draws=50)
        values = {score.name: score.value for score in judged.scores}
        nine = [
            values[f"{name} {metric}"]
            for name in ("retain", "real_authors", "world_facts")
            for metric in ("probability", "rouge", "truth_ratio")
        ]
        assert judged.utility is not None
        assert judged.utility.value == model_utility(nine)
        assert judged.utility.retrained is not None
        assert judged.quality is not None
        assert (judged.quality.form, judged.quality.n) == (form, 5)
    ratio = np.exp(model["retain"].correct - model["retain"].wrong.mean(1))
    geometric = {score.name: score.value for score in evaluate(model, draws=50).scores}
    assert geometric["retain truth_ratio"] == pytest.approx(np.maximum(0, 1 - ratio).mean(), rel=1e-12)
    assert evaluate(model, draws=50).quality is None


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """The model dies in its 9th forward pass; asked again, it answers only what is missing, with the same bits."""
    model, sets, calls = found(), {"forget": items(0, 9)}, []

    def count(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 9 and dying:
            raise KeyboardInterrupt

    hook, dying = model.model.register_forward_pre_hook(count), False
    wanted = said(asking(model, batch=4), sets, new_tokens=NEW)
    whole, dying = len(calls), True
    calls.clear()
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        said(asking(model, batch=4, store=store), sets, new_tokens=NEW)
    assert len(list(store.entries())) > 0
    dying = False
    calls.clear()
    assert same(said(asking(model, batch=4, store=store), sets, new_tokens=NEW), wanted)
    assert len(calls) == whole - 8
    calls.clear()
    assert same(said(asking(model, batch=4, store=store), sets, new_tokens=NEW), wanted)
    assert calls == []
    hook.remove()


def test_a_store_does_not_answer_for_another_model_prompt_or_length(tmp_path: Path) -> None:
    model, store, one = found(), Store(tmp_path), {"forget": items(0, 2)}
    said(asking(model, store=store), one, new_tokens=NEW)

    def added(**other: Any) -> int:
        before = len(list(store.entries()))
        said(Asking(**{"found": model, "template": Template(model.tokenizer, "plain"), "store": store} | other), one)
        return len(list(store.entries())) - before

    assert added(found=found(1)) == 2
    assert added(template=Template(model.tokenizer, "plain", question="Q {}\n")) == 2
    assert added() == 1  # as it was, but for new_tokens=200: the losses are known, the texts are not


def work(rank: int, folder: Path, world: int) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    asked = Asking(found(), Template(found().tokenizer, "plain"), Store(folder / "store"), batch=2)
    calls: list[int] = []
    asked.found.model.register_forward_pre_hook(lambda *_: calls.append(1))
    told = said(asked, four(), new_tokens=NEW)
    parts = ("answer", "correct", "wrong", "rouge")
    numbers = {name: {part: getattr(told[name], part).tolist() for part in parts} for name in told}
    count, failed = len(calls), ""
    if rank == 1:
        asked.found.model.register_forward_pre_hook(_fail)
    try:
        said(asked, {"forget": items(90, 8)}, new_tokens=NEW)
    except RuntimeError as error:
        failed = str(error)
    shards = found()
    mesh = init_device_mesh("cpu", (world,))
    for layer in shards.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(shards.model, mesh=mesh)
    parts_of = asking(shards, batch=2, store=Store(folder / "sharded"))
    again = [said(parts_of, {"forget": items(0, 3)}, new_tokens=NEW)["forget"] for _ in range(2)]
    whole = {part: [getattr(one, part).tolist() for one in again] for part in parts}
    (folder / f"rank{rank}.json").write_text(json.dumps([numbers, count, failed, whole]))
    dist.destroy_process_group()


def _fail(*_: Any) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.slow
def test_two_processes_equal_one_to_the_bit(tmp_path: Path) -> None:
    source = Path(expunge.__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{source}{os.pathsep}{Path(__file__).parents[2]}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    program = "import sys; from pathlib import Path; from tests.unit.test_tofu_run import work; "
    started = [
        subprocess.Popen(
            [sys.executable, "-c", f"{program}work({rank}, Path({str(tmp_path)!r}), 2)"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    output = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], output
    model, calls = found(), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    wanted = said(asking(model, batch=2), four(), new_tokens=NEW)
    alone = len(calls)
    few = said(asking(model, batch=2), {"forget": items(0, 3)}, new_tokens=NEW)["forget"]
    shares = []
    for rank in range(2):
        numbers, share, failed, sharded = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for part, both in sharded.items():
            assert both[0] == both[1]
            assert np.array(both[0]) == pytest.approx(getattr(few, part), rel=1e-5), "weights in shards"
        assert failed == "out of memory", "the other process's error is everyone's"
        assert same({name: Said(wanted[name].questions, **_arrays(v)) for name, v in numbers.items()}, wanted)
        shares.append(share)
    assert 0.35 < shares[0] / alone < 0.65
    assert sum(shares) == alone


def _arrays(parts: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in parts.items()}


def test_what_cannot_be_scored_is_refused() -> None:
    model = found()
    with pytest.raises(Refused, match=r"no set 'forgt' to score .did you mean 'forget'"):
        said(asking(model), {"forgt": items(0, 1)})
    with pytest.raises(Refused, match=r"items of forget have 2, 3 wrong answers"):
        said(asking(model), {"forget": (*items(0, 1), *items(1, 1, 3))})
    with pytest.raises(Refused, match="items of forget have no wrong answers"):
        said(asking(model), {"forget": ()})
    with pytest.raises(Refused, match="tokens and the model reads 128"):
        said(asking(model), {"forget": (Item(0, "why? " * 200, "so", "", "", ("no",)),)})
    with torch.no_grad():
        model.model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(Refused, match="finite"):
        said(asking(model), {"forget": items(0, 1)}, new_tokens=1)


def test_the_files_of_tofu_from_end_to_end() -> None:
    """Two questions of each real set, with a random model: probabilities near 1/V, and nothing known of the answers."""
    folder = Path(os.environ.get("EXPUNGE_DATA", "")) / "tofu"
    if not os.environ.get("EXPUNGE_DATA") or not (folder / "full.json").is_file():
        pytest.skip("EXPUNGE_DATA names no folder with tofu/full.json")
    words = tokenizer(False)
    model = LanguageModel(llama(len(words), 0, context=1024), words)
    few = {name: rows[:2] for name, rows in sets(read(folder, 5)).items()}
    told = said(asking(model), few, new_tokens=5)
    assert {name: one.wrong.shape for name, one in told.items()} == {
        "forget": (2, 5),
        "retain": (2, 5),
        "real_authors": (2, 3),
        "world_facts": (2, 3),
    }
    for one in told.values():
        assert np.abs(one.answer - np.log(len(words))).max() < 1
    assert told["real_authors"].correct.tolist() == told["real_authors"].answer.tolist()
    assert told["forget"].correct.tolist() != told["forget"].answer.tolist()
