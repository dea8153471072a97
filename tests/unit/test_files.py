"""Data from files: what is read equals what was written, and bad files are refused with one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from expunge.core import MissingExtra, Refused
from expunge.data import builtin
from expunge.data.files import read, read_arrays, read_images
from expunge.data.sources import collect, fingerprint
from expunge.data.tables import read_table

pandas = pytest.importorskip("pandas")
PILImage = pytest.importorskip("PIL.Image")

PEOPLE = "age,work,pay\n30,private,>50K\n41.5,state,<=50K\n22,private,<=50K\n"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.fromarray(pixels).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    found = {name: rng.integers(0, 256, (5, 4, 3), dtype=np.uint8) for name in ("cat/b.png", "cat/a.png", "dog/c.png")}
    for name, pixels in found.items():
        image(tmp_path / "images" / name, pixels)
    return tmp_path / "images", found


def test_a_table_becomes_one_row_per_line_with_categories_one_hot(tmp_path: Path) -> None:
    loaded = read_table(written(tmp_path / "people.csv", PEOPLE), label="pay")
    batch = collect(loaded.data)
    assert loaded.features == ("age", "work=private", "work=state")
    assert loaded.classes == ("<=50K", ">50K")
    assert batch["x"].tolist() == [[30, 1, 0], [41.5, 0, 1], [22, 1, 0]]
    assert batch["y"].tolist() == [1, 0, 0]
    assert batch["id"].tolist() == [0, 1, 2]
    assert loaded.columns["age"].tolist() == [30, 41.5, 22]


def test_categories_as_whole_numbers_and_ids_from_a_column(tmp_path: Path) -> None:
    text = "user,age,work,y\n70,1,b,0\n40,2,a,3\n50,3,b,1\n"
    loaded = read_table(written(tmp_path / "t.csv", text), label="y", categories="integer", ids="user", drop=["age"])
    batch = collect(loaded.data)
    assert batch["x"].tolist() == [[1], [0], [1]]
    assert batch["y"].tolist() == [0, 3, 1], "labels that are numbers stay as they stand"
    assert batch["id"].tolist() == [70, 40, 50]


def test_parquet_and_csv_give_the_same_data(tmp_path: Path) -> None:
    csv = written(tmp_path / "people.csv", PEOPLE)
    pandas.read_csv(csv).to_parquet(tmp_path / "people.parquet")
    one, other = read_table(csv, label="pay"), read_table(tmp_path / "people.parquet", label="pay")
    assert fingerprint(one.data) == fingerprint(other.data)


def test_a_test_table_uses_the_training_tables_categories_and_classes(tmp_path: Path) -> None:
    train = read_table(written(tmp_path / "train.csv", PEOPLE), label="pay")
    test = read_table(written(tmp_path / "test.csv", "age,work,pay\n50,state,>50K\n"), label="pay", like=train)
    batch = collect(test.data)
    assert batch["x"].tolist() == [[50, 0, 1]]
    assert batch["y"].tolist() == [1]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("age,pay\n1,a\n", {"label": "pey"}, ["no column 'pey'", "did you mean 'pay'"]),
        ("age,pay\n1,a\n2,\n", {"label": "pay"}, ["column 'pay'", "line 3", "1 are missing"]),
        ("age,pay\n1,a\n,b\n", {"label": "pay"}, ["column 'age'", "line 3"]),
        ("age,pay\ninf,a\n1,b\n", {"label": "pay"}, ["infinite", "column 'age'", "line 2"]),
        ("age,pay\n1,0\n2,1.5\n", {"label": "pay"}, ["1.5", "line 3", "whole numbers"]),
        ("age,pay\n1,a\n2,b\n", {"label": "pay", "target": "number"}, ["holds text"]),
        ("age,pay\n", {"label": "pay"}, ["no rows"]),
        ("pay\n1\n", {"label": "pay"}, ["no input columns"]),
        ("age,pay\n1,2,3,4\n5,6\n7,8,9,9,9\n", {"label": "pay"}, ["cannot be read as a table"]),
        ("user,age,pay\nx,1,0\ny,2,1\n", {"label": "pay", "ids": "user"}, ["'user'", "whole numbers as ids"]),
        ("user,age,pay\n1,1,0\n1,2,1\n", {"label": "pay", "ids": "user"}, ["ids repeat"]),
    ],
)
def test_a_bad_table_is_refused_with_its_place(tmp_path: Path, text: str, options: dict, words: list[str]) -> None:
    refused(lambda: read_table(written(tmp_path / "bad.csv", text), **options), words)


def test_a_value_that_training_did_not_have_is_refused(tmp_path: Path) -> None:
    train = read_table(written(tmp_path / "train.csv", PEOPLE), label="pay")
    for text, words in (
        ("age,work,pay\n1,privat,>50K\n", ["'privat'", "line 2", "did you mean 'private'"]),
        ("age,work,pay\n1,private,>5OK\n", ["'>5OK'", "line 2"]),
        ("age,pay\n1,>50K\n", ["other input columns"]),
    ):
        refused(lambda text=text: read_table(written(tmp_path / "test.csv", text), label="pay", like=train), words)


def test_an_image_folder_gives_the_very_pixels_in_order_of_class_and_name(pictures: tuple) -> None:
    folder, pixels = pictures
    loaded = read_images(folder)
    batch = collect(loaded.data)
    expected = np.stack([pixels[name] for name in ("cat/a.png", "cat/b.png", "dog/c.png")]).transpose(0, 3, 1, 2)
    assert loaded.classes == ("cat", "dog")
    assert batch["y"].tolist() == [0, 0, 1]
    assert torch.equal((batch["x"] * 255).round().to(torch.uint8), torch.from_numpy(expected))


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    image(tmp_path / "one" / "a.png", np.full((3, 2), 51, dtype=np.uint8))
    batch = collect(read_images(tmp_path).data)
    assert batch["x"].shape == (1, 1, 3, 2)
    assert torch.allclose(batch["x"], torch.tensor(0.2))


def test_bad_image_folders_are_refused(tmp_path: Path, pictures: tuple) -> None:
    folder, _ = pictures
    (tmp_path / "empty").mkdir()
    refused(lambda: read_images(tmp_path / "nowhere"), ["no image folder"])
    refused(lambda: read_images(tmp_path / "empty"), ["no subfolders"])
    refused(lambda: read_images(folder, classes=("cat", "dogs")), ["dog", "did you mean 'dogs'"])
    written(folder / "dog" / "notes.txt", "x")
    refused(lambda: read_images(folder), ["notes.txt", "not an image"])
    (folder / "dog" / "notes.txt").unlink()
    written(folder / "dog" / "z.png", "this is no image")
    refused(lambda: read_images(folder), ["z.png", "cannot be read as an image"])
    image(folder / "dog" / "z.png", np.zeros((9, 9, 3), dtype=np.uint8))
    refused(lambda: read_images(folder), ["9 x 9", "4 x 5"])


def test_an_image_that_breaks_off_is_refused_when_it_is_read(pictures: tuple) -> None:
    folder, _ = pictures
    whole = (folder / "dog" / "c.png").read_bytes()
    (folder / "dog" / "c.png").write_bytes(whole[: len(whole) - 30])
    loaded = read_images(folder)
    refused(lambda: collect(loaded.data), ["c.png", "not a whole image"])


def test_arrays_come_back_as_they_were_written(tmp_path: Path) -> None:
    x, y = np.arange(12.0).reshape(4, 3), np.array([0, 1, 1, 0])
    np.savez(tmp_path / "a.npz", x=x, y=y, id=np.array([9, 7, 5, 3]))
    save_file({"x": torch.from_numpy(x), "y": torch.from_numpy(y)}, tmp_path / "a.safetensors")
    first, second = collect(read_arrays(tmp_path / "a.npz").data), collect(read(tmp_path / "a.safetensors").data)
    assert first["x"].tolist() == second["x"].tolist() == x.tolist()
    assert first["x"].dtype == torch.float32
    assert first["id"].tolist() == [9, 7, 5, 3]
    assert second["id"].tolist() == [0, 1, 2, 3]


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickled_arrays_are_refused_and_not_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", x=np.array([Payload(tmp_path / "ran")], dtype=object), y=np.zeros(1))
    refused(lambda: read(tmp_path / "evil.npz"), ["pickled objects"])
    assert not (tmp_path / "ran").exists()
    np.load(tmp_path / "evil.npz", allow_pickle=True)["x"]
    assert (tmp_path / "ran").exists(), "the payload must be a real one for this test to mean anything"


def test_bad_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)), label=np.zeros(3), y=np.zeros((3, 2)), short=np.zeros(2))
    refused(lambda: read(tmp_path / "a.npz", label="labels"), ["no array 'labels'", "did you mean 'label'"])
    refused(lambda: read(tmp_path / "a.npz"), ["shape (3, 2)", "one label per example"])
    refused(lambda: read(tmp_path / "a.npz", label="short"), ["differ in length"])
    written(tmp_path / "broken.npz", "no archive")
    refused(lambda: read(tmp_path / "broken.npz"), ["not a plain npz file"])
    written(tmp_path / "broken.safetensors", "no tensors")
    refused(lambda: read(tmp_path / "broken.safetensors"), ["not a whole safetensors file"])
    written(tmp_path / "data.xlsx", "")
    refused(lambda: read(tmp_path / "data.xlsx"), ["cannot read", ".csv"])


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"expunge\[files\]"):
        read_table(written(tmp_path / "t.csv", PEOPLE), label="pay")


def test_the_digits_split_is_the_same_for_ever() -> None:
    suite = builtin.digits()
    images, labels = load_digits(return_X_y=True)
    train, test = collect(suite.train), collect(suite.test)
    assert sorted(train["id"].tolist() + test["id"].tolist()) == list(range(1797))
    assert torch.equal(train["y"], torch.from_numpy(labels)[train["id"]])
    assert torch.equal(train["x"].flatten(1) * 16, torch.from_numpy(images).float()[train["id"]])
    assert (len(train["id"]), len(test["id"])) == (1457, 340)
    assert test["id"][:5].tolist() == TEST_DIGITS


TEST_DIGITS = [2, 3, 4, 5, 7]


def test_training_repeats_to_the_bit_and_leaves_the_global_random_state(poisoned_randomness: object) -> None:
    suite = builtin.breast_cancer()
    one, two, other = (suite.fit(seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])


@pytest.mark.parametrize(("name", "bound"), [("breast_cancer", 0.93), ("digits", 0.94)])
def test_the_recipes_learn(name: str, bound: float) -> None:
    suite = builtin.suite(name)
    model, batch = suite.fit(seed=0), collect(suite.test)
    assert (model(batch["x"]).argmax(1) == batch["y"]).float().mean() > bound


def test_the_diabetes_network_explains_more_than_the_mean_does() -> None:
    suite = builtin.diabetes()
    model, batch = suite.fit(seed=0), collect(suite.test)
    left = (model(batch["x"]).flatten() - batch["y"]).square().mean() / batch["y"].var()
    assert left < 0.75, "a linear model on these data leaves about half of the variance"


def refused(call: object, words: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        call()  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    for word in words:
        assert word in message, message
