"""Networks of the image suites: small ones without BatchNorm, and the ResNet-20 that CIFAR-10 papers report on."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.core import Refused
from expunge.data.formats import data_file, data_folder
from expunge.data.tables import first_line

WEIGHTS = "resnet20-12fca82f.th"


def small_network(channels: int = 3, side: int = 32, classes: int = 10, width: int = 16, stages: int = 3) -> nn.Module:
    """Convolutions that each halve the picture, then two linear layers of which the first has 64 outputs; no BatchNorm.

    Args:
        channels, side: of a picture, >= 1; `side` is halved `stages` times, rounded down.
        classes: outputs.
        width: channels of the first convolution; every later one has twice as many.
        stages: convolutions, >= 1.
    """
    layers: list[nn.Module] = []
    for stage in range(stages):
        inputs, outputs = (channels, width) if stage == 0 else (width if stage == 1 else 2 * width, 2 * width)
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        side //= 2
    features = (width if stages == 1 else 2 * width) * side * side
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, classes))


class Block(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm beside a shortcut that has no parameters.

    Where the picture is halved, the shortcut takes every other pixel and fills the new channels with zeros, half of them
    before and half after the old ones (option A of the paper).

    Args:
        inputs, outputs: channels.
        stride: 1 or 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """[b, inputs, h, w] -> [b, outputs, h / stride, w / stride]."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        before = self.added // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))
        return F.relu(inner + shortcut)


class ResNet(nn.Module):
    """The residual network for CIFAR-10 of arXiv:1512.03385, section 4.2, with 6 `blocks` + 2 layers.

    Names of the parameters are those of the weights that are published for it.

    Args:
        blocks: per stage; 3 is ResNet-20.
        classes: outputs.
    """

    def __init__(self, blocks: int = 3, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16)
        self.layer2 = _stage(blocks, 16, 32)
        self.layer3 = _stage(blocks, 32, 64)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, 32, 32] -> logits [b, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def _stage(blocks: int, inputs: int, outputs: int) -> nn.Sequential:
    first = Block(inputs, outputs, 1 if inputs == outputs else 2)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))


def pretrained_resnet20(path: str | Path | None = None) -> ResNet:
    """ResNet-20 with the weights that are published for it: 91.73 % of CIFAR-10's test pictures. In eval mode.

    They were trained on all 50,000 training pictures, with ImageNet's mean and deviation, as in the suite
    ``cifar10_resnet20``: no model that the suite's recipe gives is retrained in the way that this one was trained.

    Args:
        path: the file, ``weights/resnet20-12fca82f.th`` in the folder of EXPUNGE_DATA by default.

    Raises:
        Refused: for a file that is absent, would run code, or holds the weights of another network.
    """
    what = f"the pretrained CIFAR-10 ResNet-20 of akamaster/pytorch_resnet_cifar10 ({WEIGHTS})"
    found = data_file(data_folder("weights", what), [WEIGHTS], what) if path is None else Path(path)
    if not found.is_file():
        raise Refused(f"there is no file {found}: expected {what}")
    try:
        held = torch.load(found, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise Refused(f"{found} is no file of weights alone ({first_line(error)[:80]}): get {what} again") from error
    held = held.get("state_dict", held) if isinstance(held, dict) else {}
    network = ResNet()
    try:
        network.load_state_dict({name.removeprefix("module."): value for name, value in held.items()})
    except (RuntimeError, AttributeError) as error:
        raise Refused(f"{found} does not hold the weights of a ResNet-20: expected {what}") from error
    return network.eval()
