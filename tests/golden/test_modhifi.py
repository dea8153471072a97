"""ModHiFi (arXiv:2511.19566): contributions by hand and by masking channels, compensation by least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import expunge as ex
from expunge import methods
from expunge.core import Case
from expunge.fidelity import Contributions, contributions
from expunge.scope import Scope
from tests.fixtures import tiny
from tests.golden.forgetting import accuracy, digits

torch.set_num_threads(1)
CONVOLUTIONS = [
    {},
    {"padding": 1, "stride": 2},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "groups": 2},
    {"padding": (2, 1), "padding_mode": "reflect", "groups": 4},
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(model: nn.Module) -> nn.Module:
    model = model.double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(drawn(*p.shape, seed=number + 40))
    return model


def found_of(model: nn.Module, x: Tensor, chunk: int = 64) -> dict[str, Contributions]:
    request = ex.split((x, torch.zeros(len(x)).long()), forget=[0])
    case = Case(model, request, ex.Classification(2), Scope.all(model))
    return contributions(case, ex.as_data((x, torch.zeros(len(x)).long())), chunk)


def apart(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What each channel makes on its own, by setting the others to 0."""
    parts = []
    with torch.no_grad():
        for channel in range(x.shape[1]):
            alone = torch.zeros_like(x)
            alone[:, channel] = x[:, channel]
            parts.append((layer(alone) - layer(torch.zeros_like(x))).flatten())
    return parts


def test_two_channels_by_hand() -> None:
    """W = diag(1, 2), x = (1, 1), (3, 0): A_1 = (1, 0), (3, 0); A_2 = (0, 2), (0, 0); |Y|^2 = 14."""
    layer = nn.Sequential(nn.Linear(2, 2).double())
    with torch.no_grad():
        layer[0].weight.copy_(torch.diag(torch.tensor([1.0, 2.0])))
    one = found_of(layer, torch.tensor([[1.0, 1.0], [3.0, 0.0]], dtype=torch.float64))["0.weight"]
    assert one.gram.tolist() == [[10.0, 0.0], [0.0, 4.0]]
    assert one.alone.tolist() == pytest.approx([10 / 14, 4 / 14])
    assert one.fidelity(torch.tensor([0])) == pytest.approx(10 / 14)
    assert one.fidelity(torch.tensor([0, 1])) == pytest.approx(1.0)
    assert one.smallest(torch.tensor([0, 1]), 0.7).tolist() == [0]
    assert one.smallest(torch.tensor([0, 1]), 0.8).tolist() == [0, 1]
    assert one.smallest(torch.tensor([1, 0]), 0.2).tolist() == [1]
    assert one.smallest(torch.tensor([1]), 0.9).tolist() == [1]
    assert one.smallest(torch.tensor([1, 0]), 0.0).tolist() == []


@pytest.mark.parametrize("setting", CONVOLUTIONS, ids=str)
def test_a_convolution_channel_by_channel(setting: dict[str, object]) -> None:
    layer = filled(nn.Conv2d(4, 8, 3, **setting))  # type: ignore[arg-type]
    x = drawn(5, 4, 7, 6, seed=1)
    parts = torch.stack(apart(layer, x))
    model = nn.Sequential(layer, nn.Flatten())
    for chunk in (64, 2):
        one = found_of(model, x, chunk)["0.weight"]
        torch.testing.assert_close(one.gram, parts @ parts.T, rtol=1e-10, atol=1e-10)
    scaled = one.times(layer.weight.detach(), torch.tensor([1.0, 0.0, -2.0, 0.5]))
    expected = (torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)[:, None] * parts).sum(0)
    with torch.no_grad():
        zero = layer(torch.zeros_like(x)).flatten()
        layer.weight.copy_(scaled)
        torch.testing.assert_close(layer(x).flatten() - zero, expected, rtol=1e-10, atol=1e-10)


def test_fidelity_and_compensation_are_least_squares() -> None:
    """Against the regression of Y on the contributions themselves, one row per number of the output."""
    layer, x = filled(nn.Linear(6, 4)), drawn(9, 6, seed=2)
    x[:, 5] = 2.0 * x[:, 4]  # two channels whose contributions are not independent of one another
    parts = torch.stack(apart(layer, x), 1)
    whole = parts.sum(1)
    one = found_of(nn.Sequential(layer), x)["0.weight"]
    for size in (1, 2, 3, 6):
        for chosen in itertools.combinations(range(6), size):
            index = torch.tensor(chosen)
            delta = torch.linalg.lstsq(parts[:, index], whole[:, None], driver="gelsd").solution[:, 0]
            left = (whole - parts[:, index] @ delta).square().sum() / whole.square().sum()
            assert one.fidelity(index) == pytest.approx(1.0 - float(left), abs=1e-9)
            torch.testing.assert_close(one.compensation(index), delta, rtol=1e-6, atol=1e-6)
    alone = [one.fidelity(torch.tensor([c])) for c in range(6)]
    assert one.alone.tolist() == pytest.approx(alone, abs=1e-12)


def test_a_layer_called_twice_sums_over_its_calls_and_a_shared_table_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(3, 3), nn.Linear(3, 3)
            self.out = nn.Linear(3, 3, bias=False)
            self.out.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(torch.tanh(self.inner(x))))

    model, x = filled(Twice()), drawn(5, 3, seed=3)
    found = found_of(model, x)
    assert list(found) == ["inner.weight"]
    with torch.no_grad():
        grams = [torch.stack(apart(model.inner, part)) for part in (x, torch.tanh(model.inner(x)))]
    torch.testing.assert_close(found["inner.weight"].gram, sum(part @ part.T for part in grams))


