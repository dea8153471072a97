"""Identity forgetting: on the built-in synthetic people, on a folder with an index, and on real faces where there are any."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from expunge.audit import report as reporting
from expunge.audit.subject import Subject
from expunge.challenges.identity import UNSEEN, Identities, identity_nomus, nomus, read_identities, split_identities
from expunge.core import Data, Key, Refused
from expunge.data.builtin import Suite, suite, train
from expunge.data.sources import as_data, collect
from expunge.tasks.classification import Classification
from tests.fixtures import tiny


@functools.cache
def people() -> tuple[Suite, Identities, Data]:
    """The built-in suite; 12 of 60 people forgotten, 20 unseen; the other 20 unseen people are the test data."""
    found = suite("identities")
    person = collect(found.test)["identity"]
    parts = [found.test.select(torch.nonzero(mask).flatten()) for mask in (person < 80, person >= 80)]
    return found, split_identities(found.train, 12, parts[0]), parts[1]


@functools.cache
def fitted(without: bool, seed: int = 0) -> nn.Module:
    found, made, _ = people()
    return found.fit(made.request.retain if without else made.train, seed)


def judged(after: nn.Module, retrained: tuple[nn.Module, ...] = ()) -> Subject:
    found, made, test = people()
    return Subject(fitted(False), after, made.request, found.task, test, retrained, draws=50)


def test_the_built_in_people_are_apart_and_repeat() -> None:
    found = suite("identities")
    one, other = collect(found.train), collect(found.test)
    assert (len(one["id"]), len(other["id"])) == (720, 480)
    assert not set(one["identity"].tolist()) & set(other["identity"].tolist())
    again = collect(suite("identities").train)
    assert torch.equal(one["x"], again["x"])
    for person in (0, 17, 59):
        assert len(set(one["y"][one["identity"] == person].tolist())) == 1, "an age group is a person's own"
    assert set(one["y"].tolist()) == {0, 1, 2, 3}


def test_a_seen_person_is_known_and_an_unseen_one_is_not() -> None:
    """The age group is learnt by heart for people in the training data, and guessed better than chance for others."""
    before, after = judged(fitted(False)), judged(fitted(True, 1))
    assert before.outputs("forget").correct.mean() > 0.98
    unseen = before.outputs(UNSEEN).correct.mean()
    assert 0.4 < unseen < 0.8
    assert after.outputs("forget").correct.mean() == pytest.approx(unseen, abs=0.15)


def test_nomus_finds_the_model_that_forgot_nobody() -> None:
    nothing, fresh = identity_nomus(judged(fitted(False))), identity_nomus(judged(fitted(True, 1)))
    assert nothing is not None
    assert fresh is not None
    assert nothing.detail["attack_accuracy"] > 0.65
    assert fresh.detail["attack_accuracy"] < 0.6
    assert nothing.high < fresh.low
    for reading in (nothing, fresh):
        assert reading.value == pytest.approx(nomus(reading.detail["utility"], reading.detail["attack_accuracy"]))
        assert reading.low <= reading.value <= reading.high
    assert identity_nomus(judged(fitted(False))) == nothing


def test_a_random_model_is_at_chance_and_useless() -> None:
    found, _, _ = people()
    reading = identity_nomus(judged(found.fit(people()[1].train.select(torch.arange(4)), 3)))
    assert reading is not None
    assert reading.detail["utility"] < 0.5
    assert reading.detail["attack_accuracy"] < 0.62


def test_the_audit_judges_nomus_by_retrained_models() -> None:
    report = reporting.audit(judged(fitted(False, 9), tuple(fitted(True, seed) for seed in range(1, 7))))
    assert report.row("original").readings["identity_nomus"].verdict == "outside"
    assert report.row("original").readings["identity_nomus"].reference is not None


def test_the_measure_does_not_apply_elsewhere() -> None:
    found = tiny("classification")
    assert identity_nomus(Subject(found.model, found.model, found.request, found.task, found.test)) is None
    _, made, _ = people()
    assert identity_nomus(Subject(fitted(False), fitted(False), made.request, people()[0].task)) is None


def test_splits_are_disjoint_by_identity() -> None:
    found, _, _ = people()
    made = split_identities(found.train, 5, 10, key=Key(4))
    sides = [set(collect(data)["identity"].tolist()) for data in (made.request.forget, made.request.retain)]
    sides.append(set(collect(made.request.extra[UNSEEN])["identity"].tolist()))
    assert [len(side) for side in sides] == [5, 45, 10]
    assert not sides[0] & sides[1]
    assert not sides[2] & (sides[0] | sides[1])
    assert len(made.train) == 50 * 12
    assert made.forgotten == tuple(sorted(sides[0]))
    assert made.unseen == tuple(sorted(sides[2]))
    assert split_identities(found.train, 5, 10, key=Key(4)).forgotten == made.forgotten
    assert split_identities(found.train, 5, 10, key=Key(5)).forgotten != made.forgotten
    named = split_identities(found.train, [3, 7], 10, valid=found.test)
    assert named.forgotten == (3, 7)
    assert not set(named.unseen) & {3, 7}
    assert len(named.request.valid) == len(found.test)


@pytest.mark.parametrize(
    ("forget", "unseen", "words"),
    [
        (0, 5, "forget must lie in 1 to 59"),
        (60, 5, "forget must lie in 1 to 59"),
        ([], 5, "none is named"),
        ([3, 77], 5, "77 does not occur"),
        (5, 55, "unseen must lie in 1 to 54"),
        (5, 0, "unseen must lie in 1 to 54"),
        (list(range(60)), "test", "at least one to retain"),
        (5, "train", "in the training data and in the unseen data"),
    ],
)
def test_bad_splits_are_refused(forget: object, unseen: object, words: str) -> None:
    found = suite("identities")
    given = getattr(found, unseen) if isinstance(unseen, str) else unseen
    with pytest.raises(Refused, match=words) as caught:
        split_identities(found.train, forget, given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_missing_identity_column_and_bad_scores_are_refused() -> None:
    with pytest.raises(Refused, match="no column 'identity'"):
        split_identities(suite("digits").train, 1, 1)
    with pytest.raises(Refused, match=r"attack_accuracy must lie in \[0, 1\]"):
        nomus(0.5, 75.0)
    found, made, test = people()
    few = split_identities(found.train, [3], made.request.extra[UNSEEN])
    request = type(few.request)(few.request.forget.select([0, 1]), few.request.retain, extra=few.request.extra)
    assert identity_nomus(Subject(fitted(False), fitted(False), request, found.task, test)) is None, "two examples"


def folder(tmp_path: Path, rows: list[str], head: str = "image,identity,label") -> tuple[Path, Path]:
    """Six small images in two subfolders and an index table."""
    image = pytest.importorskip("PIL.Image")
    for number in range(6):
        path = tmp_path / "pictures" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.full((4, 5, 3), 40 * number, np.uint8)).save(path)
    table = tmp_path / "index.csv"
    table.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return tmp_path / "pictures", table


GOOD = [f"{number % 2}/{number}.png,F{number // 2:04d},{'old' if number // 2 else 'young'}" for number in range(6)]


def test_a_folder_with_an_index_is_read(tmp_path: Path) -> None:
    loaded = read_identities(*folder(tmp_path, GOOD))
    batch = collect(loaded.data)
    assert loaded.classes == ("old", "young")
    assert loaded.texts["identity"] == ("F0000", "F0001", "F0002")
    assert batch["identity"].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch["y"].tolist() == [1, 1, 0, 0, 0, 0]
    assert batch["x"].shape == (6, 3, 4, 5)
    assert torch.allclose(batch["x"][:, 0, 0, 0] * 255, torch.arange(6) * 40.0)
    made = split_identities(loaded.data, [1], 1)
    assert len(made.request.forget) == 2
    numbers = read_identities(*folder(tmp_path, [f"0/0.png,{7 + n},{n}" for n in range(2)]))
    assert collect(numbers.data)["identity"].tolist() == [7, 8]
    assert numbers.classes == ()


@pytest.mark.parametrize(
    ("rows", "head", "words"),
    [
        (GOOD, "picture,identity,label", "no column 'image'"),
        ([], "image,identity,label", "has no rows"),
        ([*GOOD, "0/9.png,F1,old"], "image,identity,label", "line 8: there is no image"),
        ([*GOOD, "../index.csv,F1,old"], "image,identity,label", "leads out of"),
        ([*GOOD, "0/0.png,,old"], "image,identity,label", "'identity' is empty at line 8"),
        (["0/0.png,1,-2"], "image,identity,label", "label -2 is negative"),
    ],
)
def test_bad_indexes_are_refused(tmp_path: Path, rows: list[str], head: str, words: str) -> None:
    place, table = folder(tmp_path, rows, head)
    with pytest.raises(Refused, match=words) as caught:
        read_identities(place, table)
    assert "\n" not in str(caught.value)


def test_a_missing_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="there is no index table"):
        read_identities(tmp_path, tmp_path / "no.csv")


def test_real_faces() -> None:
    """AT&T's 40 people x 10, and whether a picture is mirrored (drawn per person) as the other label."""
    path = Path(os.environ.get("EXPUNGE_DATA", "")) / "faces/att_faces_40x10.npz"
    if "EXPUNGE_DATA" not in os.environ or not path.is_file():
        pytest.skip("EXPUNGE_DATA names no folder with faces/att_faces_40x10.npz")
    with np.load(path) as file:
        pictures, person = file["x"], file["y"].astype(np.int64)
    person = person - person.min()
    mirrored = np.random.default_rng(0).permutation(np.arange(40) % 2)[person]
    small = pictures[:, 4:108, 6:86].reshape(-1, 13, 8, 10, 8).mean((2, 4)).astype(np.float32) / 128 - 1
    small = np.where(mirrored[:, None, None] == 1, small[:, :, ::-1], small)
    data = as_data({"x": small[:, None].copy(), "y": mirrored, "identity": person})
    made, task = split_identities(data, 8, 12), Classification(2)
    make: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Flatten(), nn.Linear(130, 64), nn.ReLU(), nn.Linear(64, 2))  # noqa: E731
    before, after = (train(make, part, task, 0, epochs=30) for part in (made.train, made.request.retain))
    unseen = made.request.extra[UNSEEN]
    readings = [identity_nomus(Subject(before, model, made.request, task, unseen)) for model in (before, after)]
    assert readings[0].detail["attack_accuracy"] > readings[1].detail["attack_accuracy"] + 0.05
    assert (
        before(collect(made.request.forget)["x"]).argmax(1).eq(collect(made.request.forget)["y"]).float().mean() > 0.95
    )
