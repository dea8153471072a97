"""Fresh copies of a model, and the dampening formula."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from expunge.core import Key, Refused
from expunge.edits import dampen, reinitialise, selected

torch.set_num_threads(1)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def trained(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.copy_(torch.full_like(value, 7))
    return model


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


class Configured(nn.Module):
    """Built from a config as Hugging Face's models are, with parameters that no module resets."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config["width"]))


class HalfReset(nn.Linear):
    """Forgets its bias when it resets."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)


def test_every_weight_is_fresh_and_the_model_is_untouched() -> None:
    model = trained(network()).eval()
    model[0].bias.requires_grad_(False)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    fresh = reinitialise(model, Key(3))
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())
    assert all(not bool((p == 7).any()) for p in fresh.parameters())
    assert torch.equal(fresh[1].running_mean, torch.zeros(4))
    assert not fresh[0].bias.requires_grad
    assert fresh[0].weight.requires_grad
    assert not fresh.training
    bound = 1 / 16**0.5  # torch's default for a linear layer of 16 inputs
    assert float(fresh[4].weight.detach().abs().max()) <= bound


def test_the_same_key_gives_the_same_weights_and_another_key_others() -> None:
    first, again, other = (reinitialise(network(), Key(k)) for k in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first[0].weight, other[0].weight)


@pytest.mark.parametrize("make", [None, lambda: (np.random.rand(), random.random(), network())[2]])
def test_global_random_states_are_left_alone(make) -> None:
    model = network()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    reinitialise(model, Key(1), make)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_multihead_attention_is_reset_as_its_constructor_does() -> None:
    fresh = reinitialise(trained(nn.TransformerEncoderLayer(8, 2, 16)), Key(0))
    assert float(fresh.self_attn.in_proj_bias.detach().abs().max()) == 0.0
    assert float(fresh.self_attn.out_proj.bias.detach().abs().max()) == 0.0
    assert all(bool(torch.isfinite(p).all()) for p in fresh.parameters())


def test_a_module_that_cannot_be_reset_is_named() -> None:
    with pytest.raises(Refused, match=r"module 'body' \(Scaled\) owns parameters.*pass make="):
        reinitialise(nn.ModuleDict({"body": Scaled()}), Key(0))
    with pytest.raises(Refused, match="the model itself"):
        reinitialise(Scaled(), Key(0))


def test_a_parameter_that_reset_leaves_is_found_out() -> None:
    with pytest.raises(Refused, match=r"'bias'.*make="):
        reinitialise(nn.Sequential(HalfReset(3, 2)), Key(0))


def test_make_is_used_and_checked() -> None:
    fresh = reinitialise(trained(Scaled()), Key(0), Scaled)
    assert torch.equal(fresh.scale, torch.ones(2))
    model = Scaled()
    with pytest.raises(Refused, match="shares its weights"):
        reinitialise(model, Key(0), lambda: model)
    with pytest.raises(Refused, match="another model"):
        reinitialise(model, Key(0), lambda: nn.Linear(4, 2))


def test_a_model_with_a_config_is_built_from_it() -> None:
    model = Configured({"width": 5}).double()
    fresh = reinitialise(model, Key(0))
    assert fresh.weight.shape == (5,)
    assert fresh.weight.dtype == torch.float64
    assert not torch.equal(fresh.weight, model.weight)


def test_dtype_is_kept() -> None:
    assert reinitialise(network().double(), Key(0))[0].weight.dtype == torch.float64


def test_dampen_by_hand() -> None:
    w = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)}
    forget = {"w": torch.tensor([8.0, 2.0, 0.0, 1.0, 0.0], dtype=torch.float64)}
    whole = {"w": torch.tensor([2.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)}
    out = dampen(w, forget, whole, threshold=3.0, strength=2.0)["w"]
    assert out.tolist() == [1.0 * 0.5, 2.0, 3.0, 0.0, 5.0]  # 2 * 2 / 8; not selected; zero forget; zero all; both zero
    assert dampen(w, forget, whole, 3.0, 2.0, exponent=2.0)["w"][0] == 0.25
    assert torch.equal(dampen(w, forget, whole, 3.0, 2.0, exponent=0.0)["w"], w["w"])
    assert dampen(w, forget, whole, threshold=3.0, strength=100.0)["w"][0] == 1.0  # never grows
    assert selected(forget, whole, 3.0) == 2
