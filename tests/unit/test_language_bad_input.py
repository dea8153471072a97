"""What goes wrong with language models, as a user meets it: refused in one sentence before the work, or handled rightly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge import Descend, Refused, Request, unlearn
from expunge.cli import main
from expunge.data.json_lines import read_texts
from expunge.data.text import Template, Texts, encode
from expunge.methods.gradient_ascent import gradient_ascent
from expunge.methods.npo import npo
from expunge.objectives import NLL
from expunge.optim import SGD
from expunge.oracle import Diverged
from expunge.tasks.language_model import LanguageModel, load_language_model
from tests import language

transformers = pytest.importorskip("transformers")

GOOD = [json.dumps(row) for row in language.texts(0, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer, which reads 64 tokens."""
    return language.folder(tmp_path_factory.mktemp("language") / "model")


def options(model: Path, forget: Path, retain: Path, out: Path) -> list[str]:
    return [
        "run", "--task", "causal-lm", "--model", str(model), "--forget", str(forget), "--retain", str(retain),
        "--method", "npo", "--out", str(out), "method.steps=2",
    ]  # fmt: skip


def refused(command: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The one sentence that the command line says; nothing was run."""
    capsys.readouterr()  # what transformers said while the test made its files
    assert main(command) == status
    told = capsys.readouterr().err
    assert told.count("\n") == 1, told
    assert "Traceback" not in told
    out = Path(command[command.index("--out") + 1])
    assert not (out / "record.json").exists()
    assert not (out / "checkpoint").exists()
    return told


def lines(path: Path, *rows: str | bytes) -> Path:
    """A file of these lines, ended as they are."""
    path.write_bytes(b"".join((row if isinstance(row, bytes) else row.encode()) + b"\n" for row in rows))
    return path


# A file with broken lines

BROKEN: list[tuple[str | bytes, str]] = [
    ('{"question": "a", "answer": "b"', "is not JSON"),
    ("question: a", "is not JSON"),
    ('{"question": "a"}{"answer": "b"}', "is not JSON"),
    ('["a", "b"]', "is a list"),
    ('"a"', "is a str"),
    ("null", "is a NoneType"),
    ('{"question": "a"}', "has the keys question"),
    ("{}", "has the keys (none)"),
    ('{"question": "a", "anwser": "b"}', "has the keys question, anwser"),
    ('{"question": "a", "answer": 5}', "'answer' is a int"),
    ('{"question": "a", "answer": null}', "'answer' is missing"),
    ('{"question": null, "answer": "b"}', "'question' is missing"),
    ('{"question": "a", "answer": ""}', "'answer' is empty"),
    ('{"question": "a", "answer": " \\n\\t "}', "'answer' is empty"),
    ('{"question": "  ", "answer": "b"}', "'question' is empty"),
    ('{"text": ""}', "'text' is empty"),
    ('{"messages": []}', "'messages' should be a list"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}', "'content' is empty"),
    ('{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}', "the last message"),
    ('{"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}', "needs a role"),
    (b'{"question": "caf\xe9", "answer": "b"}', "is not UTF-8"),
]


@pytest.mark.parametrize(("line", "said"), BROKEN, ids=[said for _, said in BROKEN])
def test_a_broken_line_is_named_by_its_number(
    line: str | bytes, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In either file; a blank line counts, so that an editor shows the same number."""
    good = lines(tmp_path / "good.jsonl", *GOOD)
    bad = lines(tmp_path / "bad.jsonl", GOOD[0], "", GOOD[1], line, GOOD[2])
    for pair in ((bad, good), (good, bad)):
        told = refused(options(folder, *pair, tmp_path / "out"), capsys)
        assert f"{bad} line 4" in told
        assert said in told


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no examples"),
        (b"\n \n", "has no examples"),
        (b'[\n{"question": "a", "answer": "b"}\n]', "one JSON document, give one object per line"),
        (None, "No such file"),
    ],
    ids=["empty", "blank", "one document", "missing"],
)
def test_a_file_without_lines(
    content: bytes | None, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = lines(tmp_path / "good.jsonl", *GOOD), tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_bytes(content)
    assert said in refused(options(folder, bad, good, tmp_path / "out"), capsys)


def test_files_as_other_systems_write_them(tmp_path: Path) -> None:
    """A byte-order mark, carriage returns, blank lines and no end of line at the end."""
    plain = read_texts(lines(tmp_path / "plain.jsonl", *GOOD))
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(GOOD).encode())
    assert [(e.prompt, e.answer) for e in read_texts(other)] == [(e.prompt, e.answer) for e in plain]


