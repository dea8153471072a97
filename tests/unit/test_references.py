"""Reference models: each trained once, whoever asks, the same bits; and found out where they are not what they should be."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from expunge import shadow_design, trainer
from expunge.audit import genuine
from expunge.audit.subject import FORGOTTEN, IN, OUT, Cache, Subject, run
from expunge.cli import main
from expunge.core import Case, Data, Key, Refused, Request, RunFailed
from expunge.data.builtin import Recipe, train
from expunge.data.sources import as_data
from expunge.data.split import split
from expunge.references import References, references
from expunge.tasks.classification import Classification

TASK = Classification(3)
SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
from torch import nn
import expunge
from expunge.references import references

folder, workers, count = Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])
os.environ["PAUSE"] = sys.argv[2]
data = expunge.as_data((torch.arange(40.0).reshape(20, 2), torch.arange(20) % 3))
request = expunge.split(data, forget=[0, 1, 2])

def train(data, seed):  # no main guard, as in a notebook
    torch.manual_seed(seed)
    model = nn.Linear(2, 3)
    time.sleep(float(os.environ["PAUSE"]))
    with open(folder / "log", "a") as log:
        log.write(f"{seed}\\n")
    return model

references(train, data, request, task=expunge.Classification(3), make=lambda: nn.Linear(2, 3), folder=folder,
           retrained=count, seed=0, workers=workers)
print("done")
"""


def points(rows: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.arange(rows) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return centres[labels] + torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed)), labels


DATA, TEST = as_data(points()), as_data(points(45, 1))
REQUEST = split(DATA, forget=range(12))


def make() -> nn.Module:
    return nn.Linear(2, 3)


