"""Language models from folders and to folders, and a whole run from the command line."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch

from expunge.cli import main
from expunge.core import Refused
from expunge.data.json_lines import Example, read_texts
from expunge.tasks.language_model import check_fit, load_language_model, save_language_model
from tests import language

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return language.folder(tmp_path_factory.mktemp("language") / "model")


def test_what_is_saved_is_what_transformers_loads(folder, tmp_path):
    found = load_language_model(folder)
    with torch.no_grad():
        found.model.get_output_embeddings().weight.add_(0.25)
    where = save_language_model(found, tmp_path / "saved")
    back = transformers.AutoModelForCausalLM.from_pretrained(where)
    words = transformers.AutoTokenizer.from_pretrained(where)
    ids = torch.tensor([words("Where was Ada number 0 born?")["input_ids"]])
    assert torch.equal(back(ids).logits, found.model(ids).logits)
    assert words.chat_template == found.tokenizer.chat_template
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in where.iterdir()}
    assert [file.name for file in tmp_path.iterdir()] == ["saved"], "nothing half-written is left"
    assert load_language_model(save_language_model(back_as(found, back), where)).vocab == found.vocab


def back_as(found, model):
    """The same tokenizer with another model."""
    return type(found)(model, found.tokenizer)


def test_the_weights_of_a_run_are_not_kept_twice(folder, tmp_path):
    found = load_language_model(folder)
    weights = tmp_path / "weights.safetensors"
    shutil.copy(folder / "model.safetensors", weights)
    where = save_language_model(found, tmp_path / "saved", weights=weights)
    assert (where / "model.safetensors").stat().st_ino == weights.stat().st_ino


def test_a_folder_of_something_else_is_left_alone(folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(Refused, match="is not empty and holds no model"):
        save_language_model(load_language_model(folder), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_precision_asked_for(folder, dtype):
    found = load_language_model(folder, dtype=dtype)
    assert found.model.dtype == getattr(torch, dtype)


def test_files_that_are_no_model(folder, tmp_path):
    for wrong, said in ((tmp_path, "holds no language model"), (tmp_path / "none", "holds no language model")):
        with pytest.raises(Refused, match=said):
            load_language_model(wrong)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(Refused, match="cannot load a language model from") as caught:
        load_language_model(broken)
    assert "\n" not in str(caught.value)


def test_code_in_a_folder_is_never_run(folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "c.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(Refused, match="cannot load a language model"):
        load_language_model(own)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_does_not_belong(folder, tmp_path):
    more, ended = tmp_path / "more", tmp_path / "ended"
    words = language.tokenizer()
    words.add_tokens([f"<new{n}>" for n in range(9)])
    words.save_pretrained(more)
    with pytest.raises(Refused, match="ids up to 368 and the model's embedding 360 rows"):
        load_language_model(folder, tokenizer=more)
    words = language.tokenizer()
    words.eos_token = "<|user|>"
    words.save_pretrained(ended)
    with pytest.raises(Refused, match=r"ends a text with token 2 and the model with \[1\]"):
        load_language_model(folder, tokenizer=ended)


def test_a_vocabulary_that_was_resized(folder, tmp_path):
    larger, smaller = (load_language_model(folder).model for _ in range(2))
    larger.resize_token_embeddings(384)
    smaller.resize_token_embeddings(300)
    words = language.tokenizer()
    for name, model in (("larger", larger), ("smaller", smaller)):
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    found = load_language_model(tmp_path / "larger")
    encoded = found.encode(read_texts(language.write(tmp_path / "f.jsonl", language.texts(0, 3))))
    task = found.task()
    task.check(encoded.data, "forget")
    assert found.vocab == 384
    assert torch.isfinite(task.nll(found.model, encoded.data.batch(torch.arange(3)))).all()
    with pytest.raises(Refused, match="ids up to 359 and the model's embedding 300 rows"):
        load_language_model(tmp_path / "smaller")


def test_a_model_that_finds_the_texts_less_likely_than_guessing(folder, tmp_path):
    found = load_language_model(folder)
    encoded = found.encode(read_texts(language.write(tmp_path / "f.jsonl", language.texts(0, 3))))
    check_fit(found.model, found.task(), encoded.data)
    with torch.no_grad():
        found.model.model.norm.weight.mul_(400)
    with pytest.raises(
        Refused, match=r"where guessing gives 5\.9: the tokenizer or the weights belong to another model"
    ):
        check_fit(found.model, found.task(), encoded.data)


def test_an_adapter_folder_is_its_base_with_the_adapter_merged(folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    language.tokenizer().save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    found = load_language_model(tmp_path / "adapter")
    torch.testing.assert_close(found.model(ids).logits, adapted.eval()(ids).logits)
    assert not hasattr(found.model, "peft_config")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    language.write(path / "forget.jsonl", language.texts(0, 6))
    language.write(path / "retain.jsonl", language.texts(6, 12))
    language.write(path / "test.jsonl", [*language.texts(40, 5), {"text": "a <b>bold</b> claim"}])
    return path


def options(folder, files, out, *more):
    """A command line without a run file."""
    return [
        "run", "--task", "causal-lm", "--model", str(folder), "--forget", str(files / "forget.jsonl"),
        "--retain", str(files / "retain.jsonl"), "--method", "npo", "--out", str(out), *more, "method.steps=3",
    ]  # fmt: skip


def test_a_run_without_a_run_file(folder, files, tmp_path, capsys):
    others = [language.folder(tmp_path / f"retrained{seed}", seed=seed) for seed in (1, 2)]
    retrained = [part for other in others for part in ("--retrained", str(other))]
    out = tmp_path / "out"
    command = options(folder, files, out, "--test", str(files / "test.jsonl"), *retrained, "audit.trust=true", "--json")
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["record"]["method"] == "npo"
    assert found["record"]["examples"] == {"forget": 6, "retain": 12}
    told = found["report"]["exchanges"]
    assert [exchange["part"] for exchange in told] == ["forget"] * 6 + ["retain"] * 3 + ["test"]
    assert list(told[0]["said"]) == ["original", "unlearned", "retrained"]
    assert told[0]["question"] == "Where was Ada number 0 born?"
    assert told[0]["truth"].startswith("Ada was born")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    before = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(loaded.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert main(command) == 0, "the finished run is read back"
    assert json.loads(capsys.readouterr().out)["record"]["result"] == found["record"]["result"]
    page = (out / "report.html").read_text()
    assert "What the models answer" in page
    assert "Where was Ada number 0 born?" in page


def test_without_references_there_is_a_report_that_cannot_tell(folder, files, tmp_path, capsys):
    assert main(options(folder, files, tmp_path / "out")) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "cannot tell" in told
    assert re.search(r"peak memory \d+ MiB \(predicted \d+ MiB\), [\d.e-]+ s a step \(predicted", told)
    assert "What the models answer" in (tmp_path / "out" / "report.html").read_text()


def test_references_are_fine_tuned_from_a_base(folder, files, tmp_path, capsys):
    base = language.folder(tmp_path / "base", seed=9)
    more = [f"audit.base={base}", "audit.retrained=2", "audit.epochs=1", "audit.trust=true"]
    assert main([*options(folder, files, tmp_path / "out"), *more, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["report"]["rows"]
    assert [row["name"] for row in rows] == ["original", "unlearned", "retrain"]


def test_an_adapter_is_left_as_peft_reads_it(folder, files, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    out = tmp_path / "out"
    assert main([*options(folder, files, out, "--adapter", "lora"), "method.lr=0.01", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["record"]
    assert record["method"] == "npo in LoRA"
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = base(ids).logits
    adapted = peft.PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "model")(ids).logits
    torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=1e-5)
    assert float((merged - before).detach().abs().max()) > 1e-3


def test_checkpointing_changes_nothing_but_the_price(folder, files, tmp_path, capsys):
    found = []
    for name, more in (("plain", []), ("again", ["model.checkpointing=true"])):
        assert main([*options(folder, files, tmp_path / name), *more, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["record"])
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / "model")
        found.append(dict(model.named_parameters()))
    assert found[0]["method"] == found[2]["method"] == "npo"
    for name, value in found[1].items():
        torch.testing.assert_close(found[3][name], value, atol=1e-6, rtol=1e-5)


def test_alternate_answers_are_read_or_written_by_the_model(files, tmp_path, capsys):
    folder = language.folder(tmp_path / "long", context=512)
    rows = [{**row, "sub_answer": "Nobody knows."} for row in language.texts(0, 6)]
    command = options(folder, files, tmp_path / "given")
    command[command.index("--method") + 1] = "alt_po"
    given = language.write(tmp_path / "alternates.jsonl", rows)
    assert main([*command, f"data.alternates={given}", "--json"]) == 0
    capsys.readouterr()
    command[command.index(str(tmp_path / "given"))] = str(tmp_path / "made")
    assert main([*command, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["record"]
    made = [json.loads(line) for line in (tmp_path / "made" / "alternates.jsonl").read_text().splitlines()]
    assert first["examples"]["forget"] == len(made) > 6
    assert {row["question"] for row in made} == {row["question"] for row in rows}
    assert main([*command, "--json"]) == 0, "the same command reads them back"
    assert json.loads(capsys.readouterr().out)["record"]["result"] == first["result"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{**language.texts(9, 1)[0], "sub_answer": "x"}],
            "has a question and answer that are not in the texts to forget",
        ),
        ([{**language.texts(0, 1)[0], "sub_answer": "x"}], "has no alternate for the question"),
    ],
)
def test_alternates_of_other_questions(folder, files, tmp_path, capsys, rows, said):
    command = options(folder, files, tmp_path / "out")
    command[command.index("--method") + 1] = "alt_po"
    given = language.write(tmp_path / "alternates.jsonl", rows)
    assert main([*command, f"data.alternates={given}"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("more", "held"), [([], True), (["--adapter", "lora"], False)])
def test_a_second_copy_of_the_model_is_held_only_where_it_must_be_and_is_said(
    folder, files, tmp_path, capsys, more, held
):
    command = options(folder, files, tmp_path / "out", *more)
    command[command.index("--method") + 1] = "kl"
    assert main(command) == 0
    assert ("a second copy of the model is held: method kl asks" in " ".join(capsys.readouterr().out.split())) == held


def test_the_result_does_not_depend_on_whether_a_second_copy_is_held(folder, files, tmp_path, capsys):
    """The command line caches references and changes the model that it loaded; Python keeps the caller's model."""
    import expunge as ex

    assert main([*options(folder, files, tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["record"]
    found = load_language_model(folder)
    forget = found.encode(read_texts(files / "forget.jsonl"))
    retain = found.encode(read_texts(files / "retain.jsonl"), first_id=len(forget.data))
    request = ex.Request(forget.data, retain.data)
    outcome = ex.unlearn(found.model, request, task=found.task(), method=ex.methods.npo(steps=3), seed=0)
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    for name, value in outcome.model.named_parameters():
        torch.testing.assert_close(dict(written.named_parameters())[name], value, atol=1e-5, rtol=1e-4)
    assert result["cost"]["forward"] < outcome.record["cost"]["forward"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["run.adapter=lorra"], "did you mean 'lora'"),
        (["run.adapter={rank=8}"], "[run] adapter should be a name or a table with a name"),
        (["run.adapter={name='lora', rnk=8}"], "rnk"),
        (["--method"], "missing: --method"),
        (["--model"], "missing: --model"),
        (["data.label=x"], r"\[data\] label does not belong to task 'causal-lm'"),
        (["audit.retrained=2"], "give [audit] base"),
        (["model.four_bit=true"], "a 4-bit model cannot be trained itself"),
        (["data.template=chatty"], "data.template should be 'auto', 'chat' or 'plain'"),
        (["model.dtype=int3"], "model.dtype should be"),
        (["data.length=4"], "the model reads 4"),
        (["data.length=400"], "length is 400 tokens and the model reads 64"),
        (["method.name=npoo"], "did you mean 'npo'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_done(folder, files, tmp_path, capsys, change, said):
    command = options(folder, files, tmp_path / "out")
    if change[0].startswith("--"):
        place = command.index(change[0])
        del command[place : place + 2]
    else:
        command += change
    assert main(command) == 2
    told = capsys.readouterr().err
    assert said.replace("\\", "") in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out" / "record.json").exists()


def test_the_same_text_to_forget_and_to_keep(folder, files, tmp_path, capsys):
    both = language.write(tmp_path / "both.jsonl", [*language.texts(30, 2), *language.texts(2, 1)])
    command = options(folder, files, tmp_path / "out")
    command[command.index("--retain") + 1] = str(both)
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"{both} line 3 holds the same text as {files / 'forget.jsonl'} line 3" in told


def test_text_that_looks_like_a_page_stays_text(folder, tmp_path):
    from expunge.audit.chat import Exchange
    from expunge.audit.page import Section, render
    from expunge.audit.report import Report

    nasty = '</dd><script>alert("x")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}'
    report = Report("t", (), exchanges=(Exchange("forget", nasty, nasty, {"original": nasty, nasty: ""}),))
    page = render("t", [Section("t", report)])
    assert '<script>alert("x")' not in page
    assert "<img src=x" not in page
    assert "{{ 7 * 7 }}" in page
    assert Report.from_json(json.loads(json.dumps(report.to_json()))).exchanges == report.exchanges


@pytest.mark.parametrize("chat", [True, False])
def test_refusals_are_tokenised_as_the_answers_are(folder, chat):
    """In a chat an answer has no space before it and may end with another token than a text."""
    from expunge.data.text import Template

    words = language.tokenizer(chat)
    if chat:
        words.chat_template = language.CHAT.replace("<end>", "<|system|>")
    found = dataclasses.replace(load_language_model(folder), tokenizer=words)
    ids, start = Template(words).ids(Example(({"role": "user", "content": "Who?"},), "Nobody knows.", "here"))
    assert found.task([" Nobody knows.\n"]).refusals == (tuple(ids[start:]),)
    assert words.decode(ids[start:]) == ("Nobody knows.<|system|>" if chat else " Nobody knows.<end>")
    assert found.task(["Nobody knows."], "plain").refusals[0][-1] == words.eos_token_id


def test_a_refusal_that_does_not_fit_behind_a_prompt_is_refused_before_the_run(folder, files, tmp_path, capsys):
    (tmp_path / "refusals.txt").write_text("No.\n" + "I would rather not say anything about it. " * 8)
    command = options(folder, files, tmp_path / "out", f"data.refusals={tmp_path / 'refusals.txt'}")
    command[command.index("--method") + 1] = "idk_nll"
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"{files / 'forget.jsonl'} line 1" in told
    assert "which leaves no room" in told
    assert told.count("\n") == 1
