"""Gramian rules: against torchjd (a test-only oracle), closed forms, optimality conditions, odd inputs."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize
from torch import Tensor

from expunge.gramian import RULES, aligned, cagrad, dual_proj, imtl_g, mgda, nash, one_sided, pcgrad, upgrad

torch.set_num_threads(1)

SYMMETRIC = ["upgrad", "dual_proj", "mgda", "cagrad", "imtl_g", "nash", "aligned"]
FAST = settings(max_examples=150, deadline=None, derandomize=True)
PAIRS = arrays(np.float64, (2, 3), elements=st.floats(-3, 3, width=32))
TRIPLES = arrays(np.float64, (3, 4), elements=st.floats(-3, 3, width=32))


def gram(jacobian: Tensor | np.ndarray) -> Tensor:
    j = torch.as_tensor(jacobian, dtype=torch.float64)
    return j @ j.T


def jacobians(n: int, count: int, width: int = 9, spread: float = 3.0) -> list[Tensor]:
    """Gradients of unequal lengths; every second set is bent towards conflict."""
    generator = torch.Generator().manual_seed(n)
    made = []
    for k in range(count):
        j = torch.randn(n, width, generator=generator, dtype=torch.float64)
        j -= (k % 2) * 0.5 * j.mean(0)
        made.append(j * (1 + spread * torch.rand(n, 1, generator=generator, dtype=torch.float64)))
    return made


def close(weights: Tensor, jacobian: Tensor, expected: Tensor, relative: float = 1e-4) -> None:
    """The update, not the weights: those are not unique where gradients are dependent."""
    update = jacobian.T @ weights
    assert (update - expected).norm() <= relative * expected.norm() + 1e-12


# ---- agreement with torchjd -------------------------------------------------------------------------------


def oracle(name: str) -> Callable[[Tensor], Tensor]:
    """torchjd's rule with its regularisation switched off and its iterations run to convergence."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    if name in ("upgrad", "dual_proj"):
        pytest.importorskip("quadprog")
        linalg = pytest.importorskip("torchjd.linalg")
        projector = linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
        kind = aggregation.UPGrad if name == "upgrad" else aggregation.DualProj
        return kind(projector=projector)
    if name == "mgda":
        return aggregation.MGDA(epsilon=1e-9, max_iters=5000)
    if name == "imtl_g":
        return aggregation.IMTLG()
    return aggregation.AlignedMTL(scale_mode=name.removeprefix("aligned_"))


OURS: dict[str, Callable[[Tensor], Tensor]] = {
    "upgrad": upgrad,
    "dual_proj": dual_proj,
    "imtl_g": imtl_g,
    "aligned_min": aligned,
    "aligned_median": lambda g: aligned(g, scale="median"),
    "aligned_rmse": lambda g: aligned(g, scale="rmse"),
}


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("name", OURS)
def test_agrees_with_torchjd(name: str, n: int) -> None:
    theirs = oracle(name)
    for j in jacobians(n, 20):
        close(OURS[name](gram(j)), j, theirs(j))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_mgda_agrees_with_torchjd(n: int) -> None:
    """Frank-Wolfe is linear only where the solution is inside the simplex: nearly orthogonal gradients."""
    theirs = oracle("mgda")
    for j in jacobians(n, 6, width=60, spread=0.5):
        close(mgda(gram(j)), j, theirs(j))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_pcgrad_agrees_with_torchjd_in_every_order(n: int) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed, j in enumerate(jacobians(n, 10)):
        torch.manual_seed(seed)
        expected = aggregation.PCGrad()(j)
        torch.manual_seed(seed)
        drawn = [torch.randperm(n).tolist() for _ in range(n)]  # as the library draws them, from the global state
        close(pcgrad(gram(j), drawn), j, expected, 1e-10)
        if n < 4:
            candidates = itertools.product(itertools.permutations(range(n)), repeat=n)
            updates = [j.T @ pcgrad(gram(j), list(orders)) for orders in candidates]
            assert min((u - expected).norm() for u in updates) < 1e-10


@pytest.mark.parametrize("c", [0.2, 0.4, 0.9])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_cagrad_agrees_with_torchjd(n: int, c: float, monkeypatch: pytest.MonkeyPatch) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    pytest.importorskip("clarabel")
    aggregation = pytest.importorskip("torchjd.aggregation")
    loose = cvxpy.Problem.solve
    tight = {
        "tol_gap_abs": 1e-12,
        "tol_gap_rel": 1e-12,
        "tol_feas": 1e-12,
    }  # at its defaults it stops 3e-4 short

    def solve(problem: Any, solver: str) -> Any:
        with warnings.catch_warnings():  # it stops within the tolerance of the test but says "may be inaccurate"
            warnings.simplefilter("ignore", UserWarning)
            return loose(problem, solver, **tight)

    monkeypatch.setattr(cvxpy.Problem, "solve", solve)
    for j in jacobians(n, 8):
        close(cagrad(gram(j), c), j, aggregation.CAGrad(c=c, norm_eps=0.0)(j))


