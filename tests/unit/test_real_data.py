"""Published data sets: each format is read as it was written, damaged or absent files are refused with one sentence."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from expunge.core import Refused
from expunge.data import builtin, formats, networks, real, real_tables, real_text
from expunge.data.sources import collect
from expunge.data.split import split

PILImage = pytest.importorskip("PIL.Image")

REAL = [*real.REAL, *real_tables.REAL_TABLES, *real_text.REAL_TEXT]


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    """What the format's description says, written out by hand."""
    start = struct.pack(">HBB", 0, kind, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return start + values.astype(formats.IDX_TYPES[kind]).tobytes()


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that EXPUNGE_DATA names."""
    monkeypatch.setenv(formats.ENVIRONMENT, str(tmp_path))
    return tmp_path


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fashion(folder: Path, count: int = 20) -> dict[str, np.ndarray]:
    """Fashion-MNIST's four files with `count` pictures in each part."""
    written = {}
    for part in ("train", "t10k"):
        images = rng().integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        put(folder / f"{part}-images-idx3-ubyte.gz", gzip.compress(idx(images), mtime=0))
        put(folder / f"{part}-labels-idx1-ubyte", idx(labels))
        written |= {f"{part}-images": images, f"{part}-labels": labels}
    return written


@pytest.mark.parametrize("kind", list(formats.IDX_TYPES))
def test_an_idx_array_comes_back_in_every_type(tmp_path: Path, kind: int) -> None:
    values = rng().integers(0, 100, (2, 3, 4))
    for path, content in (("a", idx(values, kind)), ("a.gz", gzip.compress(idx(values, kind), mtime=0))):
        found = formats.read_idx(put(tmp_path / path, content))
        assert found.tolist() == values.tolist()
        assert found.dtype == np.dtype(formats.IDX_TYPES[kind]).newbyteorder("=")


WHOLE = idx(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a", b"", ["not an idx file", "nothing"]),
        ("a", b"\x80\x04\x95\x10pickle", ["not an idx file", "80049510"]),
        ("a", WHOLE[:7], ["breaks off in its header"]),
        ("a", WHOLE[:-1], ["should hold 6 bytes", "only 5"]),
        ("a", WHOLE + b"\0", ["should hold 6 bytes", "holds more"]),
        ("a", b"\0\0\x08\x03" + b"\xff" * 12, ["expected at most"]),
        ("a.gz", WHOLE, ["cannot be unpacked"]),
        ("a.gz", gzip.compress(WHOLE, mtime=0)[:-9], ["cannot be unpacked"]),
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    refused(lambda: formats.read_idx(put(tmp_path / name, content)), [name, *words])


def test_the_four_files_become_a_suite_with_normalised_pictures(home: Path) -> None:
    written = fashion(home / "fashion_mnist")
    suite = builtin.suite("fashion_mnist")
    train, test = collect(suite.train), collect(suite.test)
    pixels = (train["x"][:, 0] * 0.3530 + 0.2860) * 255
    assert torch.equal(pixels.round().to(torch.uint8), torch.from_numpy(written["train-images"]))
    assert train["y"].tolist() == written["train-labels"].tolist()
    assert train["id"].tolist() == list(range(20))
    assert test["id"].tolist() == list(range(1_000_000, 1_000_020))
    assert suite.make()(train["x"]).shape == (20, 10)


def test_a_coarse_class_keeps_its_fine_label(home: Path) -> None:
    fashion(home / "fashion_mnist")
    suite = builtin.suite("fashion_mnist_coarse")
    request = split(suite.train, forget="fine == 5")
    assert request.forget is not None
    forgotten, everything = collect(request.forget), collect(suite.train)
    assert forgotten["fine"].tolist() == [5, 5]
    assert set(forgotten["y"].tolist()) == {2}
    assert everything["y"].tolist() == [real.GROUPS[fine] for fine in everything["fine"].tolist()]
    assert suite.make()(forgotten["x"]).shape == (2, 4)


def test_images_and_labels_that_do_not_belong_together_are_refused(home: Path) -> None:
    folder = home / "fashion_mnist"
    fashion(folder)
    put(folder / "train-labels-idx1-ubyte", idx(np.zeros(7)))
    refused(builtin.SUITES["fashion_mnist"], ["(20, 28, 28)", "(7,)", "Fashion-MNIST"])
    put(folder / "train-labels-idx1-ubyte", idx(np.full(20, 40)))
    refused(builtin.SUITES["fashion_mnist"], ["label 40", "0 to 9"])
    (folder / "train-labels-idx1-ubyte").unlink()
    refused(builtin.SUITES["fashion_mnist"], ["train-labels-idx1-ubyte", "Fashion-MNIST"])


def test_cifars_binary_version_is_read_record_by_record(tmp_path: Path) -> None:
    images, fine = rng().integers(0, 256, (3, 3, 32, 32), dtype=np.uint8), np.array([3, 99, 0], np.uint8)
    coarse = np.array([19, 0, 7], np.uint8)
    one = b"".join(bytes([label % 10]) + image.tobytes() for label, image in zip(fine, images, strict=True))
    two = b"".join(bytes(label) + image.tobytes() for *label, image in zip(coarse, fine, images, strict=True))
    found, labels = formats.read_cifar(put(tmp_path / "one.bin", one))
    assert np.array_equal(found, images)
    assert labels.tolist() == [[3], [9], [0]]
    found, labels = formats.read_cifar(put(tmp_path / "two.bin", two), labels=2)
    assert np.array_equal(found, images)
    assert labels.tolist() == [[19, 3], [0, 99], [7, 0]]
    refused(lambda: formats.read_cifar(put(tmp_path / "cut.bin", one[:-1])), ["9,218 bytes", "records of 3,073"])
    refused(lambda: formats.read_cifar(put(tmp_path / "empty.bin", b"")), ["0 bytes"])
    refused(lambda: formats.read_cifar(put(tmp_path / "odd.bin", b"\x0a" + one[1:])), ["label 10", "at most 9"])
    refused(lambda: formats.read_cifar(tmp_path / "nowhere.bin"), ["there is no file"])


def test_tiles_and_the_binary_version_give_the_same_cifar10(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "cifar10"
    images, labels = rng().integers(0, 256, (4, 3, 32, 32), dtype=np.uint8), np.array([1, 0, 9, 5])
    records = b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))
    for name in ("data_batch_1", "test_batch"):
        put(folder / "cifar-10-batches-bin" / f"{name}.bin", records)
    binary = [collect(part) for part in real.cifar10_data(3, 4)]
    tiles = images.reshape(2, 2, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(64, 64, 3)
    for part in ("train", "test"):
        PILImage.fromarray(tiles).save(folder / f"{part}_00000_09999.webp", lossless=True)
    np.savez(folder / "labels.npz", y_train=np.append(labels, 0).astype(np.uint8), y_test=labels.astype(np.uint8))
    for one, other, count in zip(binary, real.cifar10_data(3, 4), (3, 4), strict=True):
        again = collect(other)
        assert all(torch.equal(one[name], again[name]) for name in ("x", "y", "id"))
        assert one["y"].tolist() == labels[:count].tolist()
    mean, deviation = (torch.tensor(value)[:, None, None] for value in real.CIFAR_STATISTICS)
    assert torch.equal(((binary[1]["x"] * deviation + mean) * 255).round().byte(), torch.from_numpy(images))
    refused(lambda: real.cifar10_data(5, 4), ["4 train pictures", "at least 5", "CIFAR-10"])


def test_an_image_folder_is_taken_as_cifar10(home: Path) -> None:
    pixels = rng().integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for part in ("train", "test"):
        for name in ("airplane", "bird"):
            path = home / "cifar10" / part / name / "a.png"
            path.parent.mkdir(parents=True)
            PILImage.fromarray(pixels).save(path)
    train, _ = (collect(part) for part in real.cifar10_data(2, 2, ((0, 0, 0), (1, 1, 1))))
    assert train["y"].tolist() == [0, 1]
    assert torch.equal((train["x"][0] * 255).round().byte(), torch.from_numpy(pixels).permute(2, 0, 1))


def test_bad_tiles_are_refused(tmp_path: Path) -> None:
    refused(lambda: formats.read_tiles(tmp_path / "a.webp"), ["there is no picture"])
    refused(lambda: formats.read_tiles(put(tmp_path / "b.webp", b"RIFF nothing")), ["cannot be read as a picture"])
    PILImage.fromarray(np.zeros((64, 40, 3), np.uint8)).save(tmp_path / "c.png")
    refused(lambda: formats.read_tiles(tmp_path / "c.png"), ["40 x 64", "32 x 32"])
    PILImage.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "d.jpg")
    refused(lambda: formats.read_tiles(tmp_path / "d.jpg"), ["JPEG", "lossless"])


def test_the_pickled_cifar_is_refused(home: Path) -> None:
    put(home / "cifar10" / "cifar-10-batches-py" / "data_batch_1", b"\x80\x04pickle")
    refused(builtin.SUITES["cifar10"], ["run code", "binary version"])


def test_cifar100_keeps_the_superclass_as_a_column(home: Path) -> None:
    images = rng().integers(0, 256, (2, 3072), dtype=np.uint8)
    for part in ("train", "test"):
        put(home / "cifar100" / f"{part}.bin", b"\x04\x48" + images[0].tobytes() + b"\x13\x63" + images[1].tobytes())
    suite = builtin.suite("cifar100")
    batch = collect(suite.train)
    assert batch["y"].tolist() == [0x48, 99]
    assert batch["coarse"].tolist() == [4, 19]
    assert suite.make()(batch["x"]).shape == (2, 100)
    assert len(split(suite.train, forget="coarse == 19").forget or ()) == 1


PEOPLE = """39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, Peru, <=50K
52, Private, 83311, HS-grad, 9, Divorced, ?, Husband, Black, Female, 0, 0, 13, Cuba, >50K
"""
HEADER = ", ".join(real_tables.NAMES[:-1]) + ", revenue\n"


def test_adult_is_read_with_and_without_its_header(tmp_path: Path) -> None:
    plain, headed = (
        real_tables.read_adult(put(tmp_path / name, text))
        for name, text in (("a", PEOPLE + "\n"), ("b", HEADER + PEOPLE))
    )
    assert plain == headed
    assert plain["age"] == ["39", "52"]
    assert plain["occupation"] == ["Adm-clerical", "?"]


def test_the_age_is_no_input_of_the_network_that_predicts_it(home: Path) -> None:
    people = [PEOPLE.splitlines()[row % 2].replace("39,", f"{17 + row},", 1) for row in range(40)]
    put(home / "tabular" / "adult.data", "\n".join(people))
    one = collect(builtin.suite("adult_age").train)
    put(home / "tabular" / "adult.data", "\n".join(line.replace(line[:3], "80,", 1) for line in people))
    other = collect(builtin.suite("adult_age").train)
    assert torch.equal(one["x"], other["x"])
    assert not torch.equal(one["years"], other["years"])


def test_targets_are_standardised_and_years_choose_a_range_of_them(home: Path) -> None:
    people = [PEOPLE.splitlines()[0].replace("39,", f"{17 + row},", 1) for row in range(60)]
    put(home / "tabular" / "adult.data", "\n".join(people))
    suite = builtin.suite("adult_age")
    train = collect(suite.train)
    assert abs(float(train["y"].mean())) < 1e-6
    assert abs(float(train["y"].std(correction=0)) - 1) < 1e-6
    young = split(suite.train, forget="years <= 30").forget
    assert young is not None
    assert collect(young)["years"].tolist() == [age for age in train["years"].tolist() if age <= 30]
    assert sorted(train["id"].tolist() + collect(suite.test)["id"].tolist()) == list(range(60))


def test_a_bad_adult_table_is_refused(home: Path) -> None:
    for text, words in (
        ("", ["no rows"]),
        (HEADER + "39, State-gov\n", ["2 values at line 2", "expected 15"]),
        (PEOPLE.replace(">50K", "rich"), ["income 'rich'"]),
        (PEOPLE.replace("52", "old"), ["column age", "'old'"]),
    ):
        put(home / "tabular" / "adult.data", text)
        refused(builtin.SUITES["adult"], [*words, "Adult"])


def test_faces_are_split_by_picture_and_not_by_person(home: Path) -> None:
    pictures = rng().integers(0, 256, (400, 112, 92), dtype=np.uint8)
    (home / "faces").mkdir()
    np.savez(home / "faces" / "att_faces_40x10.npz", x=pictures, y=np.repeat(np.arange(40), 10).astype(np.uint8))
    suite = builtin.suite("faces")
    train, test = collect(suite.train), collect(suite.test)
    assert torch.bincount(train["identity"]).tolist() == [8] * 40
    assert torch.bincount(test["identity"]).tolist() == [2] * 40
    assert train["x"].shape == (320, 1, 28, 23)
    assert float(train["x"][0, 0, 0, 0]) == pytest.approx(pictures[0, :4, :4].mean() / 64 - 2)
    np.savez(home / "faces" / "att_faces_40x10.npz", x=pictures[:399], y=np.repeat(np.arange(40), 10)[:399])
    refused(builtin.SUITES["faces"], ["(399, 112, 92)", "AT&T"])


def test_passages_are_pieces_of_what_a_speaker_says(tmp_path: Path) -> None:
    text = "ANN:\nOne two, three\nfour!\n\nBOB:\nHe's five.\n\nANN:\nSix.\n\nCY:\nNo\n"
    passages, speaker = real_text.read_passages(put(tmp_path / "plays.txt", text), speakers=2, words=4)
    assert passages == [["one", "two", ",", "three"], ["four", "!", "six", "."], ["he's", "five", "."]]
    assert speaker.tolist() == [0, 0, 1]
    refused(lambda: real_text.read_passages(tmp_path / "plays.txt", speakers=4), ["3 speakers", "at least 4"])


def test_padding_does_not_move_the_speaker(home: Path) -> None:
    pytest.importorskip("transformers")
    words = [
        " ".join(f"w{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(start, start + 30)) for start in range(8)
    ]
    put(home / "text" / "tinyshakespeare.txt", "\n\n".join(f"S{n}:\n{said}" for n, said in enumerate(words * 4)))
    suite = builtin.suite("text_speakers")
    suite.task.check(suite.train, "training")  # type: ignore[attr-defined]
    model, batch = builtin.fresh(suite.make, 0).eval(), collect(suite.train)
    last = batch["x"]["attention_mask"].sum(1) < real_text.WORDS
    assert bool(last.any())
    ids, mask = batch["x"]["input_ids"][last], batch["x"]["attention_mask"][last]
    assert torch.allclose(model(ids, mask), model(torch.where(mask == 1, ids, 7), mask), atol=1e-5)


@pytest.mark.parametrize("name", REAL)
def test_a_suite_without_its_files_says_what_to_get(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "text_speakers":
        pytest.importorskip("transformers")
    monkeypatch.delenv(formats.ENVIRONMENT, raising=False)
    refused(
        builtin.SUITES[name], ["EXPUNGE_DATA is not set", "data set"] if name != "faces" else ["EXPUNGE_DATA", "AT&T"]
    )
    monkeypatch.setenv(formats.ENVIRONMENT, str(tmp_path))
    refused(builtin.SUITES[name], ["there is no folder", "get "])


def test_resnet20_has_the_papers_size_and_shortcuts_without_parameters() -> None:
    network = networks.ResNet()
    assert sum(value.numel() for value in network.parameters()) == 269_722
    block = networks.Block(2, 4, 2).eval()
    for convolution in (block.conv1, block.conv2):
        nn.init.zeros_(convolution.weight)
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert torch.equal(out[:, [0, 3]], torch.zeros(1, 2, 2, 2))


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_weights_are_loaded_without_running_code(tmp_path: Path) -> None:
    network = networks.ResNet()
    held = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": held, "best_prec1": 91.7}, tmp_path / "good.th")
    found = networks.pretrained_resnet20(tmp_path / "good.th")
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in network.state_dict().items())
    assert not found.training
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "evil.th")
    refused(lambda: networks.pretrained_resnet20(tmp_path / "evil.th"), ["no file of weights alone"])
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": {"module.conv1.weight": torch.zeros(1)}}, tmp_path / "other.th")
    refused(lambda: networks.pretrained_resnet20(tmp_path / "other.th"), ["does not hold the weights of a ResNet-20"])
    refused(lambda: networks.pretrained_resnet20(put(tmp_path / "text.th", "no weights")), ["no file of weights alone"])
    refused(lambda: networks.pretrained_resnet20(tmp_path / "nowhere.th"), ["there is no file", "resnet20-12fca82f.th"])


def real_folder(part: str) -> Path:
    folder = Path(os.environ.get(formats.ENVIRONMENT, "")) / part
    if not os.environ.get(formats.ENVIRONMENT) or not folder.is_dir():
        pytest.skip(f"{formats.ENVIRONMENT} names no folder with {part}/")
    return folder


def test_the_published_resnet20_scores_what_was_published() -> None:
    """91.73 % of the 10,000 test pictures; of the first 1,000 a binomial's three deviations, 2.6 points, to either side."""
    real_folder("cifar10")
    if not (real_folder("weights") / networks.WEIGHTS).is_file():
        pytest.skip(f"{formats.ENVIRONMENT} has no weights/{networks.WEIGHTS}")
    model = networks.pretrained_resnet20()
    _, test = real.cifar10_data(1, 1000, real.IMAGENET_STATISTICS)
    assert accuracy(model, test) == pytest.approx(0.9173, abs=0.026)


@pytest.mark.parametrize(
    ("name", "part", "sizes", "bound"),
    [("faces", "faces", (320, 80), 0.9), ("adult", "tabular", (26_096, 6_465), 0.83)],
)
def test_quick_real_suites_learn(name: str, part: str, sizes: tuple[int, int], bound: float) -> None:
    real_folder(part)
    suite = builtin.suite(name)
    assert (len(suite.train), len(suite.test)) == sizes
    assert accuracy(suite.fit(seed=0), suite.test) > bound


def test_fashion_mnist_is_the_published_one() -> None:
    """6,000 of each class, and the mean and deviation that are published for it."""
    images, labels = formats.read_mnist(real_folder("fashion_mnist"), "train")
    assert np.bincount(labels).tolist() == [6000] * 10
    assert images.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert images.std() / 255 == pytest.approx(0.3530, abs=5e-5)


def accuracy(model: nn.Module, data: object) -> float:
    with torch.no_grad():
        right = [model(batch["x"]).argmax(1) == batch["y"] for batch in data.batches(250)]  # type: ignore[attr-defined]
    return float(torch.cat(right).float().mean())


def refused(call: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message, message
