"""On an accelerator the same run gives the same model, to the accelerator's rounding, and stays on the device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import expunge as ex
from expunge.registry import methods

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def _problem() -> tuple[nn.Module, ex.Request]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=generator)
    y = torch.arange(120) % 3
    x += 2 * torch.eye(6)[y]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, ex.split((x, y), forget=range(0, 30))


@pytest.mark.parametrize("name", sorted(set(methods()) - {"retrain", "bad_teacher", "eu_k", "unsir"}))
def test_method_agrees_with_the_cpu_and_stays_on_the_device(name: str) -> None:
    model, request = _problem()
    task = ex.Classification(3)
    here = ex.unlearn(model, request, task=task, method=name).model
    there = ex.unlearn(copy.deepcopy(model).cuda(), request, task=task, method=name).model
    for (key, cpu), (_, gpu) in zip(here.state_dict().items(), there.state_dict().items(), strict=True):
        assert gpu.device.type == "cuda"
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-2, atol=1e-3, msg=key)
