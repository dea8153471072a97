"""The store of outputs: what goes in comes out, whoever writes at once; what is damaged is refused in one sentence."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

import expunge
from expunge.core import Refused
from expunge.store import Store

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(expunge.__file__).parents[1])}
WRITER = """
import sys
import numpy as np
from expunge.store import Store
store = Store(sys.argv[1])
for turn in range(30):
    for model in range(4):
        rng = np.random.default_rng(model)
        store.put(f"m{model}", "d", {"id": np.arange(50), "logits": rng.normal(size=(50, 3))})
        store.put(f"own{sys.argv[2]}", f"d{turn}", {"id": np.arange(turn + 1)})
"""


def arrays(rows: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "id": np.arange(rows),
        "logits": rng.normal(size=(rows, 3)).astype(np.float32),
        "label": rng.integers(0, 3, rows),
    }


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "store")
    assert list(store.entries()) == []
    store.put("m", "d", arrays())
    store.put("m", "e", arrays(7, 1))
    store.put("n", "d", arrays(5, 2))
    found = Store(store.folder).get("m", "e")
    assert {name: array.dtype for name, array in found.items()} == {n: a.dtype for n, a in arrays().items()}
    assert all(np.array_equal(found[name], array) for name, array in arrays(7, 1).items())
    assert list(store.entries()) == [("m", "d"), ("m", "e"), ("n", "d")]
    with np.load(store.path("m", "d")) as plain:
        assert np.array_equal(plain["logits"], arrays()["logits"])


def test_it_computes_once(tmp_path: Path) -> None:
    store, calls = Store(tmp_path), []
    for _ in range(3):
        store.fill("m", "d", lambda: calls.append(1) or arrays())  # type: ignore[func-returns-value]
    assert calls == [1]


def test_processes_that_write_at_once_leave_whole_files(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(n)], env=ENVIRONMENT) for n in range(3)
    ]
    store = Store(tmp_path)
    while any(writer.poll() is None for writer in writers):
        for model, data in list(store.entries()):
            store.get(model, data)  # a reader in between never meets a half file
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(list(store.entries())) == 4 + 3 * 30
    for model in range(4):
        expected = np.random.default_rng(model).normal(size=(50, 3))
        assert np.array_equal(store.get(f"m{model}", "d")["logits"], expected)
    assert not list(tmp_path.rglob("*.tmp"))


def test_threads_that_write_the_same_file_at_once(tmp_path: Path) -> None:
    store, failed = Store(tmp_path), []

    def write() -> None:
        try:
            for _ in range(50):
                store.put("m", "d", arrays())
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    store.get("m", "d")


def read(store: Store) -> dict[str, np.ndarray] | str:
    """The arrays, or the sentence of the refusal."""
    try:
        return store.get("m", "d")
    except Refused as error:
        return str(error)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "appended", "empty"])
def test_damage_is_found_wherever_it_is(tmp_path: Path, damage: str) -> None:
    """Refused in one sentence, or (for bytes that mean nothing) what was written; never something else."""
    store = Store(tmp_path)
    path = store.put("m", "d", arrays())
    whole = path.read_bytes()
    refused = 0
    places = range(0, len(whole), 3 if damage == "flipped" else 17)
    for place in places if damage in ("truncated", "flipped") else (0,):
        changed = {
            "truncated": whole[:place],
            "flipped": whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :],
            "appended": whole + b"more",
            "empty": b"",
        }[damage]
        path.write_bytes(changed)
        found = read(store)
        if isinstance(found, str):
            refused += 1
            assert "\n" not in found
            assert str(path) in found
            assert "delete it" in found
        else:
            assert all(np.array_equal(found[name], array) for name, array in arrays().items())
    assert refused >= (0 if damage == "appended" else 0.5 * len(places) if damage in ("truncated", "flipped") else 1)


def test_tampering_that_is_a_good_npz_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.put("m", "d", arrays())
    with np.load(path) as file:
        parts = {name: file[name] for name in file.files}
    parts["label"] = 2 - parts["label"]
    np.savez(path, **parts)
    with pytest.raises(Refused, match="does not hold what was written there"):
        store.get("m", "d")
    np.savez(path, **arrays())
    with pytest.raises(Refused, match="not a whole file of the store"):
        store.get("m", "d")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    store = Store(tmp_path / "store")
    path = store.put("m", "d", arrays())
    content = io.BytesIO()
    np.lib.format.write_array(content, np.array([Payload()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("id.npy", content.getvalue())
    with pytest.raises(Refused):
        store.get("m", "d")
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(Refused):
        store.get("m", "d")
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(Refused, match="one row per example and their id"):
        store.put("m", "d", {"logits": np.zeros((3, 2))})
    with pytest.raises(Refused, match=r"id \(3,\), logits \(4, 2\)"):
        store.put("m", "d", {"id": np.arange(3), "logits": np.zeros((4, 2))})
    for name in ("", "../m", "a/b", "a.b", "-m"):
        with pytest.raises(Refused, match="give letters and digits"):
            store.path(name, "d")
        with pytest.raises(Refused, match="give letters and digits"):
            store.path("m", name)
    with pytest.raises(Refused, match="fill it first"):
        store.get("m", "d")
    with pytest.raises(Refused, match="is empty"):
        store.to_parquet(tmp_path / "t.parquet")


def test_parquet_reads_back_equal(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    store = Store(tmp_path / "store")
    store.put("m", "d", arrays())
    store.put("m", "e", {"id": np.arange(2), "loss": np.array([0.1, 0.2]), "units": np.ones(2)})
    store.put("n", "d", arrays(6, 3))
    table = parquet.read_table(store.to_parquet(tmp_path / "t.parquet"))
    model, data = (np.array(table[name].to_pylist()) for name in ("model", "data"))
    for key, value in (("m", arrays()), ("n", arrays(6, 3))):
        rows = np.flatnonzero((model == key) & (data == "d"))
        logits = np.stack([table[f"logits_{c}"].to_numpy()[rows] for c in range(3)], 1)
        assert np.array_equal(logits.astype(np.float32), value["logits"])
        assert np.array_equal(table["label"].to_numpy()[rows], value["label"])
        assert np.array_equal(table["id"].to_numpy()[rows], value["id"])
    rows = np.flatnonzero(data == "e")
    assert np.array_equal(table["loss"].to_numpy()[rows], [0.1, 0.2])
    chosen = parquet.read_table(store.to_parquet(tmp_path / "u.parquet", ["label"]))
    assert set(chosen.column_names) == {"model", "data", "id", "label"}