# Padding


def test_a_pad_token_that_is_the_end_token_changes_nothing() -> None:
    """The end of an answer is learnt and judged all the same, and padding is not."""
    examples = language.texts(0, 6)
    found = {}
    for name, words in (
        ("own", language.tokenizer()),
        ("end", language.tokenizer()),
        ("none", language.tokenizer(pad=False)),
    ):
        if name == "end":
            words.pad_token = words.eos_token
        model = LanguageModel(language.llama(360), words)
        told = [language_example(row) for row in examples]
        data = model.encode(told).data
        batch = data.batch(torch.arange(6))
        assert all(int(row[row >= 0][-1]) == words.eos_token_id for row in batch["labels"])
        assert (batch["attention_mask"].sum(1) == torch.tensor([len(ids) for ids in _source(data).ids])).all()
        request = Request(data.select(range(3)), data.select(range(3, 6)))
        done = unlearn(model.model, request, task=model.task(), method=npo(steps=2, batch=3))
        found[name] = (model.task().nll(model.model, batch).detach(), done.record["history"])
    for name in ("end", "none"):
        assert torch.equal(found[name][0], found["own"][0])
        assert found[name][1] == found["own"][1]


def language_example(row: dict[str, str]) -> Any:
    from expunge.data.json_lines import Example

    return Example(({"role": "user", "content": row["question"]},), row["answer"], "here")


def _source(data: Any) -> Texts:
    assert isinstance(data.source, Texts)
    return data.source


# Lengths


