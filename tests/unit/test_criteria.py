"""`surgery`: both modes agree, the structure of the variables is kept, and bad input is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.criteria import Surgery, surgery
from expunge.gramian import RULES, one_sided

torch.set_num_threads(1)

WHERE = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return (x.exp() * x.sin()).sum(), (x - 1).square().sum() + x[0] * x[1] * x[2]


def same(a: Tensor, b: Tensor) -> None:
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_both_modes_agree(rule: str) -> None:
    reverse = surgery(pair, WHERE, rule, mode="reverse")
    forward = surgery(pair, WHERE, rule, mode="forward")
    assert (reverse.mode, forward.mode) == ("reverse", "forward")
    same(reverse.gramian, forward.gramian)
    same(reverse.update, forward.update)
    same(reverse.values, forward.values)
    assert reverse.cosine == pytest.approx(forward.cosine, rel=1e-10)


def test_against_gradients_by_hand() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    step = surgery(lambda v: {"forget": v[0] - v[1], "retain": v[1] ** 2}, x, partial(one_sided, tolerance=1.0))
    assert step.gramian.tolist() == [[2.0, -4.0], [-4.0, 16.0]]
    assert step.weights.tolist() == [1.0, 3 / 16]  # (-b - tolerance) / c
    assert step.update.tolist() == [1.0, -1.0 + 4 * 3 / 16]
    assert step.values.tolist() == [-1.0, 4.0]
    assert step.names == ("forget", "retain")
    assert step.cosine == pytest.approx(-4 / 32**0.5)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_structure_is_kept(mode: Any) -> None:
    a, b = (
        torch.tensor(0.7, dtype=torch.float64),
        torch.ones(2, 3, dtype=torch.float64).T,
    )  # b is not contiguous

    def of_sequence(v: Any) -> list[Tensor]:
        return [v[0] * v[1].sum(), (v[1] * v[1]).sum() - v[0]]

    def of_dict(v: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip("fr", of_sequence([v["a"], v["b"]]), strict=True))

    as_list = surgery(of_sequence, [a, b], mode=mode)
    as_tuple = surgery(of_sequence, (a, b), mode=mode)
    as_dict = surgery(of_dict, {"a": a, "b": b}, mode=mode)
    assert type(as_list.update) is list
    assert type(as_tuple.update) is tuple
    assert list(as_dict.update) == ["a", "b"]
    for update in (as_list.update, as_tuple.update, as_dict.update.values()):
        for part, variable, first in zip(update, (a, b), as_list.update, strict=True):
            assert part.shape == variable.shape
            assert part.dtype == variable.dtype
            same(part, first)


def test_criteria_in_every_form_agree() -> None:
    expected = surgery(pair, WHERE).update
    forms: list[Any] = [
        lambda x: torch.stack(pair(x)),
        lambda x: list(pair(x)),
        lambda x: dict(zip("ab", pair(x), strict=True)),
        [lambda x: pair(x)[0], lambda x: pair(x)[1].reshape(1)],
    ]
    for criteria in forms:
        for mode in ("reverse", "forward"):
            same(surgery(criteria, WHERE, mode=mode).update, expected)


def test_a_gradient_shared_by_variables_is_not_written_over() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    step = surgery(lambda v: ((v[0] + v[1]).sum(), v[0].sum()), [a, b], rule=lambda _: torch.tensor([2.0, 5.0]))
    assert [part.tolist() for part in step.update] == [[7.0, 7.0], [2.0, 2.0]]


@pytest.mark.parametrize(
    ("scalars", "criteria", "mode", "calls"),
    [(3, 2, "reverse", 1), (3, 3, "reverse", 1), (2, 3, "forward", 3), (1, 2, "forward", 1)],
)
def test_auto_takes_the_cheaper_mode(scalars: int, criteria: int, mode: str, calls: int) -> None:
    counted = []

    def function(x: Tensor) -> list[Tensor]:
        counted.append(1)
        return [(x - k).square().sum() for k in range(criteria)]

    step = surgery(function, torch.ones(scalars), mode="auto")
    assert step.mode == mode
    assert len(counted) == calls


def test_auto_with_separate_callables() -> None:
    functions = [lambda x, k=k: (x - k).square().sum() for k in range(4)]
    assert surgery(functions, torch.ones(2)).mode == "reverse"
    assert surgery(functions, torch.ones(1)).mode == "forward"


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_nothing_of_the_caller_changes(mode: Any) -> None:
    x = WHERE.clone().requires_grad_()
    with torch.no_grad():  # the caller's mode does not matter
        step = surgery(pair, x, mode=mode)
    assert x.grad is None
    assert x.requires_grad
    assert torch.equal(x, WHERE)
    assert not step.update.requires_grad


def test_parameters_of_a_module() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 2), torch.randn(5, 3)

    def losses(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        output = torch.func.functional_call(model, parameters, inputs)
        return {"forget": -output.square().mean(), "retain": (output - 1).square().mean()}

    parameters = dict(model.named_parameters())
    step: Surgery[Any] = surgery(losses, parameters, "one_sided")
    assert all(parameter.grad is None for parameter in parameters.values())
    assert float((step.gramian @ step.weights)[1]) >= -1e-6
    assert step.update["weight"].dtype == torch.float32


def test_a_criterion_may_ignore_some_variables() -> None:
    criteria: Callable[[Any], Any] = lambda v: (v[0].sum() + v[1].sum(), -v[0].sum())  # noqa: E731
    for mode in ("reverse", "forward"):
        step = surgery(criteria, [torch.ones(2), torch.ones(1)], "one_sided", mode=mode)
        assert step.weights.tolist() == [1.0, 1.0]
        assert [part.tolist() for part in step.update] == [[0.0, 0.0], [1.0]]


def test_zero_gradient_has_no_cosine() -> None:
    assert surgery(lambda x: (x.square().sum(), x.sum()), torch.zeros(2)).cosine is None


X = torch.ones(3)
BAD: list[tuple[str, Callable[[], Any]]] = [
    ("Did you mean 'upgrad'", lambda: surgery(pair, X, "upgard")),
    ("Did you mean 'one_sided'", lambda: surgery(pair, X, "onesided")),
    ("mode is 'backward'; expected", lambda: surgery(pair, X, mode="backward")),  # type: ignore[arg-type]
    ("variables is a int; expected", lambda: surgery(pair, 3)),
    ("variables is empty", lambda: surgery(pair, [])),
    ("variable '0' is torch.int64", lambda: surgery(pair, [torch.ones(2, dtype=torch.int64)])),
    ("criteria is", lambda: surgery([], X)),
    ("criteria returned a tensor of shape", lambda: surgery(lambda x: x.sum(), X)),
    ("criteria returned nothing", lambda: surgery(lambda _: (), X)),
    ("criterion '0' is shape \\[3\\]; expected a scalar", lambda: surgery(lambda x: (x, x), X)),
    ("criterion '1' depends on no variable", lambda: surgery(lambda x: (x.sum(), torch.ones(())), X)),
    ("criterion '1' depends on no", lambda: surgery(lambda x: (x.sum(), torch.ones(())), X, mode="forward")),
    ("no criterion depends on variable '1'", lambda: surgery(lambda v: (v[0].sum(),), [X, X])),
    (
        "criterion '0' has a gradient that is not finite",
        lambda: surgery(lambda x: ((x - 1).sqrt().sum(), x.sum()), X),
    ),
    ("rule returned", lambda: surgery(pair, X, lambda _: torch.ones(3))),
    ("rule returned", lambda: surgery(pair, X, lambda _: torch.tensor([1.0, float("nan")]))),
    ("the same variables", lambda: surgery(lambda x: (x.sum() * torch.rand(()), x.sum()), X, mode="forward")),
]


@pytest.mark.parametrize(("message", "call"), BAD)
def test_bad_input_is_refused(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
