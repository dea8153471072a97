"""Identity forgetting: the unit to forget is a person (or a signer, a patient), with every example of theirs.

Forget and unseen examples have identities that the other parts do not have, so that a model which forgot an identity
should treat it as one that it never saw. The label to predict is another one (an age group), which stays in use.

Benchmarks: MUFAC and MUCAC (Choi and Na, "Towards Machine Unlearning Benchmarks", arXiv:2311.02240), read from the
user's own copy by ``read_identities``. The built-in suite ``identities`` is synthetic and says so.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.audit import intervals
from expunge.audit.loss_attack import LEAST, loss_attack_accuracy
from expunge.audit.subject import Reading, Subject
from expunge.challenges.confusion import labels_of
from expunge.core import Data, Key, Refused, Request
from expunge.data.files import IMAGES, ImageFiles, common_shape
from expunge.data.sources import as_data
from expunge.data.tables import Loaded
from expunge.registry import did_you_mean, measure

UNSEEN = "unseen_identities"


@dataclass(frozen=True)
class Identities:
    """Data split by identity.

    Attributes:
        train: what the original model is trained on: the forget and the retain examples.
        request: forget, retain, and extra ``unseen_identities``: examples of identities that are not in train.
        forgotten, unseen: the identities.
    """

    train: Data
    request: Request
    forgotten: tuple[int, ...]
    unseen: tuple[int, ...]


def split_identities(
    train: Any,
    forget: int | Sequence[int],
    unseen: Any,
    *,
    identity: str = "identity",
    valid: Any = None,
    key: Key = Key(0),
) -> Identities:
    """Forget whole identities, and hold them beside identities that were never trained on.

    Args:
        train: in any form that ``as_data`` takes, with a column of whole numbers that name the identity.
        forget: how many identities, drawn at random; or which.
        unseen: how many identities to take out of `train`; or data of other identities.
        identity: the column.
        valid: goes into the request.
        key: of the draws.

    Raises:
        Refused: for an identity that does not exist or is on two sides, or where nothing would be left to retain.
    """
    data = as_data(train)
    of = labels_of(data, identity)
    known = torch.unique(of)
    order = known[torch.randperm(len(known), generator=key.at("identities").generator())]
    gone = _chosen(forget, order, known)
    left = order[~torch.isin(order, gone)]
    if isinstance(unseen, int):
        if not 1 <= unseen < len(left):
            raise Refused(
                f"unseen must lie in 1 to {len(left) - 1}: of {len(known)} identities {len(gone)} are forgotten and one "
                f"must be retained, found {unseen}"
            )
        held = left[:unseen]
        others = data.select(torch.nonzero(torch.isin(of, held)).flatten())
        data = data.select(torch.nonzero(~torch.isin(of, held)).flatten())
        of = of[~torch.isin(of, held)]
    else:
        others = as_data(unseen)
        held = torch.unique(labels_of(others, identity))
        both = held[torch.isin(held, known)]
        if len(both):
            raise Refused(
                f"identity {int(both[0])} is in the training data and in the unseen data: expected other ones"
            )
    inside = torch.isin(of, gone)
    if bool(inside.all()):
        raise Refused("every identity of the training data is forgotten: leave at least one to retain")
    places = torch.arange(len(data))
    request = Request(
        forget=data.select(places[inside]),
        retain=data.select(places[~inside]),
        valid=None if valid is None else as_data(valid),
        extra={UNSEEN: others},
    )
    return Identities(data, request, tuple(gone.sort().values.tolist()), tuple(held.sort().values.tolist()))


def _chosen(forget: int | Sequence[int], order: Tensor, known: Tensor) -> Tensor:
    """The identities to forget."""
    if isinstance(forget, int):
        if not 1 <= forget < len(known):
            raise Refused(f"forget must lie in 1 to {len(known) - 1}, some of the identities, found {forget}")
        return order[-forget:]
    named = torch.unique(torch.as_tensor(list(forget), dtype=torch.int64))
    missing = named[~torch.isin(named, known)]
    if len(missing) or not len(named):
        found = f"{int(missing[0])} does not occur" if len(missing) else "none is named"
        raise Refused(
            f"identities to forget: {found}; there are {len(known)}, from {int(known[0])} to {int(known[-1])}"
        )
    return named


def nomus(utility: float, attack_accuracy: float, weight: float = 0.5) -> float:
    """weight utility + (1 - weight) (1 - 2 |0.5 - attack|): 1 for full utility and an attack at chance.

    It does not rank retraining first where forgetting costs utility: on MUCAC the published original model (0.8858)
    stands above the retrained one (0.8631). Read it beside the retrained models' value.

    Args:
        utility: accuracy on test examples, in [0, 1]. attack_accuracy: of a balanced membership attack, in [0, 1].
        weight: of the utility, in [0, 1]; 1/2 in the paper.
    """
    for name, value in (("utility", utility), ("attack_accuracy", attack_accuracy), ("weight", weight)):
        if not 0 <= value <= 1:
            raise Refused(f"{name} must lie in [0, 1], found {value!r}")
    return weight * utility + (1 - weight) * (1 - 2 * abs(0.5 - attack_accuracy))


@measure
def identity_nomus(subject: Subject) -> Reading | None:
    """NoMUS (0 to 1): test accuracy and how little a loss attack tells forgotten from unseen identities, half and half.

    Applies where the request carries ``unseen_identities``, at least ten examples of them and as many to forget. The
    attack is ``loss_attack_accuracy``: logistic regression on the loss, ten balanced splits. Interval: normal, over test
    and attacked examples; by the absolute value it is wider than needed near chance. The parts are in the detail.
    """
    if UNSEEN not in subject.request.extra or not subject.has("test"):
        return None
    test, forget, unseen = subject.outputs("test"), subject.outputs("forget").loss, subject.outputs(UNSEEN).loss
    if test.correct is None or min(len(forget), len(unseen)) < LEAST:
        return None
    attack = loss_attack_accuracy(forget, unseen, key=subject.key.at("identity"))
    utility = float(test.correct.mean())
    low, high = intervals.wilson(test.correct.sum(), len(test))
    # The derivative by the utility is 1/2 and that by the attack's accuracy 1: half-widths add up as deviations do.
    half = math.hypot(0.5 * float(high - low) / 2, (attack.high - attack.low) / 2)
    value = nomus(utility, attack.accuracy)
    parts = {"utility": utility, "attack_accuracy": attack.accuracy, "forgetting_score": abs(0.5 - attack.accuracy)}
    size = 2 * attack.size + len(test)
    return Reading("identity_nomus", value, max(0.0, value - half), min(1.0, value + half), size, detail=parts)


def read_identities(
    folder: str | Path,
    table: str | Path,
    *,
    image: str = "image",
    identity: str = "identity",
    label: str = "label",
) -> Loaded:
    """Images with an identity and a label each, from a folder and an index table (MUFAC, MUCAC: your own copy).

    Ids number the lines of the table. Identities and labels that are whole numbers stay so; others are numbered in sorted
    order. Images are decoded when they are used. Several labels per image: read one of them at a time.

    Args:
        folder: where the images are. table: a CSV with a header line.
        image, identity, label: its columns; `image` is a path below the folder.

    Returns:
        ``data`` with columns ``x``, ``y`` and ``identity``; ``classes``; ``texts["identity"]`` where they had names.

    Raises:
        Refused: for a missing column, file or value, or images of different size.
    """
    folder, table = Path(folder), Path(table)
    rows = _rows(table, (image, identity, label))
    paths = [_image(folder, row[image], f"{table}, line {number + 2}") for number, row in enumerate(rows)]
    labels, classes = _numbered([row[label] for row in rows])
    people, names = _numbered([row[identity] for row in rows])
    if not classes and int(labels.min()) < 0:
        raise Refused(f"{table}: label {int(labels.min())} is negative: number the classes from 0, or name them")
    lines = torch.arange(len(rows))
    data = Data(ImageFiles(paths, labels, common_shape(paths)), lines, lines).annotate("identity", people)
    return Loaded(data, classes, texts={"identity": names} if names else {})


def _rows(table: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not table.is_file():
        raise Refused(f"there is no index table {table}")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            have = list(reader.fieldnames or ())
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise Refused(f"{table} cannot be read as a CSV table: {error}") from error
    for name in columns:
        if name not in have:
            raise Refused(
                f"{table} has no column {name!r}{did_you_mean(name, have)}: it has {', '.join(have) or 'none'}"
            )
    for number, row in enumerate(rows):
        empty = [name for name in columns if not (row[name] or "").strip()]
        if empty:
            raise Refused(f"{table}: column {empty[0]!r} is empty at line {number + 2}: fill it in or drop the line")
    if not rows:
        raise Refused(f"{table} has no rows: expected at least one below the header")
    return rows


def _image(folder: Path, name: str, where: str) -> Path:
    path = folder / name.strip()
    if not path.resolve().is_relative_to(folder.resolve()):
        raise Refused(f"{where}: {name!r} leads out of {folder}: expected a path below it")
    if path.suffix.lower() not in IMAGES or not path.is_file():
        raise Refused(f"{where}: there is no image {path}")
    return path


def _numbered(values: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Whole numbers as they stand; anything else numbered in sorted order, with the names."""
    text = [value.strip() for value in values]
    if all(value.lstrip("-").isdigit() for value in text):
        return torch.tensor([int(value) for value in text]), ()
    names = sorted(set(text))
    places = {name: place for place, name in enumerate(names)}
    return torch.tensor([places[value] for value in text]), tuple(names)
