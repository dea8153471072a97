"""What people bring: datasets with text in them, models that need `call`, tables with names of people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import expunge as ex
from expunge.core import Batch, Refused
from expunge.data.files import read
from expunge.data.sources import fingerprint
from expunge.tasks.classification import Classification
from expunge.workload import Workload, request_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.layer(x)}


class People(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, row: int) -> dict[str, Any]:
        x = torch.linspace(0, 1, 4) * row
        return {"x": x, "y": row % 3, "name": f"person {row}", "pair": (x, x + 1), "more": {"note": "a", "z": row}}


def task() -> Classification:
    return ex.Classification(3, call=lambda model, batch: model(batch["x"])["logits"])


def run(out: Path) -> ex.Outcome:
    torch.manual_seed(0)
    request = ex.split(People(), forget=[1, 4])
    return ex.unlearn(Net(), request, task=task(), method=ex.methods.finetune(steps=2), out=out)


def test_text_columns_are_left_out_and_the_rest_is_hashed() -> None:
    data = ex.as_data(People())
    batch: Batch = data.batch(torch.tensor([2, 5]))
    assert "name" not in batch
    assert batch["pair"][1].shape == (2, 4)
    assert fingerprint(data) == fingerprint(ex.as_data(People()))


def test_a_task_with_a_lambda_finds_its_finished_run_again(tmp_path: Path) -> None:
    keep = [task() for _ in range(3)]  # so that no lambda has the address of another one
    first = run(tmp_path / "out")
    keep.append(task())
    assert run(tmp_path / "out").record == first.record


ROWS = [
    (f"Person {row}", 100 + row, 20.5 + row, 50 + row, "ab"[row % 2], ("no", "yes")[row % 3 == 0]) for row in range(20)
]


@pytest.fixture
def table(tmp_path: Path) -> Workload:
    pytest.importorskip("pandas")
    path = tmp_path / "t.csv"
    lines = "".join(",".join(map(str, row)) + "\n" for row in ROWS)
    path.write_text("full name,number,mean radius,weight,ward,said\n" + lines)
    loaded = read(path, label="said", ids="number", drop=["full name"])
    return Workload(
        loaded.data,
        Classification(2),
        lambda seed: nn.Linear(4, 2),
        names=loaded.classes,
        columns=loaded.columns,
        texts=loaded.texts,
    )


@pytest.mark.parametrize(
    ("condition", "chosen"),
    [
        ("mean radius > 35", lambda row: row[2] > 35),
        ("weight > 60", lambda row: row[3] > 60),
        ("number < 105", lambda row: row[1] < 105),
        ("ward == b", lambda row: row[4] == "b"),
        ("ward != 'b'", lambda row: row[4] != "b"),
        ("full name == Person 7", lambda row: row[0] == "Person 7"),
        ('full name in [Person 7, "Person 9"]', lambda row: row[0] in ("Person 7", "Person 9")),
        ("said == yes", lambda row: row[5] == "yes"),
        ("label == yes", lambda row: row[5] == "yes"),
        ("label in [yes]", lambda row: row[5] == "yes"),
    ],
)
def test_a_condition_may_use_any_column(table: Workload, condition: str, chosen: Any) -> None:
    request = request_of(table, condition)
    assert request.forget is not None
    assert request.forget.ids.tolist() == [row[1] for row in ROWS if chosen(row)]
    assert set(request.forget.batch(torch.tensor([0]))) == {"x", "y", "id"}  # the condition leaves nothing behind


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("full name == Person 70", "did you mean 'Person 7'"),
        ("ward > 0", "holds text"),
        ("label == yess", "no class is called 'yess' .did you mean 'yes'"),
    ],
)
def test_a_condition_on_text_says_what_is_wrong(table: Workload, condition: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        request_of(table, condition)