def deep() -> tuple[nn.Module, ex.Request]:
    """Hidden channel 0 is alive for class 0 alone, channels 1 and 2 for the others; 4 layers."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.copy_(torch.eye(3))
            layer.bias.zero_()
    y = torch.arange(12) % 3
    x = torch.eye(3, dtype=torch.float64)[y] * (1.0 + torch.arange(12)[:, None])
    return model, ex.split((x, y), forget="y == 0")


def test_the_channel_of_a_class_is_taken_out_and_no_other() -> None:
    model, request = deep()
    for strength in (1.0, 0.25):
        done = ex.unlearn(model, request, task=ex.Classification(3), method=methods.modhifi_u(strength=strength))
        expected = torch.diag(torch.tensor([1.0 - strength, 1.0, 1.0], dtype=torch.float64))
        assert torch.equal(done.model[2].weight, expected)
        assert all(torch.equal(done.model[n].weight, model[n].weight) for n in (0, 4))
    assert done.record["history"] == [{"channels": 1.0, "of": 3.0}]
    assert done.record["cost"]["backward"] == 0
    done = ex.unlearn(model, request, task=ex.Classification(3), method=methods.modhifi_u(ends=True))
    assert all(torch.equal(done.model[n].weight, torch.diag(torch.tensor([0.0, 1.0, 1.0]).double())) for n in (0, 2, 4))


def test_without_retain_data_what_the_class_lives_on_goes() -> None:
    model, request = deep()
    alone = ex.Request(request.forget)
    done = ex.unlearn(model, alone, task=ex.Classification(3), method=methods.modhifi_u(rise=None))
    assert torch.equal(done.model[2].weight, torch.diag(torch.tensor([0.0, 1.0, 1.0]).double()))
    assert done.record["cost"]["forward"] == 4


def test_where_all_share_a_channel_it_is_kept() -> None:
    """The same inputs on both sides: no channel says more of one."""
    model, request = deep()
    batch = request.forget.batch(torch.arange(4))
    same = ex.Request(request.forget, ex.as_data((batch["x"], batch["y"]), ids=torch.arange(90, 94)))
    done = ex.unlearn(model, same, task=ex.Classification(3), method=methods.modhifi_u())
    assert torch.equal(done.model[2].weight, model[2].weight)
    assert any("no channel was chosen" in note for note in done.notes)


def test_pruning_compensates_and_stays() -> None:
    """Channel 1 is twice channel 0: one of them goes, the other speaks for both, and the output is the same."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Identity(), nn.Linear(3, 2), nn.Identity(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 9.0]]))  # the third comes first
    x, y = drawn(20, 2, seed=5), torch.arange(20) % 2
    request = ex.split((x, y), forget=[0, 2])
    stage = methods.modhifi_p(lost=1e-6, rise=None)
    done = ex.unlearn(model, request, task=ex.Classification(2), method=stage)
    gone = 1 if float(done.model[2].weight[0, 1].detach()) == 0.0 else 0  # they tie
    column = {0: [0.0, 1.5, 0.0], 1: [3.0, 0.0, 0.0]}
    torch.testing.assert_close(done.model[2].weight, torch.tensor([column[gone], [0.0, 0.0, 9.0]]).double())
    torch.testing.assert_close(done.model(x), model(x))
    stage = methods.modhifi_p(lost=1e-6, rescale=False, rise=None)
    plain = ex.unlearn(model, request, task=ex.Classification(2), method=stage)
    kept = torch.ones(3).double()
    kept[gone] = 0.0
    assert torch.equal(plain.model[2].weight, model[2].weight * kept)
    after = ex.unlearn(model, request, task=ex.Classification(2), method=ex.chain(stage, methods.finetune(steps=3)))
    assert torch.equal(after.model[2].weight[:, gone], torch.zeros(2).double())
    assert not torch.equal(after.model[2].weight[:, 1 - gone], plain.model[2].weight[:, 1 - gone])


def test_without_a_guard_no_label_is_read() -> None:
    model, request = digits(8)
    columns = [next(request.data(part).batches(999)) for part in ("forget", "retain")]
    x, n = torch.cat([batch["x"] for batch in columns]), len(columns[0]["x"])
    found = []
    for y in (torch.cat([batch["y"] for batch in columns]), torch.zeros(len(x)).long()):
        request = ex.split((x, y), forget=list(range(n)))
        stage = methods.modhifi_u(rise=None, ends=True)
        done = ex.unlearn(model, request, task=ex.Classification(10), method=stage)
        found.append(torch.nn.utils.parameters_to_vector(done.model.parameters()).detach())
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.nn.utils.parameters_to_vector(model.parameters()).detach())


def test_a_class_is_forgotten_and_the_others_are_kept() -> None:
    """On a network of two convolutions and two linear layers, with the defaults."""
    found = tiny("classification")
    done = ex.unlearn(found.model, found.request, task=found.task, method="modhifi_u")
    assert accuracy(found.model, found.request.forget) == 1.0
    assert accuracy(done.model, found.request.forget) < 0.3
    assert accuracy(done.model, found.request.retain) > 0.9


def test_two_layers_leave_none_between_them() -> None:
    model, request = digits(8)
    with pytest.raises(ex.Refused, match="none is left to edit"):
        ex.unlearn(model, request, task=ex.Classification(10), method="modhifi_u")
