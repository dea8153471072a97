"""The sparse dictionary, and steering with it: what is suppressed comes back, what was never learnt does not."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge.attacks import steering
from expunge.attacks.restoration import restoration, restoration_as_published
from expunge.attacks.sae import TopKSAE, class_latents, explained, pooled_codes, train_sae
from expunge.attacks.steering import Plan, Splice, Steering, Target, plan_of
from expunge.audit import report, words
from expunge.audit.layers import Layer, activations, changed, find_layers, trunk
from expunge.audit.subject import Cache, Subject
from expunge.core import Key, Refused
from expunge.data.sources import as_data
from expunge.registry import is_asked, measures
from tests.conftest import GlobalRandomness
from tests.fixtures import Recipe, Tiny, retrained, tiny

CACHE = Cache()  # one autoencoder for the whole file


@functools.cache
def original() -> nn.Module:
    return tiny("classification").model


def subject(after: nn.Module, **changes: object) -> Subject:
    case = tiny("classification")
    family = tuple(retrained("classification", seed=seed) for seed in range(3))
    made = Subject(original(), after, case.request, case.task, case.test, family, cache=CACHE)
    return replace(made, **changes)


def suppressed() -> nn.Module:
    """The original, less the six units below the head that say most of class 3: the layers above are untouched."""
    case = tiny("classification")
    means = [
        case.model[:7](next(iter(data.batches(100)))["x"]).mean(0)
        for data in (case.request.forget, case.request.retain)
    ]
    units = (means[0] - means[1]).topk(6).indices
    with torch.no_grad():
        case.model[5].weight[units], case.model[5].bias[units] = 0.0, 0.0
    return case.model


def random_model() -> nn.Module:
    return tiny("classification").make(3).eval()


# ---- the dictionary


def planted(n: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n, 12] of two of 8 directions each, at a point that is not 0; and the directions."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(8, 12))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = np.zeros((n, 8))
    for row in codes:
        row[rng.choice(8, 2, replace=False)] = rng.uniform(1, 2, 2)
    return (codes @ atoms * 5 + 3).astype(np.float32), atoms


def test_planted_directions_are_found(poisoned_randomness: GlobalRandomness) -> None:
    tokens, atoms = planted()
    sae = train_sae(tokens, latents=16, k=2, key=Key(1), steps=600, lr=1e-2)
    near = np.abs(sae.dictionary.numpy() @ atoms.T).max(0)
    assert (near > 0.95).sum() >= 7
    assert explained(sae, tokens) > 0.9
    assert not sae.training
    assert not any(parameter.requires_grad for parameter in sae.parameters())


def test_architecture() -> None:
    sae = TopKSAE(torch.arange(6.0), 2.5, 9, 3, Key(2))
    assert torch.equal(sae.encoder, sae.directions)
    torch.testing.assert_close(sae.dictionary.norm(dim=1), torch.ones(9))
    tokens = torch.randn(4, 5, 6, generator=Key(3).generator())
    codes = sae.encode(tokens)
    assert codes.shape == (4, 5, 9)
    assert int((codes > 0).sum(-1).max()) <= 3
    assert bool((codes >= 0).all())
    linear = sae.linear(tokens)
    torch.testing.assert_close(linear, (tokens / 2.5 - sae.pre_bias) @ sae.encoder.T)
    assert torch.equal(codes[codes > 0], linear[codes > 0])
    torch.testing.assert_close(sae.decode(torch.zeros(1, 9)), torch.arange(6.0)[None])
    with torch.no_grad():
        sae.directions.mul_(7.0)
    torch.testing.assert_close(sae.dictionary.norm(dim=1), torch.ones(9))


def test_training_depends_on_the_key_only() -> None:
    tokens, _ = planted(300)
    one, same, other = (train_sae(tokens, latents=8, k=2, key=Key(seed), steps=30) for seed in (1, 1, 2))
    assert torch.equal(one.encoder, same.encoder)
    assert not torch.equal(one.encoder, other.encoder)
    near = train_sae(1000 * tokens, latents=8, k=2, key=Key(1), steps=30)
    assert explained(near, 1000 * tokens) == pytest.approx(explained(one, tokens), abs=0.01)  # whatever the scale


def test_latents_of_a_class_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    codes = np.array([[1, 0, 5, 0], [3, 0, 5, 0], [0, 4, 5, 0], [0, 6, 5, 0], [0, 0, 5, 1], [0, 1, 5, 0]], float)
    found, scores = class_latents(codes, labels, 1, 4)
    spread = np.sqrt((2 * 1.0 + 4 * np.var([0, 0, 0, 1])) / 6)
    assert found.tolist() == [1]
    assert scores[0] == pytest.approx((5 - 0.25) / spread)
    assert class_latents(codes, labels, 0, 1)[0].tolist() == [0]


def test_bad_dictionaries_are_refused() -> None:
    tokens, _ = planted(50)
    for broken, said in (
        (np.full((9, 3), np.nan), "finite"),
        (np.ones((9, 3)), "do not vary"),
        (np.ones(9), "finite activations"),
    ):
        with pytest.raises(Refused, match=said):
            train_sae(broken, latents=4, k=2)
    with pytest.raises(Refused, match="k in"):
        train_sae(tokens, latents=4, k=5)
    with pytest.raises(Refused, match="class 9"):
        class_latents(np.ones((3, 2)), np.array([0, 1, 1]), 9, 1)


# ---- pushes


@pytest.mark.parametrize(
    ("shape", "layer"),
    [((4, 6), Layer("x")), ((4, 5, 6), Layer("x")), ((4, 6, 3, 2), Layer("x", channels=1))],
)
def test_steering_moves_codes_by_hand(shape: tuple[int, ...], layer: Layer) -> None:
    """Any kind of activation: h + sum_j strength (level_j - code_j) d_j, token by token."""
    sae = TopKSAE(torch.zeros(6), 2.0, 9, 3, Key(2)).requires_grad_(False)
    value = torch.randn(shape, generator=Key(4).generator())
    positions = value.numel() // 24
    experts, level = torch.tensor([7, 2]), torch.rand(positions, 2, generator=Key(5).generator())
    moved = Steering(sae, layer, experts, level, 1.5)(value)
    assert moved.shape == value.shape
    for example in range(4):
        for place in range(positions):
            token, found = (
                part[example].reshape(6, -1)[:, place] if part.ndim == 4 else part[example].reshape(-1, 6)[place]
                for part in (value, moved)
            )
            code = sae.encode(token[None])[0, experts]
            wanted = (
                token + 1.5 * sum((level[place, j] - code[j]) * sae.dictionary[e] for j, e in enumerate(experts)) * 2.0
            )
            torch.testing.assert_close(found, wanted)
    assert torch.equal(Steering(sae, layer, experts, level, 0.0)(value), value)


def test_random_pushes_are_as_long() -> None:
    sae = TopKSAE(torch.zeros(6), 2.0, 9, 3, Key(2)).requires_grad_(False)
    value = torch.randn(4, 5, 6, generator=Key(4).generator())
    experts, level = torch.tensor([7, 2]), torch.ones(1, 2)
    push = Steering(sae, Layer("x"), experts, level)(value) - value
    way = torch.tensor([0, 1]), torch.tensor([0.3, 0.8])
    other = Steering(sae, Layer("x"), experts, level, 1.0, way)(value) - value
    torch.testing.assert_close(push.norm(dim=-1), other.norm(dim=-1))
    along = 0.3 * sae.dictionary[0] + 0.8 * sae.dictionary[1]
    torch.testing.assert_close(other[1, 2] / other[1, 2].norm(), along / along.norm())


def splice(value: Tensor, layer: Layer, theirs: Tensor, strength: float) -> tuple[TopKSAE, Tensor]:
    sae = TopKSAE(torch.zeros(6), 1.0, 9, 3, Key(2)).requires_grad_(False)
    data = tiny("classification").request.forget
    target = Target(3, data, torch.tensor([7, 2]), torch.ones(1, 2))
    plan = Plan(layer, 1.0, sae, 1.0, (target,), (), data)
    hook = Splice(plan, target, theirs, strength)
    return sae, torch.cat([hook(value[:3]), hook(value[3:])])


def test_published_splice_by_hand() -> None:
    """Class token taken over whole; the others' experts mixed among dense codes, and decoded."""
    value, theirs = (torch.randn(4, 5, 6, generator=Key(seed).generator()) for seed in (6, 7))
    sae, found = splice(value, Layer("x"), theirs, 5.0)
    torch.testing.assert_close(found[:, 0], value[:, 0] + 5 * (theirs[:, 0] - value[:, 0]))
    ours, original_codes = value @ sae.encoder.T, theirs @ sae.encoder.T
    ours[..., [2, 7]] += 5 * (original_codes - ours)[..., [2, 7]]
    torch.testing.assert_close(found[:, 1:], (ours @ sae.dictionary)[:, 1:])
    sae, pixels = splice(value.transpose(1, 2)[..., None], Layer("x", channels=1), theirs, 5.0)
    torch.testing.assert_close(pixels[..., 0].transpose(1, 2), ours @ sae.dictionary)