# ---- one-sided projection ---------------------------------------------------------------------------------------


@FAST
@given(PAIRS, st.floats(-2, 2))
def test_one_sided_meets_its_optimality_conditions(j: np.ndarray, tolerance: float) -> None:
    g = gram(j)
    weights = one_sided(g, tolerance, max_multiplier=1e6)
    slack = float((g @ weights)[1] + tolerance)  # update . g_r >= -tolerance
    assert weights[0] == 1
    assert weights[1] >= 0
    if g[1, 1] == 0:
        assert weights[1] == 0
    elif weights[1] < 1e6:
        rounding = 1e-9 * (1 + float(g.abs().max()) + abs(tolerance))
        assert slack >= -rounding
        assert float(weights[1]) * slack <= rounding * (1 + float(weights[1]))  # complementary slackness
        nearest = j[0] + float(weights[1]) * j[1]
        for trial in (
            j[0] * 0.5,
            j[1] * 3.0,
            nearest + j[1],
            nearest - 0.1 * j[0],
        ):  # the projection inequality
            if trial @ j[1] >= -tolerance:
                assert (j[0] - nearest) @ (trial - nearest) <= rounding * (1 + float(weights[1])) * 10


@FAST
@given(TRIPLES, st.floats(-1, 1), st.floats(0.5, 5))
def test_several_protected_solve_the_bounded_dual(j: np.ndarray, tolerance: float, most: float) -> None:
    g = gram(j)
    weights = one_sided(g, tolerance, max_multiplier=most, protected=(1, 2))
    gradient = (g @ weights + tolerance)[1:]  # of 1/2 |sum w_i g_i|^2 + tolerance * sum of multipliers
    rounding = 1e-5 * (1 + float(g.abs().max()))
    assert weights[0] == 1
    for multiplier, slope, square in zip(weights[1:], gradient, g.diagonal()[1:], strict=True):
        assert -1e-12 <= multiplier <= most + 1e-12
        if square == 0:
            assert multiplier == 0
            continue
        length = float(square) ** 0.5
        assert multiplier * length > most * length - 1e-9 or slope / length >= -rounding
        assert multiplier * length < 1e-9 or slope / length <= rounding


@pytest.mark.parametrize("tolerance", [-2.0, -0.3, 0.0, 0.3, 2.0])
def test_tolerance_has_the_sign_of_the_dual_optimum(tolerance: float) -> None:
    """The multiplier maximises the dual of: min 1/2|d - g_f|^2 with R allowed to rise at most at rate tolerance."""
    for j in jacobians(2, 10):
        a = gram(j)

        def dual(m: np.ndarray, a: Tensor = a) -> float:
            return float(0.5 * m[0] ** 2 * a[1, 1] + m[0] * (a[0, 1] + tolerance))

        best = minimize(dual, [0.5], bounds=[(0, None)], method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-12})
        weights = one_sided(a, tolerance)
        assert weights[1] == pytest.approx(best.x[0], abs=1e-5)
        rise = -float((a @ weights)[1])  # of R, to first order, per unit of rate
        assert rise <= tolerance + 1e-9


def test_tolerance_by_hand() -> None:
    opposed = torch.tensor([[4.0, -2.0], [-2.0, 2.0]], dtype=torch.float64)
    assert one_sided(opposed)[1] == 1.0  # -b / c
    assert one_sided(opposed, 1.0)[1] == 0.5  # allows R to rise at rate 1
    assert one_sided(opposed, 5.0)[1] == 0.0
    assert one_sided(opposed, -2.0)[1] == 2.0  # demands that R falls at rate 2
    assert one_sided(opposed, -2.0, max_multiplier=1.5)[1] == 1.5
    assert torch.equal(one_sided(opposed, protected=0), torch.tensor([0.5, 1.0], dtype=torch.float64))


def test_one_sided_beside_a_vanishing_retain_gradient() -> None:
    g = torch.tensor([[1.0, -1e-12], [-1e-12, 1e-24]], dtype=torch.float64)
    assert one_sided(g)[1] == 100.0
    assert one_sided(g, max_multiplier=float("inf"))[1] == pytest.approx(1e12)
    assert one_sided(torch.diag(torch.tensor([1.0, 1e-200], dtype=torch.float64)), -1.0)[1] == 100.0


