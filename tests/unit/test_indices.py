"""Index files of any usual kind say the same; what is none is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from expunge.core import Refused
from expunge.data.indices import read_indices

NUMBERS = [4, 0, 17]


def write(path: Path, kind: str) -> Path:
    path = path / f"forget.{kind}"
    if kind == "npy":
        np.save(path, np.array(NUMBERS))
    elif kind == "npz":
        np.savez(path, ids=np.array(NUMBERS, dtype=np.uint16))
    else:
        path.write_text({"txt": "4\n0\n\n17\n", "csv": "id\n4,\n0\n17\n", "json": json.dumps(NUMBERS)}[kind])
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "json", "npy", "npz"])
def test_every_kind_gives_the_same(tmp_path: Path, kind: str) -> None:
    assert read_indices(write(tmp_path, kind)) == NUMBERS


def test_a_mask_is_its_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", np.array([True, False, True]))
    assert read_indices(tmp_path / "mask.npy") == [0, 2]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("gone.txt", None, "there is no index file"),
        ("ids.pkl", b"x", "expected one of .txt"),
        ("ids.txt", b"", "lists no example"),
        ("ids.txt", b"id\n", "lists no example"),
        ("ids.txt", b"1\n2.5\n", "found '2.5'"),
        ("ids.txt", b"1\n2\n1\n", "lists 1 twice"),
        ("ids.txt", b"\xff\xfe\x00", "not a list of whole numbers"),
        ("ids.json", b'{"forget": [1]}', "found a dict"),
        ("ids.json", b"[1, true]", "found True"),
        ("ids.json", b"[1,", "not a list of whole numbers"),
        ("ids.npy", b"broken", "not a list of whole numbers"),
        ("ids.npz", b"PK broken", "not a list of whole numbers"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, name: str, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused, match=sentence):
        read_indices(tmp_path / name)


def test_arrays_of_other_kinds_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.array([1.0]))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.array([1]), b=np.array([2]))
    for name, found in (("float.npy", "float64"), ("object.npy", "allow_pickle"), ("two.npz", "2 arrays")):
        with pytest.raises(Refused, match=found):
            read_indices(tmp_path / name)