# ---- readings


def test_both_are_asked_for_and_have_titles() -> None:
    for name in ("restoration", "restoration_as_published"):
        assert name in measures()
        assert is_asked(name)
        assert name in words.TITLES


def test_a_suppressed_class_is_restored_and_a_deleted_one_is_not(poisoned_randomness: GlobalRandomness) -> None:
    hidden, gone = (restoration(subject(model)) for model in (suppressed(), retrained("classification", seed=1)))
    assert hidden.detail["before"] == gone.detail["before"] == 0.0
    assert hidden.low > 0.8
    assert hidden.detail["false"] < 0.25
    assert hidden.detail["random"] < 0.1
    assert hidden.detail["other_class"] < 0.1
    assert gone.value == 0.0
    assert gone.high < 0.1
    assert hidden.low <= hidden.value <= hidden.high
    assert hidden.n == 60
    assert hidden.detail["net"] == hidden.value - hidden.detail["false"]


def test_the_original_lost_nothing() -> None:
    reading = restoration(subject(original()))
    assert reading.detail["before"] == 1.0
    assert reading.value >= 0.95
    assert reading.detail["explained"] > 0.9


def test_a_model_that_knows_nothing_gives_itself_away() -> None:
    """What the rate alone would call restored: every input is turned into the class, kept ones alike."""
    reading = restoration(subject(random_model()))
    assert reading.value > 0.9
    assert reading.detail["false"] > 0.9
    assert reading.detail["net"] < 0.25