def test_several_protected_equal_one_when_the_others_agree() -> None:
    j = torch.tensor([[1.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 5.0]], dtype=torch.float64)
    assert torch.allclose(one_sided(gram(j), protected=(1, 2)), torch.tensor([1.0, 1.0, 0.0]).double())


# ---- closed forms -----------------------------------------------------------------------------------------


def test_two_objectives_have_their_closed_forms() -> None:
    for j in jacobians(2, 20):
        a, b, c = (float(x) for x in (j[0] @ j[0], j[0] @ j[1], j[1] @ j[1]))
        projected = [1 - min(b, 0) / a, 1 - min(b, 0) / c]
        m = [(a + b) / 2, (b + c) / 2]
        cosine = b / (a * c) ** 0.5
        first = min(max((c - b) / (a + c - 2 * b), 0), 1)
        expected = {
            "pcgrad": projected,
            "upgrad": [w / 2 for w in projected],
            "dual_proj": [0.5 - min(m[0], 0) / a, 0.5 - min(m[1], 0) / c],
            "mgda": [first, 1 - first],
            "imtl_g": [c**0.5 / (a**0.5 + c**0.5), a**0.5 / (a**0.5 + c**0.5)],
            "nash": [1 / (a * (1 + cosine)) ** 0.5, 1 / (c * (1 + cosine)) ** 0.5],
        }
        for name, weights in expected.items():
            assert RULES[name](gram(j)).tolist() == pytest.approx(weights, rel=1e-8), name


def test_general_code_equals_the_two_objective_forms() -> None:
    """A third gradient that changes nothing sends the same problem through the code for n > 2."""
    for j in jacobians(2, 10):
        j[1] += 0.5 * j[0].norm() / j[1].norm() * j[1]
        wide = torch.cat([j, torch.zeros(2, 1).double()], 1)
        apart = torch.cat([wide, torch.zeros(1, wide.shape[1]).double()])
        apart[2, -1] = 1.0
        far = apart.clone()
        far[2, -1] = 1e4
        assert nash(gram(apart))[:2].tolist() == pytest.approx(nash(gram(j)).tolist(), rel=1e-8)
        # a gradient that is long and orthogonal takes a vanishing share of the shortest combination
        assert mgda(gram(far))[:2].tolist() == pytest.approx(mgda(gram(j)).tolist(), abs=1e-5)
        for name in ("upgrad", "dual_proj"):
            two = RULES[name](gram(j), torch.tensor([0.5, 0.5]))  # type: ignore[call-arg]
            three = RULES[name](gram(apart), torch.tensor([0.5, 0.5, 0.0]))  # type: ignore[call-arg]
            assert three[:2].tolist() == pytest.approx(two.tolist(), abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_nash_solves_its_equation(n: int) -> None:
    for j in jacobians(n, 10):
        weights = nash(gram(j))
        assert (weights > 0).all()
        assert torch.allclose(gram(j) @ weights * weights, torch.ones(n).double(), rtol=1e-8)
        assert (j.T @ weights).norm() == pytest.approx(n**0.5, rel=1e-8)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_mgda_is_the_shortest_combination(n: int) -> None:
    for j in jacobians(n, 20, spread=100.0):
        weights = mgda(gram(j))
        update = j.T @ weights
        assert weights.sum() == pytest.approx(1)
        assert (weights >= 0).all()
        assert (j @ update >= update @ update * (1 - 1e-6) - 1e-9).all()


@pytest.mark.parametrize("n", [2, 3, 5])
def test_cagrad_has_no_duality_gap(n: int) -> None:
    """The update is feasible, and its worst-off gain equals the dual bound of its own combination."""
    for j in jacobians(n, 20):
        mean = j.mean(0)
        update = j.T @ cagrad(gram(j), 0.5)
        radius = 0.5 * mean.norm()
        assert (update - mean).norm() <= radius * (1 + 1e-9)
        combination = (update - mean) / radius  # g_w / |g_w|
        w = torch.linalg.lstsq(j.T, combination[:, None]).solution[:, 0]
        g_w = j.T @ (w / w.sum())
        assert (j @ update).min() == pytest.approx(float(g_w @ mean + radius * g_w.norm()), rel=1e-6)


def test_cagrad_at_stationary_points() -> None:
    j = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(j.T @ cagrad(gram(j)), torch.tensor([1 / 3, 0.0]).double())  # harmless, so not zero
    short = torch.tensor([[1.0], [-0.5]], dtype=torch.float64)  # d = 0 lies outside the ball: somebody is harmed
    assert float((short.T @ cagrad(gram(short), 0.4))[0]) == pytest.approx(0.25 * 0.6)
    assert torch.equal(cagrad(gram(j), 0.0), torch.full((3,), 1 / 3, dtype=torch.float64))


# ---- degenerate inputs and properties ---------------------------------------------------------------------

DEGENERATE = {
    "zero": [[0.0, 0.0, 0.0]] * 2,
    "zero retain": [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]],
    "zero forget": [[0.0, 0.0, 0.0], [1.0, 2.0, 0.0]],
    "parallel": [[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]],
    "equal": [[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]],
    "opposed": [[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0]],
    "opposed, unequal": [[1.0, 2.0, 0.0], [-3.0, -6.0, 0.0]],
    "three opposed": [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]],
    "three parallel": [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]],
    "three around zero": [[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]],
    "three, one zero": [[1.0, 0.0], [0.0, 0.0], [-1.0, 0.5]],
    "three zero": [[0.0, 0.0]] * 3,
}


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1.0, 1e6])
@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", RULES)
def test_no_input_gives_a_nan(name: str, case: str, scale: float) -> None:
    j = torch.tensor(DEGENERATE[case], dtype=torch.float64) * scale
    weights = RULES[name](gram(j))
    assert weights.dtype == torch.float64
    assert weights.shape == (len(j),)
    assert torch.isfinite(weights).all()
    if name != "nash":  # whose update has norm sqrt(n) at any scale
        assert (j.T @ weights).norm() <= 4 * len(j) * j.norm()


