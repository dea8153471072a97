"""What every test shares: one thread, and a watch on the global random state."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Sums in one order, and no more processors than a test asked for."""
    torch.set_num_threads(1)


class GlobalRandomness:
    """A picture of the three global random streams; ``unchanged`` says whether any was drawn from since."""

    def __init__(self) -> None:
        self.torch, self.numpy, self.python = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def unchanged(self) -> bool:
        same_numpy = all(np.array_equal(a, b) for a, b in zip(self.numpy, np.random.get_state(), strict=True))
        return torch.equal(self.torch, torch.get_rng_state()) and same_numpy and self.python == random.getstate()


@pytest.fixture
def global_randomness() -> GlobalRandomness:
    """The global random state at the start of the test, to be asked ``unchanged()``."""
    torch.manual_seed(1234)
    np.random.seed(1234)
    random.seed(1234)
    return GlobalRandomness()


@pytest.fixture
def poisoned_randomness() -> Iterator[GlobalRandomness]:
    """As ``global_randomness``, and the test fails at its end when anything drew from a global stream."""
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    watch = GlobalRandomness()
    yield watch
    assert watch.unchanged(), "the global random state was used: every draw must come from a Key"
