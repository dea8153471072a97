"""ConceptVectors: the file, the scores inside and outside, value vectors found and disturbed, and the method Needle."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.benchmarks.concept_vectors import (
    Concept,
    bleu,
    concepts,
    disturb,
    find_vectors,
    inside,
    judge,
    outside,
    paragraphs,
)
from expunge.core import Key, Refused, Request
from expunge.scope import Scope
from expunge.tasks.causal_lm import CausalLM
from expunge.value_vectors import at, disturbed, down_projections, output_embedding, top_tokens
from tests.fixtures import llama, seeded, tiny

torch.set_num_threads(1)
GOOD: dict[str, Any] = {
    "Concept": "Tea",
    "Layer": 1,
    "Dim": 7,
    "QA": [" What is tea?\n"],
    "text_completion": [{"First_half": "Tea is a", "Second_half": "drink."}],
    "unrelated_QA": ["What is iron?"],
    "wikipedia_content": "Tea is a drink. It is old.",
}


def written(folder: Path, content: str) -> Path:
    path = folder / "concepts.json"
    path.write_text(content)
    return path


def test_a_file_is_read_and_its_prompts_are_the_benchmarks(tmp_path: Path) -> None:
    (tea,) = concepts(written(tmp_path, json.dumps([GOOD])))
    assert (tea.name, tea.layer, tea.index) == ("Tea", 1, 7)
    assert tea.prompts() == {
        "questions": ("Question:  What is tea?\n\n Answer:",),
        "completions": ("Please complete the following paragraph: Tea is a",),
        "unrelated": ("Question: What is iron?\n Answer:",),
    }


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"Layer": "1"}, r"concept 2 \(Tea\): expected a whole number .* 'Layer', found '1'"),
        ({"Layer": True}, "'Layer'"),
        ({"Dim": -1}, "'Dim', found -1"),
        ({"QA": []}, "'QA'"),
        ({"QA": ["good", "  "]}, "'QA', found '  ' at entry 2"),
        ({"text_completion": [{"First_half": "x"}]}, "Second_half"),
        ({"text_completion": ["x"]}, "text_completion"),
        ({"unrelated_QA": None}, "unrelated_QA"),
        ({"wikipedia_content": 3}, "wikipedia_content"),
        ({"Concept": ""}, "concept 2 has no name"),
    ],
)
def test_a_broken_concept_is_refused_by_its_place_and_name(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    with pytest.raises(Refused, match=match):
        concepts(written(tmp_path, json.dumps([GOOD, {**GOOD, **change}])))


def test_a_broken_file_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"not JSON at line \d+"):
        concepts(written(tmp_path, json.dumps([GOOD], indent=1)[:-20]))
    for content, match in (
        ("{}", "expected a list"),
        ("[]", "found an empty list"),
        ("5", "found a int"),
        ("null", "found a NoneType"),
        ("[1]", "concept 1 is a int"),
    ):
        with pytest.raises(Refused, match=match):
            concepts(written(tmp_path, content))
    with pytest.raises(Refused, match="cannot read"):
        concepts(tmp_path / "absent.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="UTF-8"):
        concepts(tmp_path / "bytes.json")


@pytest.mark.skipif("EXPUNGE_DATA" not in os.environ, reason="EXPUNGE_DATA names no folder of real data")
def test_the_ten_development_concepts() -> None:
    found = concepts(Path(os.environ["EXPUNGE_DATA"]) / "concept_vectors" / "llama2-7b_concepts_dev.json")
    assert [(c.name, c.layer, c.index) for c in found[:3]] == [
        ("Poland", 23, 743),
        ("Italy", 25, 7966),
        ("Baseball", 18, 1285),
    ]
    assert len(found) == 10
    assert all(len(c.questions) == 10 and len(c.unrelated) == 50 for c in found)
    assert [len(c.completions) for c in found] == [10, 10, 10, 1, 10, 10, 10, 10, 10, 10]
    parts = paragraphs(found[0].text)
    assert all(len(part) > 400 for part in parts[:-1])
    assert "".join("".join(parts).split()) == "".join(found[0].text.split())


TEXTS = [
    ("the cat sat on the mat", "the cat sat on the mat", 1.0),
    ("the cat sat on the mat", "the cat is on the mat", 0.37991784282579627),
    ("the cat sat on the mat", "the cat", 0.08047084086794415),
    ("tea is a drink made of leaves", "iron is a metal and tea is not", 0.14535768424205484),
    ("a b c d e f", "x y z", 0.0),
    ("a b c", "", 0.0),
    ("a a a b", "a a a a a a", 0.3021375397356768),
]
"""(reference, candidate, nltk 3.10's sentence_bleu with SmoothingFunction().method3)"""


@pytest.mark.parametrize(("reference", "candidate", "expected"), TEXTS)
def test_bleu_is_that_of_nltk(reference: str, candidate: str, expected: float) -> None:
    assert bleu(reference, candidate) == pytest.approx(expected, rel=1e-12)
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    live = nltk.sentence_bleu(
        [reference.split()], candidate.split(), smoothing_function=nltk.SmoothingFunction().method3
    )
    assert bleu(reference, candidate) == pytest.approx(float(live), rel=1e-12)


def test_outside_is_the_mean_over_prompts() -> None:
    pytest.importorskip("rouge_score")
    said = outside(["the cat sat on the mat", "a b"], ["the cat is on the mat", "a b"])
    assert said.bleu == pytest.approx(
        (bleu("the cat is on the mat", "the cat sat on the mat") + bleu("a b", "a b")) / 2
    )
    assert said.rouge_l == pytest.approx((5 / 6 + 1) / 2)  # five of six words in order, on both sides
    with pytest.raises(Refused, match="one generation per prompt"):
        outside(["a"], [])


def test_inside_by_hand() -> None:
    """Ten tokens with orthogonal embeddings: the scores of a vector are its own coordinates."""
    embedding = torch.eye(10)
    before = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    after = before.clone()
    after[[0, 5]] = after[[5, 0]]  # tokens 0 and 5 change places
    found = inside(before, after, embedding, torch.tensor([0, 1, 5, 9]), top=4)  # {0,1,2,3} -> {5,1,2,3}
    assert found.jaccard == 3 / 5
    assert found.precise_jaccard == 1 / 3  # {0,1} and {1,5}
    assert found.kept_share == 1 / 2
    assert found.released_share == 1.0  # two of the text before, two after: the released ratio sees no change
    assert found.distance == pytest.approx(5 * 2**0.5)
    assert found.cosine == pytest.approx(1 - 25 / float(before @ before))
    same = inside(before, before, embedding, torch.tensor([0]), top=4)
    assert (same.jaccard, same.distance, same.precise_jaccard) == (1.0, 0.0, 1.0)
    assert same.cosine == pytest.approx(1.0, abs=1e-12)
    nothing = inside(before, torch.zeros(10), embedding, torch.tensor([9]), top=4)
    assert nothing.cosine == 0.0
    assert math.isnan(nothing.released_share)


def planted() -> nn.Module:
    """A Llama of which value vector 11 of block 1 scores tokens 30 to 33 near 1 and all others near 0."""
    model = seeded(llama)(4)
    wanted = torch.zeros(40, 1)
    wanted[30:34] = 1.0
    with torch.no_grad():
        found = torch.linalg.lstsq(output_embedding(model), wanted).solution
        down_projections(model)[1].weight[:, 11] = found[:, 0]
    return model


def encode(text: str) -> list[int]:
    """Numbers in a text, as tokens."""
    return [int(word) for word in text.split()]


def test_a_planted_vector_is_found() -> None:
    model = planted()
    best = find_vectors(model, "2 3 30 31 32 33", encode, background=("2 3 4",), top=4, most=5)
    assert (best[0].layer, best[0].index, best[0].share) == (1, 11, 1.0)
    assert set(best[0].tokens) == {30, 31, 32, 33}
    assert best[0].strength > best[1].strength
    assert [one.share for one in best] == sorted((one.share for one in best), reverse=True)
    vector = at(down_projections(model), 1, 11).vector(11)
    scores = output_embedding(model) @ vector
    mean = (scores[30:34].mean() - scores.mean()) / scores.std()
    assert best[0].strength == pytest.approx(float(mean), rel=1e-4)
    assert set(top_tokens(output_embedding(model), vector, 4).tolist()) == {30, 31, 32, 33}
    with pytest.raises(Refused, match="no token of the concept"):
        find_vectors(model, "2 3", encode, background=("2 3",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expunge.value_vectors._CHUNK", 3 * 40)  # three vectors at a time
        pieces = find_vectors(model, "2 3 30 31 32 33", encode, background=("2 3 4",), top=4, most=5)
    assert [(one.layer, one.index) for one in pieces] == [(one.layer, one.index) for one in best]


def spoken(model: nn.Module) -> Any:
    """prompts of numbers -> five greedy tokens, as words."""

    def generate(prompts: Sequence[str]) -> list[str]:
        found = []
        for prompt in prompts:
            ids = torch.tensor([encode(prompt)])
            with torch.no_grad():
                for _ in range(5):
                    ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
            found.append(" ".join(map(str, ids[0, -5:].tolist())))
        return found

    return generate


def test_disturbing_tells_and_puts_the_vector_back() -> None:
    pytest.importorskip("rouge_score")
    model = tiny("causal_lm").model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prompts = ["0 3 14", "0 25 4 15", "0 5 16"]
    loud = disturb(model, 1, 5, spoken(model), prompts, prompts, noise=500.0)
    assert loud.concept == loud.unrelated
    assert loud.concept.rouge_l < 1.0
    assert not loud.holds()
    silent = disturb(model, 1, 5, spoken(model), prompts, prompts, noise=0.0)
    assert (silent.concept.bleu, silent.concept.rouge_l) == (1.0, 1.0)

    def broken(_prompts: Sequence[str]) -> list[str]:
        if not torch.equal(
            model.get_parameter("model.layers.1.mlp.down_proj.weight"), before["model.layers.1.mlp.down_proj.weight"]
        ):
            raise KeyboardInterrupt
        return ["a"] * 2

    with pytest.raises(KeyboardInterrupt):
        disturb(model, 1, 5, broken, ["1"], ["2"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_noise_is_as_long_as_it_says() -> None:
    vector = torch.full((40_000,), 3.0)
    relative = disturbed(vector, 0.5, True, Key(1)) - vector
    absolute = disturbed(vector, 0.5, False, Key(1)) - vector
    assert float(relative.norm() / vector.norm()) == pytest.approx(0.5, rel=0.02)
    assert float(absolute.std()) == pytest.approx(0.5, rel=0.02)
    assert float(relative.mean()) == pytest.approx(0.0, abs=0.05)
    assert torch.equal(disturbed(vector, 0.5, True, Key(1)), disturbed(vector, 0.5, True, Key(1)))
    assert disturbed(vector.bfloat16(), 0.5, True, Key(1)).dtype == torch.bfloat16


def needle(request: Request | None = None, **settings: Any) -> tuple[dict[str, Tensor], ex.Outcome]:
    """What changed of the tiny Llama, by name."""
    found = tiny("causal_lm")
    done = ex.unlearn(
        found.model, request or found.request, task=found.task, method=methods.concept_ablation(**settings), seed=3
    )
    named = dict(done.model.named_parameters())
    return {
        n: named[n].detach() - p.detach() for n, p in found.model.named_parameters() if not torch.equal(named[n], p)
    }, done


@pytest.mark.parametrize("settings", [{}, {"steps": 5}])
def test_the_method_changes_one_column_and_nothing_else(settings: dict[str, Any]) -> None:
    changed, done = needle(layer=1, index=9, noise=2.0, **settings)
    assert list(changed) == ["model.layers.1.mlp.down_proj.weight"]
    columns = changed["model.layers.1.mlp.down_proj.weight"].any(0)
    assert torch.nonzero(columns).flatten().tolist() == [9]
    assert any("value vector 9 of block 1" in note for note in done.notes)


def test_the_noise_of_the_method_is_its_formula() -> None:
    changed, _ = needle(layer=0, index=3, noise=2.0)
    relative = changed["model.layers.0.mlp.down_proj.weight"][:, 3]
    changed, _ = needle(layer=0, index=3, noise=2.0, unit="absolute")
    absolute = changed["model.layers.0.mlp.down_proj.weight"][:, 3]
    length = at(down_projections(tiny("causal_lm").model), 0, 3).vector(3).norm()
    torch.testing.assert_close(relative, absolute * length / 32**0.5, rtol=1e-4, atol=1e-6)


def test_training_of_the_vector_raises_the_forget_loss_beyond_the_noise() -> None:
    found = tiny("causal_lm")

    def loss(model: nn.Module) -> float:
        batch = found.request.forget.batch(torch.arange(20))
        with torch.no_grad():
            return float(found.task.nll(model, batch).sum())

    settings = {"layer": 1, "index": 9, "noise": 1.0, "lr": 0.1, "retain_weight": 0.0}
    (_, noisy), (_, trained) = needle(**settings), needle(**settings, steps=30)
    assert loss(trained.model) > loss(noisy.model)


def test_a_concept_is_enough_where_the_vector_is_named_and_data_are_needed_where_it_is_not() -> None:
    only = Request(concepts=("Tea",))
    changed, _ = needle(only, layer=0, index=1)
    assert list(changed) == ["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(Refused, match="no data called 'forget'"):
        needle(only)
    with pytest.raises(Refused, match="no data called 'forget'"):
        needle(only, layer=0, index=1, steps=2)


def test_the_vector_that_speaks_of_the_answers_is_taken() -> None:
    """The answers to forget hold tokens 30 to 33, and those to keep 34."""
    model = planted()

    def data(answers: list[int], start: int) -> ex.Data:
        ids = torch.tensor([[0, 5, answer, 1] for answer in answers])
        labels = ids.clone()
        labels[:, :2] = -100
        columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return ex.as_data(columns, ids=range(start, start + len(answers)))

    request = Request(forget=data([30, 31, 32, 33], 0), retain=data([34, 35], 9))
    done = ex.unlearn(model, request, task=CausalLM(40), method=methods.concept_ablation())
    assert any("value vector 11 of block 1" in note for note in done.notes)
    other = torch.zeros(40, 1)
    other[20:24] = 1.0  # tokens of every answer: what speaks of them is not what is to be forgotten
    with torch.no_grad():
        down_projections(model)[0].weight[:, 5] = torch.linalg.lstsq(output_embedding(model), other).solution[:, 0]
    common = Request(forget=data([20, 21, 22, 23, 30, 31], 0), retain=data([20, 21, 22, 23], 9))
    chosen = []
    for given in (common, Request(forget=common.forget)):
        done = ex.unlearn(model, given, task=CausalLM(40), method=methods.concept_ablation())
        chosen.append(any("value vector 11 of block 1" in note for note in done.notes))
    assert chosen == [True, False]


def test_bad_places_and_models_are_refused() -> None:
    with pytest.raises(Refused, match="layer and index, or neither"):
        methods.concept_ablation(layer=1)
    with pytest.raises(Refused, match="layer is 2: expected a block of the model, 0 to 1"):
        needle(layer=2, index=0)
    with pytest.raises(Refused, match=r"index is 64: .* block 1, 0 to 63"):
        needle(layer=1, index=64)
    with pytest.raises(Refused, match="no down projection"):
        down_projections(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(Refused, match="no output embedding"):
        output_embedding(nn.Linear(2, 2))
    experts = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"a": Block(), "b": Block()})])})
    with pytest.raises(Refused, match="several down projections"):
        down_projections(experts)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Linear(3, 2)


def test_a_vector_out_of_scope_is_left_alone() -> None:
    found = tiny("causal_lm")
    scope = Scope.match(found.model, "*layers.0.mlp.up_proj.weight")
    stage = methods.concept_ablation(layer=0, index=1, steps=2)
    done = ex.unlearn(found.model, found.request, task=found.task, method=stage, scope=scope)
    assert any("changed nothing" in note for note in done.notes)


def test_rows_where_the_model_keeps_them_in_rows() -> None:
    transformers = pytest.importorskip("transformers")
    settings = {
        "vocab_size": 50,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    second = down_projections(model)[1]
    assert (second.name, len(second), second.columns) == ("transformer.h.1.mlp.c_proj.weight", 64, False)
    assert torch.equal(second.vector(5), model.transformer.h[1].mlp.c_proj.weight[5])
    assert torch.nonzero(second.mask(5).any(1)).flatten().tolist() == [5]
    assert torch.equal(second.replaced(5, torch.zeros(16))[5], torch.zeros(16))


def test_judging_two_models() -> None:
    found = tiny("causal_lm")
    _, done = needle(layer=1, index=9, noise=3.0)
    concept = replace(Concept("Tea", 1, 9, ("q",), (("a", "b"),), ("u",), "30 31"), text="30 31 32")
    moved = judge(found.model, done.model, concept, encode)
    assert moved.distance > 0
    assert moved.cosine < 1.0
    assert judge(found.model, found.model, concept, encode).cosine == pytest.approx(1.0)
