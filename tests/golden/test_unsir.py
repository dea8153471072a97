"""UNSIR (arXiv:2111.08947) beside the cells of the authors' notebook, and what it asks of a request.

The numbers were computed by the cells "Training the Noise", "Impair Step" and "Repair Step" of vikram2000b/Fast-Machine-
Unlearning on the network below, in float64, from the noise below; images have as many channels as the batch has images,
since the notebook mistakes the one for the other. 80 noise images and 20 retain images make one batch.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import expunge as ex
from expunge import learnt_inputs, methods
from expunge.core import Key, Refused
from tests.golden.by_hand import ALL, whole
from tests.golden.forgetting import accuracy, digits, small

torch.set_num_threads(1)
TASK = ex.Classification(3)
NOISE = (4.2739489855814385, 2.490353714457178)
IMPAIRED = [7.7841554897012095, 1.8749032973100481, 1.4746359890282723, 0.7504641656001231]
REPAIRED = [7.78302021630118, 1.8734920728884201, 1.4624258371660839, 0.7439185068870457]


def setting() -> tuple[nn.Module, ex.Request, Tensor]:
    """A network of 36 inputs, 30 images of three classes of which the first goes, and four noise images to start from."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, y = normal(30, 4, 3, 3), torch.arange(30) % 3
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(normal(*p.shape) * 0.5)
    return net, ex.split((x, y), forget="label == 0"), normal(4, 4, 3, 3)


def test_noise_impair_and_repair_are_those_of_the_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    net, request, start = setting()
    monkeypatch.setattr(learnt_inputs, "fresh", lambda _like, _count, _key: start.clone())
    seen: list[Tensor] = []

    def call(model: nn.Module, batch: ex.core.Batch) -> Tensor:
        seen.append(batch["x"].detach().clone())
        return model(batch["x"])

    for repair_steps, expected in ((0, IMPAIRED), (1, REPAIRED)):
        stage = methods.unsir(noise=4, share=0.8, steps=1, repair_steps=repair_steps, batch=ALL)
        done = ex.unlearn(net, request, task=ex.Classification(3, call=call), method=stage)
        assert [float(p.detach().norm()) for p in done.model.parameters()] == pytest.approx(expected, rel=1e-9)
    last = [x for x in seen if len(x) == 4][-1]
    assert (float(last.norm()), float(last.sum())) == pytest.approx(NOISE, rel=1e-9)


def test_each_class_has_its_own_noise_under_its_own_name() -> None:
    """Two classes at once are learnt as each alone; the notebook would label both 0."""
    net, request, _ = setting()
    x, y = (torch.cat([whole(part)[i] for part in (request.data("forget"), request.data("retain"))]) for i in (0, 1))
    both = ex.split((x, y), forget="y in [0, 2]")
    seen: list[tuple[Tensor, Tensor]] = []

    class Looking(ex.Classification):
        """Keeps what is judged."""

        def nll(self, model: nn.Module, batch: ex.core.Batch) -> Tensor:
            if len(batch["id"]) == 6:
                seen.append((batch["x"].detach().clone(), batch["y"]))
            return super().nll(model, batch)

    stage = methods.unsir(noise=6, steps=1, repair_steps=0, batch=ALL)
    ex.unlearn(net, both, task=Looking(3), method=stage)
    start, (made, labels) = seen[0][0], seen[-1]
    assert labels.sort().values.tolist() == [0, 0, 0, 2, 2, 2]
    for label in (0, 2):
        noise = nn.Parameter(start[seen[0][1] == label].clone())
        optimizer = torch.optim.Adam([noise], 0.1)
        for _ in range(40):
            loss = -nn.functional.cross_entropy(net(noise), torch.full((3,), label))
            loss = loss + 0.1 * noise.square().sum((1, 2, 3)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = made[labels == label]
        assert float(torch.cdist(noise.detach().flatten(1), found.flatten(1)).amin(1).max()) < 1e-6


def test_learning_the_noise_leaves_the_model_alone() -> None:
    net, request, _ = setting()
    stage = methods.unsir(share=0.0, steps=1, lr=1e-12, repair_steps=0)
    done = ex.unlearn(net, request, task=TASK, method=stage)
    for old, new in zip(net.parameters(), done.model.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=1e-11)
    assert done.case is not None
    assert type(done.case.model) is nn.Sequential
    assert "noise" not in done.case.request.extra


def test_forget_images_are_never_read() -> None:
    model, request = digits(3)
    seen: list[int] = []

    def call(net: nn.Module, batch: ex.core.Batch) -> Tensor:
        if torch.is_grad_enabled() and len(batch["id"]) != 7:
            seen.extend(batch["id"].tolist())
        return net(batch["x"])

    stage = methods.unsir(noise=7, steps=2, repair_steps=2, batch=32)
    ex.unlearn(model, request, task=ex.Classification(10, call=call), method=stage)
    assert len(seen) == 4 * 32
    assert not set(seen) & set(request.data("forget").ids.tolist())


def test_part_of_a_class_and_inputs_that_cannot_be_learnt_are_refused() -> None:
    model, request = small()
    with pytest.raises(Refused, match="forgets whole classes, and examples of class 0"):
        ex.unlearn(model, request, task=TASK, method="unsir")
    net, request, _ = setting()
    both = ex.split((whole(request.data("retain"))[0], torch.arange(20) % 3), forget="y in [0, 1]")
    with pytest.raises(Refused, match="1 inputs are to be learnt for 2 classes"):
        ex.unlearn(net, both, task=TASK, method=methods.unsir(noise=1))
    with pytest.raises(Refused, match="expected floating numbers"):
        learnt_inputs.fresh(torch.zeros(1, 3, dtype=torch.int64), 2, Key(0))


@pytest.mark.parametrize("label", [3, 8])
def test_a_class_is_forgotten_and_the_rest_stays(label: int) -> None:
    model, request = digits(label)
    done = ex.unlearn(model, request, task=ex.Classification(10), method="unsir")
    assert accuracy(model, request.forget) > 0.9
    assert accuracy(done.model, request.forget) < 0.3
    assert accuracy(done.model, request.retain) > accuracy(model, request.retain) - 0.05