def sums(data: Data, seed: int, log: Path | None = None) -> nn.Module:
    """Not a good model: its weights say what it was trained on, so that a test can read it."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        model.weight[0, 0] = float(data.ids.sum())
        model.weight[0, 1] = float((data.ids**2).sum())
    if log is not None:
        with open(log, "a") as file:
            file.write(f"{seed}\n")
    return model


def asked(folder: Path, how: Any = sums, **changes: Any) -> References:
    options: dict[str, Any] = {"task": TASK, "make": make, "folder": folder, "retrained": 2, "workers": 1, "test": TEST}
    data, request = changes.pop("data", DATA), changes.pop("request", REQUEST)
    return references(how, data, request, **{**options, **changes})


def logged(folder: Path) -> Callable[[Data, int], nn.Module]:
    return functools.partial(sums, log=folder / "log")


def trained(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "log").read_text().split()] if (folder / "log").exists() else []


def weights(found: References) -> list[Tensor]:
    models = (*found.retrained, *found.originals, *(found.shadows.models if found.shadows else ()))
    return [torch.cat([p.detach().flatten() for p in model.load().parameters()]) for model in models]


def test_one_worker_and_two_give_the_same_bits_and_touch_no_global_stream(
    tmp_path: Path, poisoned_randomness: object
) -> None:
    slope = 0.5

    def mine(data: Data, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return train(
            lambda: nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)), data, TASK, seed, lr=slope / 10
        )

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))

    found = [
        asked(tmp_path / str(workers), mine, make=build, workers=workers, originals=2, shadows=4) for workers in (1, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(weights(found[0]), weights(found[1]), strict=True))
    assert [entry.model for entry in found[0].ledger] == [entry.model for entry in found[1].ledger]
    assert [len(list(one.store.entries())) for one in found] == [8 * 3] * 2
    for entry in found[0].store.entries():
        first, second = (one.store.get(*entry) for one in found)
        assert all(np.array_equal(first[name], second[name]) for name in first)


def test_nothing_is_trained_twice(tmp_path: Path) -> None:
    how = logged(tmp_path)
    first = asked(tmp_path, how)
    assert trained(tmp_path) == [1, 2]
    assert [entry.fresh for entry in first.ledger] == [True, True]
    again = asked(tmp_path, how)
    assert trained(tmp_path) == [1, 2]
    assert [entry.fresh for entry in again.ledger] == [False, False]
    assert [entry.seconds for entry in again.ledger] == [entry.seconds for entry in first.ledger]
    asked(tmp_path, how, retrained=3)
    assert trained(tmp_path) == [1, 2, 3]
    asked(tmp_path, how, recipe="another")
    assert trained(tmp_path)[3:] == [1, 2]
    asked(tmp_path, how, request=split(DATA, forget=range(11)))
    assert trained(tmp_path)[5:] == [1, 2]
    asked(tmp_path, how, seed=1)
    assert len(trained(tmp_path)) == 7, "seeds 2 and 3 are there"
    asked(tmp_path, logged(tmp_path / "."), retrained=3)
    assert len(trained(tmp_path)) == 7, "the place of a file is no part of a recipe"


def start(folder: Path, pause: float, workers: int, count: int) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    arguments = [sys.executable, str(folder / "script.py"), str(folder), str(pause), str(workers), str(count)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_call_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "refs"
    first = start(folder, 0.7, 2, 8)
    limit = time.monotonic() + 90
    while len(list(folder.glob("models/*.json"))) < 3 and time.monotonic() < limit:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(1.0)  # its workers see that their parent is gone
    left, before = {path.name for path in folder.glob("models/*.json")}, trained(folder)
    assert 3 <= len(left) < 8
    time.sleep(1.0)
    assert trained(folder) == before, "the workers of a killed call end"
    out, error = start(folder, 0.0, 1, 8).communicate(timeout=120)
    assert out.strip() == "done", error
    counts = Counter(trained(folder))
    finished = {json.loads((folder / "models" / name).read_text())["identity"]["seed"] for name in left}
    assert {seed: counts[seed] for seed in finished} == dict.fromkeys(finished, 1), "a finished model was trained again"
    assert set(counts) == set(range(1, 9))
    assert len(list(folder.glob("models/*.safetensors"))) == 8
    assert not list(folder.rglob("*.tmp"))


def test_two_calls_at_once_share_the_work(tmp_path: Path) -> None:
    both = [start(tmp_path, 0.3, 1, 6) for _ in range(2)]
    for process in both:
        out, error = process.communicate(timeout=120)
        assert out.strip() == "done", error
    assert sorted(trained(tmp_path)) == [1, 2, 3, 4, 5, 6]


def raises(data: Data, seed: int) -> nn.Module:
    if seed == 2:
        raise ValueError("no such thing\nas this")
    return sums(data, seed)


def dies(data: Data, seed: int) -> nn.Module:
    if seed == 3:
        time.sleep(0.5)
        os._exit(7)
    return sums(data, seed)


def test_a_training_function_that_raises_is_one_sentence_and_what_is_finished_is_kept(tmp_path: Path) -> None:
    with pytest.raises(RunFailed) as caught:
        asked(tmp_path, raises, retrained=3)
    said = str(caught.value)
    assert "\n" not in said
    for words in (
        "retrained model 2 (seed 2)",
        "ValueError at test_references.py, line",
        "no such thing",
        "1 of 3 models",
    ):
        assert words in said
    assert len(list(tmp_path.glob("models/*.json"))) == 1


def test_a_worker_that_dies_is_one_sentence_and_what_is_finished_is_kept(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"a worker process died.*[12] of 3 models are finished and kept") as caught:
        asked(tmp_path, dies, retrained=3, workers=2)
    assert "\n" not in str(caught.value)
    assert asked(tmp_path, logged(tmp_path), retrained=1).retrained


def test_what_cannot_be_sent_to_a_process_is_refused(tmp_path: Path) -> None:
    lock = threading.Lock()
    with pytest.raises(Refused, match=r"cannot be sent to another process.*workers=1"):
        asked(tmp_path, lambda data, seed: sums(data, seed) if lock else make(), workers=2)


@pytest.mark.parametrize("damage", ["weights", "truncated", "missing", "about", "identity"])
def test_a_damaged_model_is_found_and_made_again(tmp_path: Path, damage: str) -> None:
    how = logged(tmp_path)
    first = asked(tmp_path, how, retrained=1)
    path, about = (next((tmp_path / "models").glob(f"*.{end}")) for end in ("safetensors", "json"))
    content = path.read_bytes()
    if damage == "weights":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncated":
        path.write_bytes(content[:40])
    elif damage == "missing":
        path.unlink()
    elif damage == "about":
        about.write_text("{half")
    else:
        about.write_text(about.read_text().replace('"seed": 1', '"seed": 2'))
    if damage in ("weights", "truncated", "missing"):
        with pytest.raises(Refused, match="train the references again"):
            first.retrained[0].load()
    again = asked(tmp_path, how, retrained=1)
    assert trained(tmp_path) == [1, 1]
    assert path.read_bytes() == content
    assert torch.equal(weights(again)[0][:6], load_file(path)["weight"].flatten())


def test_outputs_are_where_an_audit_looks_for_them(tmp_path: Path) -> None:
    """With the weights gone every measure still finds what the models said: no forward pass, no reading."""
    found = asked(tmp_path, Recipe(epochs=2), originals=2, shadows=2, method="finetune")
    direct = {
        (role, name): run(kept.load(), TASK, data, 256, Key(0).at("audit", name))
        for role, kept in (("retrained", found.retrained[0]), ("unlearned", found.unlearned[1]))
        for name, data in (("forget", REQUEST.forget), ("test", TEST))
        if data is not None
    }
    for path in (tmp_path / "models").iterdir():
        path.unlink()
    subject = found.subject(found.originals[0], found.unlearned[0], REQUEST, TASK, TEST)
    for (role, name), said in direct.items():
        kept = found.retrained[0] if role == "retrained" else found.unlearned[1]
        assert np.array_equal(subject.outputs(name, kept).logits, said["logits"])
    assert subject.shadows is not None
    for model in (*subject.retrained, *subject.originals, *subject.unlearned, *subject.shadows.models):
        for name in ("forget", "retain", "test"):
            assert np.isfinite(subject.outputs(name, model).loss).all()
    assert [record["cost"]["backward"] > 0 for record in subject.retrain_records] == [True, True]
    with pytest.raises(Refused, match="another request"):
        found.subject(found.originals[0], found.unlearned[0], split(DATA, forget=[1]), TASK, TEST)


@pytest.mark.parametrize(("models", "examples"), [(2, 2), (8, 31), (9, 30), (64, 101)])
def test_halves_are_balanced_both_ways(models: int, examples: int) -> None:
    inside = shadow_design.halves(models, examples, Key(3))
    assert set(inside.sum(1)) <= {examples // 2, (examples + 1) // 2}
    assert set(inside.sum(0)) <= {models // 2, (models + 1) // 2}
    assert np.array_equal(
        inside[: models - models % 2], shadow_design.halves(models + 2, examples, Key(3))[: models - models % 2]
    )
    assert models < 8 or not np.array_equal(inside, shadow_design.halves(models, examples, Key(4)))


def test_arms_are_balanced_and_every_model_forgets_as_much() -> None:
    inside = shadow_design.halves(16, 200, Key(3))
    target = np.arange(200) < 40
    states = shadow_design.arms(inside, target, Key(5))
    assert np.array_equal(states == OUT, ~inside)
    counts = np.stack([(states[:, target] == state).sum(0) for state in (OUT, IN, FORGOTTEN)])
    assert np.array_equal(counts, np.array([[8], [4], [4]]) * np.ones((1, 40)))
    assert set((states == FORGOTTEN).sum(1)) == {40}, "as many as the request forgets"
    assert ((states == IN).sum(1) >= 50).all(), "enough is kept"
    per_model = (states[:, target] == FORGOTTEN).sum(1)
    assert (abs(per_model - 10) <= 7).all()
    many = shadow_design.arms(inside, np.arange(200) < 150, Key(5))
    assert ((many[:, 150:] == FORGOTTEN).sum(1) <= 0.5 * inside[:, 150:].sum(1)).all()
    none = shadow_design.arms(inside & ~target, target, Key(5))
    assert np.array_equal((none == FORGOTTEN).sum(1), np.minimum(40, (inside & ~target).sum(1) // 2)), (
        "it forgets others"
    )


def remembered(case: Case) -> Case:
    """Write into the model what it was asked to forget and keep."""
    forget, retain = case.request.forget, case.request.retain
    assert forget is not None
    assert retain is not None
    with torch.no_grad():
        case.model.weight[1, 0] = float(forget.ids.sum())
        case.model.weight[1, 1] = float(retain.ids.sum())
    return case


def test_shadows_are_trained_on_what_their_states_say(tmp_path: Path) -> None:
    found = asked(tmp_path, retrained=0, shadows=6, originals=1, method=remembered)
    assert found.shadows is not None
    assert found.trained_shadows is not None
    ids = found.shadows.ids
    assert sorted(ids) == list(range(60))
    assert found.shadows.unlearned
    assert not found.trained_shadows.unlearned
    for before, after, state in zip(
        found.trained_shadows.models, found.shadows.models, found.shadows.states, strict=True
    ):
        seen, forgotten = ids[state != OUT], ids[state == FORGOTTEN]
        assert before.load().weight[0].tolist() == [seen.sum(), (seen**2).sum()]
        assert after.load().weight[0].tolist() == [seen.sum(), (seen**2).sum()]
        assert after.load().weight[1].tolist() == [forgotten.sum(), ids[state == IN].sum()]
    assert np.array_equal(found.trained_shadows.states, (found.shadows.states != OUT).astype(np.int8))
    assert found.unlearned[0].load().weight[1].tolist() == [sum(range(12)), sum(range(12, 60))]
    for model in found.originals:
        assert model.load().weight[0, 0] == sum(range(60))


def test_without_a_request_there_are_originals_and_shadows(tmp_path: Path) -> None:
    found = asked(tmp_path, request=None, retrained=0, originals=1, shadows=2)
    assert found.shadows is not None
    assert found.shadows.states.sum() == 60
    assert not list(found.store.entries())


def constant(data: Data, seed: int) -> nn.Module:
    return sums(data, 0)


def other(data: Data, seed: int) -> nn.Module:
    return nn.Linear(2, 4)


def infinite(data: Data, seed: int) -> nn.Module:
    model = sums(data, seed)
    model.bias.data[0] = torch.inf
    return model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"retrained": -1}, "retrained must be a whole number >= 0, found -1"),
        ({"retrained": 2.0}, "retrained must be a whole number"),
        ({"workers": 0}, "workers must be a whole number >= 1"),
        ({"retrained": 0}, "nothing to train"),
        ({"shadows": 1}, "shadows must be 0 or >= 2"),
        ({"request": None}, "retrained models need a request with retain data"),
        ({"request": Request(forget=REQUEST.forget)}, "retrained models need a request with retain data"),
        ({"method": "finetune"}, "ask for originals= or shadows="),
        ({"method": "finetunne", "originals": 1}, "did you mean 'finetune'"),
        ({"method": "finetune", "originals": 1, "request": None, "retrained": 0}, "method= needs a request"),
        ({"how": 3}, "train is a int"),
        ({"how": lambda data: make()}, r"cannot be called with \(data, seed\)"),
        ({"make": 3}, "make is or gives a int"),
        ({"make": dict}, "make is or gives a dict"),
        ({"how": Recipe(), "make": make()}, "a Recipe needs make as a function"),
        ({"how": constant}, "the same weights for seeds 1 and 2"),
        ({"fill": ["validation"]}, "no data called 'validation'"),
        ({"request": split(points(60, 9), forget=[1]), "shadows": 2}, "not part of the training data"),
        ({"request": split(as_data((points()[0], points()[1] + 1)), forget=[1])}, "outside the 3 classes"),
        ({"folder": Path(os.devnull) / "x"}, "cannot write to"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    changes = dict(changes)
    how = changes.pop("how", sums)
    with pytest.raises(Refused, match=words) as caught:
        asked(changes.pop("folder", tmp_path), how, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (other, r"another architecture than make gives: bias has shape \(4,\), expected \(3,\)"),
        (infinite, "'bias' has entries that are not finite"),
        (lambda data, seed: 3, "returned a int"),
    ],
)
def test_models_that_cannot_be_references(tmp_path: Path, how: Any, words: str) -> None:
    with pytest.raises(RunFailed, match=words):
        asked(tmp_path, how)


HELPER = 3


def helped(data: Data, seed: int) -> int:
    return HELPER + inner()


def inner() -> int:
    return 1


def test_the_source_of_a_function_is_what_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    source = trainer.source_of

    def closed(value: Any) -> Callable[..., Any]:
        return lambda data, seed: value

    assert source(closed(1)) == source(closed(1)) != source(closed(2))
    assert source(closed(torch.zeros(2))) != source(closed(torch.ones(2)))
    assert source(closed(lambda: 1)) != source(closed(lambda: 2))
    assert source(closed(Recipe())) != source(closed(Recipe(lr=0.1)))
    assert source(functools.partial(sums, log=1)) != source(functools.partial(sums, log=2)) != source(sums)  # type: ignore[arg-type]
    before = source(helped)
    monkeypatch.setattr(sys.modules[__name__], "HELPER", 4)
    changed = source(helped)
    assert changed != before
    monkeypatch.setattr(sys.modules[__name__], "inner", lambda: 2)
    assert source(helped) != changed
    code = "def f(data, seed):{}\n    return {}\n"
    found = []
    for comment, value in (("", 1), ("  # said", 1), ("", 2)):
        space: dict[str, Any] = {}
        exec(code.format(comment, value), space)
        found.append(source(space["f"]))
    assert found[0] == found[1] != found[2]


def test_the_source_of_a_function_is_the_same_in_every_process() -> None:
    code = (
        "from tests.unit.test_references import helped, sums; from expunge import methods; from expunge.trainer import "
        "source_of as s; import functools; print(s(helped), s(functools.partial(sums, log={1, 'a', 'b'})), s(methods.scrub()))"
    )
    root = str(Path(__file__).parents[2])
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([f"{root}/src", root])},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_advantage_of_a_model_that_forgot_and_of_one_that_did_not() -> None:
    rng = np.random.default_rng(0)
    ease, far = rng.normal(0, 2, 3000), rng.normal(0, 2, 900)
    members, unseen = ease + 2, far
    forget = members[:150]
    for lost, expected in ((0.0, 0.0), (2.0, 1.0), (1.0, 0.5), (4.0, 2.0)):
        for scale in (0.0, 0.7):  # the whole model may be surer than the others
            after = forget - lost + scale + rng.normal(0, 0.5, 150)
            found = genuine.lost_advantage(
                forget, after, members, unseen, unseen + scale + rng.normal(0, 0.5, 900), Key(1)
            )
            assert found.told
            assert found.advantage == pytest.approx(2, abs=0.4)
            assert found.share == pytest.approx(expected, abs=0.35)
            assert found.low < found.share < found.high


@pytest.mark.parametrize("kind", ["nothing is memorised", "easy examples"])
def test_genuine_models_of_examples_that_training_does_not_change_are_not_accused(kind: str) -> None:
    """80 audits: no advantage is told, or it is the small one that these examples have."""
    rng, accused = np.random.default_rng(1), 0
    for _ in range(80):
        ease, far = rng.normal(0, 2, 600), rng.normal(0, 2, 300)
        effect = (lambda e: 0 * e) if kind == "nothing is memorised" else (lambda e: np.maximum(0, 0.9 * (1 - e)))
        members = ease + effect(ease)
        chosen = ease[rng.permutation(600)[:60]] if kind == "nothing is memorised" else np.sort(ease)[-60:]
        before = chosen + effect(chosen) + rng.normal(0, 0.3, 60)
        after = chosen + rng.normal(0, 0.3, 60)
        found = genuine.lost_advantage(before, after, members, far, far + rng.normal(0, 0.3, 300), Key(1))
        accused += found.told and found.high < 0.5
    assert accused <= 1


def memorised() -> tuple[Data, Data]:
    """Random labels on a fifth: what a network must learn by heart."""
    rng = np.random.default_rng(3)

    def noisy(rows: int, seed: int) -> Data:
        x, y = points(rows, seed)
        x = torch.cat([x, torch.randn(rows, 30, generator=torch.Generator().manual_seed(seed + 50))], 1)
        return as_data((x, torch.where(torch.from_numpy(rng.random(rows)) < 0.3, torch.randint(0, 3, (rows,)), y)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return noisy(200, 5), noisy(400, 6)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    data, test = memorised()
    request = split(data, forget=range(60))
    folder = tmp_path_factory.mktemp("references")
    options: dict[str, Any] = {"task": TASK, "make": wide, "folder": folder, "test": test, "workers": 1}
    found = references(Recipe(epochs=30), data, request, retrained=5, originals=6, **options)
    return found.subject(found.originals[0].load(), found.retrained[0], request, TASK, test)


def test_genuine_references_pass(judged: Subject) -> None:
    genuine.check_references(judged)
    genuine.check_references(replace(judged, originals=()))


def test_references_that_saw_the_forget_data_are_refused(judged: Subject) -> None:
    for known in (judged.originals[1:4], ()):
        wrong = replace(judged, originals=known, retrained=judged.originals[4:])
        with pytest.raises(
            Refused, match=r"retrained model 1 of 2 was trained on the wrong data.*retain data alone"
        ) as said:
            genuine.check_references(wrong)
        assert "\n" not in str(said.value)
        one = replace(judged, originals=known, retrained=(*judged.retrained[:3], judged.originals[5]))
        with pytest.raises(Refused, match="retrained model 4 of 4"):
            genuine.check_references(one)


def test_references_that_never_saw_the_retain_data_are_refused(judged: Subject) -> None:
    swapped = Request(judged.request.retain, judged.request.forget)
    made = replace(judged, request=swapped, cache=Cache())
    with pytest.raises(Refused, match="wrong data"):
        genuine.check_references(made)
    fewer = train(wide, judged.request.data("retain").select(range(20)), TASK, 3, epochs=30)
    with pytest.raises(Refused, match="as if it had not seen them"):
        genuine.check_references(replace(judged, retrained=(fewer,)))


def test_the_odd_one_among_references() -> None:
    lost = np.array([1.0, 1.1, 0.9, 1.05, 0.02])
    assert genuine.odd_one(lost) == 4
    assert genuine.odd_one(lost[2:]) is None, "too few"
    assert genuine.odd_one(lost[:4]) is None
    assert genuine.odd_one(np.array([0.1, -0.1, 0.05, -0.2, -0.6])) is None, "nothing was lost by any"


def test_a_class_that_was_never_seen_is_not_known_surely(tmp_path: Path) -> None:
    request = split(DATA, forget="y == 2")
    found = asked(tmp_path, Recipe(epochs=40), request=request, retrained=3, originals=3)
    subject = found.subject(found.originals[0], found.retrained[0], request, TASK, TEST)
    genuine.check_references(subject)
    with pytest.raises(Refused, match="as sure of unseen examples of the forgotten classes"):
        genuine.check_references(replace(subject, retrained=found.originals[1:], originals=()))


MINE = """
import torch
from torch import nn
from expunge import Classification
from expunge.data.builtin import train as recipe