def test_a_prompt_longer_than_the_context(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = lines(tmp_path / "good.jsonl", *GOOD)
    long = json.dumps({"question": "Where was Ada born? " * 30, "answer": "Oslo"})
    bad = lines(tmp_path / "bad.jsonl", json.dumps({"question": "Who?", "answer": "Ada"}), long)
    told = refused(options(folder, bad, good, tmp_path / "out"), capsys)
    assert f"{bad} line 2: the prompt has " in told
    assert "and the model reads 64" in told


def test_an_answer_longer_than_the_context_is_cut_and_said(folder: Path, tmp_path: Path) -> None:
    found = load_language_model(folder)
    long = json.dumps({"question": "Where?", "answer": "by the sea " * 60})
    encoded = found.encode(read_texts(lines(tmp_path / "texts.jsonl", GOOD[0], long)))
    assert encoded.notes == ("1 of 2 answers go beyond the 64 tokens that the model reads and were cut",)
    assert encoded.data.batch(torch.arange(2))["input_ids"].shape == (2, 64)


def test_a_text_longer_than_the_context_is_read_in_pieces(folder: Path, tmp_path: Path) -> None:
    """Every token but the first is judged once, and the model is never given more than it reads."""
    found = load_language_model(folder)
    text = json.dumps({"text": " ".join(f"Ada number {n} was born in Oslo" for n in range(30))})
    examples = read_texts(lines(tmp_path / "texts.jsonl", text))
    whole = Template(found.tokenizer).ids(examples[0])[0]
    data = found.encode(examples).data
    assert len(data) > 3
    judged = [row[row >= 0].tolist() for row in data.batch(torch.arange(len(data)))["labels"]]
    assert [token for row in judged for token in row] == whole[1:]
    assert max(map(len, _source(data).ids)) <= 64


def test_an_answer_of_which_the_tokenizer_keeps_nothing(tmp_path: Path) -> None:
    """A tokenizer that drops what it does not know: only the end would be left to learn."""
    from tokenizers import Tokenizer, models

    letters = sorted(set("Question:WhereAnswer:\n"))
    core = Tokenizer(models.BPE(vocab={"<end>": 0} | {letter: n + 1 for n, letter in enumerate(letters)}, merges=[]))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    path = lines(tmp_path / "texts.jsonl", json.dumps({"question": "Where", "answer": "\u5965\u65af\u9646"}))
    with pytest.raises(Refused, match=r"line 1: the answer '.*' has no token of its own"):
        encode(read_texts(path), Template(words), length=64)


# A tokenizer that does not match, a vocabulary that was resized


def another(folder: Path, path: Path, change: Callable[[Any, Any], None]) -> Path:
    """A copy of the folder of which the model and the tokenizer were changed."""
    shutil.copytree(folder, path)
    model, words = load_language_model(folder).model, language.tokenizer()
    change(model, words)
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


def _added(_model: Any, words: Any) -> None:
    words.add_tokens(["<new>"])


def _ended(_model: Any, words: Any) -> None:
    words.eos_token = "<|user|>"


def _smaller(model: Any, _words: Any) -> None:
    model.resize_token_embeddings(352)


def _unlikely(model: Any, _words: Any) -> None:
    model.model.norm.weight.data.mul_(400)


def _nan(model: Any, _words: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan


WRONG: list[tuple[Callable[[Any, Any], None], str]] = [
    (_added, "has ids up to 360 and the model's embedding 360 rows"),
    (_ended, "ends a text with token 2 and the model with [1]"),
    (_smaller, "has ids up to 359 and the model's embedding 352 rows"),
    (_unlikely, "the tokenizer or the weights belong to another model"),
    (_nan, "gives losses that are not numbers"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=[change.__name__.strip("_") for change, _ in WRONG])
def test_a_model_and_a_tokenizer_that_do_not_belong_together(
    change: Callable[[Any, Any], None], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = another(folder, tmp_path / "model", change)
    good, kept = lines(tmp_path / "good.jsonl", *GOOD[:2]), lines(tmp_path / "kept.jsonl", *GOOD[2:])
    assert said in refused(options(model, good, kept, tmp_path / "out"), capsys)


def test_a_vocabulary_larger_than_the_tokenizers_is_trained_as_it_is(folder: Path, tmp_path: Path) -> None:
    """Rows that no token has are no obstacle: the losses are those of the model itself, and the run keeps its shape."""
    model = another(folder, tmp_path / "model", lambda model, _words: model.resize_token_embeddings(384))
    found = load_language_model(model)
    data = found.encode(read_texts(lines(tmp_path / "texts.jsonl", *GOOD))).data
    batch = data.batch(torch.arange(4))
    columns = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        wanted = float(found.model(**columns).loss)
        task = found.task()
        assert float(task.nll(found.model, batch).sum() / task.units(batch).sum()) == pytest.approx(wanted, rel=1e-6)
    done = unlearn(found.model, Request(data.select([0]), data.select([1, 2])), task=task, method=npo(steps=2, batch=2))
    assert done.model.get_output_embeddings().weight.shape[0] == 384


def test_tokens_that_the_model_has_no_row_for_are_refused_in_python(folder: Path) -> None:
    found = load_language_model(folder)
    data = found.encode([language_example(row) for row in language.texts(0, 2)]).data
    _source(data).ids[1][2] = 360
    with pytest.raises(Refused, match="forget example 1 has a token outside the vocabulary of 360"):
        unlearn(found.model, Request(data), task=found.task(), method=gradient_ascent(steps=1))


# Losses that are no numbers


def test_a_model_that_overflows_before_the_run(folder: Path) -> None:
    """In half precision the first forward pass gives NaN although every weight is a number: said, and by the command line."""
    found = load_language_model(folder, dtype="float16")
    data = found.encode([language_example(row) for row in language.texts(0, 4)]).data
    with torch.no_grad():
        found.model.model.norm.weight.fill_(6e4)
    request = Request(data.select([0, 1]), data.select([2, 3]))
    with pytest.raises(Refused, match="gives losses that are not numbers"):
        unlearn(found.model, request, task=found.task(), method=gradient_ascent(steps=1))


def test_a_run_that_diverges(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The guard gives the last good state back, and the run says so."""
    good, kept = lines(tmp_path / "good.jsonl", *GOOD[:2]), lines(tmp_path / "kept.jsonl", *GOOD[2:])
    assert main([*options(folder, good, kept, tmp_path / "out"), "method.lr=1e30"]) == 0
    assert "was kept" in capsys.readouterr().out


def test_a_diverged_run_without_a_guard_fails_in_one_sentence_and_leaves_the_callers_model_alone(folder: Path) -> None:
    found = load_language_model(folder)
    data = found.encode([language_example(row) for row in language.texts(0, 4)]).data
    before = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    plan = Descend(NLL(), optimizer=SGD(1e38), steps=25)
    with pytest.raises(Diverged, match=r"expected a finite number|stopped being finite") as told:
        unlearn(found.model, Request(data.select([0, 1])), task=found.task(), method=plan)
    assert "\n" not in str(told.value)
    assert all(torch.equal(p, before[name]) for name, p in found.model.named_parameters())