def test_a_zeroed_head_row_is_partly_restored() -> None:
    """Its logit is 0 whatever happens below: steering lowers the others, and more examples go to the class."""
    model = tiny("classification").model
    with torch.no_grad():
        model[7].weight[3], model[7].bias[3] = 0.0, 0.0
    reading = restoration(subject(model))
    assert reading.value > reading.detail["before"] + 0.1


def test_as_published() -> None:
    """Splicing the original's own codes at the last layer brings the original back, in a suppressed model."""
    hidden = restoration_as_published(subject(suppressed()))
    gone = restoration_as_published(subject(retrained("classification", seed=1)))
    assert hidden.detail["before"] == 0.0
    assert hidden.value > 0.75
    assert gone.value == 0.0
    assert hidden.curves["restored"][0] == (0.0, 1.0, 5.0, 10.0)
    same = restoration_as_published(subject(original()))
    assert same.value > 0.75  # not 1: the reconstruction's own error


def test_the_code_comes_from_other_examples() -> None:
    """Judged examples are not those that the averages are from; without unseen ones, half of the forget examples."""
    made = subject(original())
    plan = plan_of(made)
    assert not set(plan.targets[0].judge.ids.tolist()) & set(made.ids("forget").tolist())
    alone = plan_of(subject(original(), test=None, request=replace(made.request, valid=None), cache=Cache()))
    assert len(alone.targets[0].judge) == 10
    tokens = activations(original(), made.task, made.data("forget"), [plan.layer], pool="none")[0]
    wanted = plan.sae.encode(torch.from_numpy(tokens)).mean(0)[:, plan.targets[0].experts]
    torch.testing.assert_close(plan.targets[0].level, wanted)
    assert pooled_codes(plan.sae, tokens).shape == (20, len(plan.sae.latent_bias))