def points(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return centres[labels] + 0.5 * torch.randn(rows, 2, generator=draw), labels

class Net(nn.Linear):
    def __init__(self):
        super().__init__(2, 3)

def train(data, seed):
    with open("log", "a") as log:
        log.write(f"{seed}\\n")
    return recipe(Net, data, Classification(3), seed, epochs=20)

def fails(data, seed):
    raise KeyError("lost")

def everything():
    import expunge
    model = recipe(Net, expunge.as_data(points(150, 0)), Classification(3), seed=5)
    return {"model": model, "train": points(150, 0), "test": points(90, 1), "task": Classification(3)}
"""
RUN = """
[data]
python = "mine.py:everything"
[request]
forget = "y == 2"
[method]
name = "finetune"
steps = 5
[run]
out = "out"
seed = 7
[audit]
retrained = 3
train = "mine.py:train"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_trains_once_and_a_run_uses_the_same_models(folder: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["reference", "run.toml", "--originals", "2", "--unlearn", "--json"]
    assert main(command) == 0
    shown = json.loads(capsys.readouterr().out)
    rows = {row["role"]: row for row in shown["references"]}
    assert {role: (row["models"], row["trained"]) for role, row in rows.items()} == {
        "retrained": (3, 3),
        "original": (2, 2),
        "unlearned": (2, 2),
    }
    assert rows["original"]["forget accuracy"] > 90 > rows["retrained"]["forget accuracy"]
    assert shown["out"] == "out/references"
    assert sorted(trained(folder))[:3] == [8, 9, 10]
    assert len(trained(folder)) == 5, "in processes of their own"
    assert main(["run", "run.toml", "audit.originals=2", "audit.unlearn=true"]) == 0
    assert main(["audit", "run.toml", "--out", "audit"]) == 0
    assert len(trained(folder)) == 5, "a run takes what is there"
    capsys.readouterr()
    assert main(command[:-1]) == 0
    said = capsys.readouterr().out
    assert "written to out/references" in said
    assert "reused" in said


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--retrained", "0"], 2, "nothing to train"),
        (["--retrained", "-1"], 2, "retrained should be greater than or equal to 0, found -1"),
        (["--shadows", "1"], 2, "shadows must be 0 or >= 2"),
        (["--unlearn"], 2, "ask for originals= or shadows="),
        (["--workers", "0"], 2, "workers should be greater than or equal to 1"),
        (["audit.train=mine.py:trian"], 2, "has no function 'trian'"),
        (["audit.train=mine.py:fails", "--workers", "1"], 1, "KeyError: 'lost'"),
        (["audit.epochs=3"], 2, "epochs belongs to training by a recipe"),
        (["audit.originales=3"], 2, "did you mean 'originals'"),
        (["--out", os.devnull], 2, f"cannot write to {os.devnull}"),
    ],
)
def test_bad_use_of_the_command(
    folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], status: int, words: str
) -> None:
    assert main(["reference", "run.toml", *arguments]) == status
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert not printed.out