@pytest.mark.parametrize("name", ["upgrad", "dual_proj", "mgda", "imtl_g", "pcgrad", "aligned", "one_sided"])
def test_opposed_gradients_cancel(name: str) -> None:
    j = torch.tensor(DEGENERATE["opposed"], dtype=torch.float64)
    assert (j.T @ RULES[name](gram(j))).norm() < 1e-6


@FAST
@given(TRIPLES)
def test_no_direction_of_the_cone_rules_harms(j: np.ndarray) -> None:
    g = gram(j)
    lengths = g.diagonal().sqrt()
    for rule in (upgrad, dual_proj, mgda):
        assert (g @ rule(g) >= -1e-5 * lengths * lengths.max() - 1e-12).all()


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_symmetric_rules_do_not_see_the_order(name: str, n: int) -> None:
    for j in jacobians(n, 8):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
        assert torch.allclose(RULES[name](gram(j[order])), RULES[name](gram(j))[order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_scale(name: str) -> None:
    for j in jacobians(3, 5):
        for factor in (1e-30, 1e-6, 1e6):
            expected = RULES[name](gram(j)) / (factor if name == "nash" else 1.0)
            assert torch.allclose(RULES[name](gram(j * factor)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["pcgrad", "upgrad", "dual_proj", "mgda", "imtl_g", "aligned"])
def test_one_objective_alone_is_followed(name: str) -> None:
    assert RULES[name](torch.tensor([[4.0]]).double()).item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", RULES)
def test_input_and_global_state_are_left_alone(name: str) -> None:
    g = gram(jacobians(3, 1)[0])
    before, state = g.clone(), torch.get_rng_state()
    RULES[name](g)
    assert torch.equal(g, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_pcgrad_generator() -> None:
    g = gram(jacobians(4, 2)[1])
    first, again = (pcgrad(g, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


BAD: list[tuple[str, Callable[[], Tensor]]] = [
    ("gramian", lambda: upgrad(torch.eye(2))),
    ("gramian", lambda: upgrad(torch.zeros(2, 3).double())),
    ("gramian", lambda: upgrad(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]).double())),
    ("gramian", lambda: upgrad(torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double())),
    ("gramian", lambda: upgrad(torch.tensor([[1.0, 0.5], [-0.5, 1.0]]).double())),
    ("gramian", lambda: upgrad([[1.0]])),  # type: ignore[arg-type]
    ("tolerance", lambda: one_sided(torch.eye(2).double(), float("nan"))),
    ("max_multiplier", lambda: one_sided(torch.eye(2).double(), max_multiplier=0.0)),
    ("protected", lambda: one_sided(torch.eye(2).double(), protected=2)),
    ("protected", lambda: one_sided(torch.eye(1).double())),
    ("order", lambda: pcgrad(torch.eye(2).double(), [0, 0])),
    ("order", lambda: pcgrad(torch.eye(3).double(), [[0, 1, 2]])),
    ("preference", lambda: upgrad(torch.eye(2).double(), [1.0])),
    ("preference", lambda: dual_proj(torch.eye(2).double(), [1.0, -1.0])),
    ("c is", lambda: cagrad(torch.eye(2).double(), -0.1)),
    ("scale", lambda: aligned(torch.eye(2).double(), scale="max")),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("parameter", "call"), BAD)
def test_bad_input_names_parameter_and_range(parameter: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=rf"^{parameter}.*expected"):
        call()