def test_readings_leave_the_model_as_it_was() -> None:
    model = suppressed().train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    restoration(subject(model))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_none_where_it_does_not_apply() -> None:
    case = tiny("classification", "random")
    by_chance = Subject(case.model, case.model, case.request, case.task, case.test)
    regression = tiny("regression")
    other = Subject(regression.model, regression.model, regression.request, regression.task)
    for measure in (restoration, restoration_as_published):
        assert measure(by_chance) is None
        assert measure(other) is None
    wrong = tiny("classification").model
    with torch.no_grad():
        wrong[7].bias[3] = -1000.0
    assert restoration(subject(wrong, before=wrong, cache=Cache())) is None


def test_convolutional_layers_are_steered_pixel_by_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "DEPTH", 0.2)
    made = subject(original(), cache=Cache())
    plan = plan_of(made)
    assert (str(plan.layer), plan.layer.channels) == ("1", 1)
    assert plan.targets[0].level.shape[0] == 36
    batch = next(iter(made.data("forget").batches(5)))
    push = Steering(plan.sae, plan.layer, plan.targets[0].experts, plan.targets[0].level, 0.0)
    with torch.no_grad(), changed(original(), plan.layer, push):
        steered = original()(batch["x"])
    assert torch.equal(steered, original()(batch["x"]).detach())


class Reader(nn.Module):
    """A transformer that reads an image row by row, after a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Linear(8, 24), nn.Parameter(torch.randn(1, 9, 24) / 5)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(24, 2, 32, 0.1, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.pad(self.embed(x.squeeze(1)), (0, 0, 1, 0)) + self.first
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden)[:, 0])


def test_tokens_of_a_transformer_are_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model, with its class token, between its blocks: the original keeps what it has."""
    case = tiny("classification")
    train = as_data({"x": _joined(case, "x"), "y": _joined(case, "y")})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Recipe(3e-3, 80, 50, 0.05)(Reader(), case.task, train)
    layers = find_layers(model, case.task, case.request.forget)
    assert [str(layer) for layer in trunk(model, layers)] == ["blocks.0", "blocks.1", "input of head"]
    made = Subject(model, model, case.request, case.task, case.test)
    plan = plan_of(made)
    assert str(plan.layer) == "input of head"
    monkeypatch.setattr(steering, "DEPTH", 0.5)
    made = replace(made, cache=Cache())
    plan = plan_of(made)
    assert str(plan.layer) == "blocks.1"
    assert plan.targets[0].level.shape[0] == 9
    assert plan.explained > 0.5
    kept, spliced = restoration(made), restoration_as_published(made)
    assert kept.detail["before"] == spliced.detail["before"] == 1.0
    assert kept.value > 0.8
    assert kept.curves["false"][0] == (0.0, 1.0, 5.0, 10.0)
    assert 0.0 <= spliced.value <= 1.5


def _joined(case: Tiny, name: str) -> Tensor:
    return torch.cat([batch[name] for data in (case.request.forget, case.request.retain) for batch in data.batches(99)])


def test_in_a_report_beside_retrained_models() -> None:
    found = report.audit(subject(suppressed()), also=("restoration",))
    reading = found.row("unlearned").readings["restoration"]
    assert reading.verdict == "outside"
    assert reading.reference[1] < 0.6
    assert found.row("original").readings["restoration"].value > 0.9
    assert "restoration_as_published" not in found.row("unlearned").readings