def test_a_run_whose_references_are_of_the_wrong_data_is_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    import expunge

    space: dict[str, Any] = {}
    exec(MINE, space)
    original = space["everything"]()["model"]
    expunge.save_weights(original, folder / "wrong.safetensors")
    assert main(["audit", "run.toml", "--after", "wrong.safetensors", "--retrained", "wrong.safetensors"]) == 2
    assert "retrained model 1 of 1 was trained on the wrong data" in capsys.readouterr().err


def test_on_a_ray_cluster(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra 'scale' is not installed")
    here = asked(tmp_path / "here", originals=2, method=remembered)
    there = asked(tmp_path / "there", originals=2, method=remembered, ray="local")
    assert all(torch.equal(a, b) for a, b in zip(weights(here), weights(there), strict=True))
    assert [entry.fresh for entry in there.ledger] == [True] * 6
    assert list(here.store.entries()) == list(there.store.entries())
    with pytest.raises(RunFailed, match=r"ValueError.*no such thing"):
        asked(tmp_path / "raises", raises, ray="local")
    with pytest.raises(Refused, match=r"cannot use the Ray cluster at '127\.0\.0\.1:1'"):
        asked(tmp_path / "nowhere", ray="127.0.0.1:1")


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expunge.core import MissingExtra

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"expunge\[scale\]"):
        asked(tmp_path, ray="auto")
