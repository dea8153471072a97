"""How reference models are trained, and what tells one way of training from another.

Two ways: the user's own function ``(data, seed) -> model``, and a ``Recipe`` for a network that `make` builds. The source
of the user's code is part of the identity of what it trains, so that a change of the code is never answered from a cache.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import inspect
import re
import textwrap
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge import runtime
from expunge.core import Data, Key, Refused, RunFailed, Task, described, own_streams
from expunge.data.builtin import Recipe, fresh, train_counted
from expunge.data.sources import fingerprint
from expunge.version import __version__
from expunge.weights import hash_tensors, tensors_of

Train = Callable[[Data, int], nn.Module]


@dataclass(frozen=True)
class Trainer:
    """A way to train a model from scratch.

    Args:
        how: the user's function ``(data, seed) -> model``, or a ``Recipe`` for what `make` builds.
        make: builds an untrained network, or is a model of the architecture; weights are read back into it.
        task: the modality.
        recipe: anything that the user wants to tell apart and that the source does not show (see ``source_of``).
    """

    how: Train | Recipe
    make: Callable[[], nn.Module] | nn.Module = field(repr=False)
    task: Task
    recipe: str = ""

    def __post_init__(self) -> None:
        if not callable(self.make) or not isinstance(self.blank(), nn.Module):
            found = type(self.make if not callable(self.make) else self.blank()).__name__
            raise Refused(
                f"make is or gives a {found}: expected a function that builds an untrained network, or a model of the "
                f"architecture, to read weights into"
            )
        if isinstance(self.how, Recipe):
            if isinstance(self.make, nn.Module):
                raise Refused("a Recipe needs make as a function that builds an untrained network, found a model")
            return
        if not callable(self.how) or isinstance(self.how, nn.Module):
            raise Refused(
                f"train is a {type(self.how).__name__}: expected a function (data, seed) -> model, or a Recipe"
            )
        try:
            inspect.signature(self.how).bind(None, 0)
        except TypeError as error:
            raise Refused(f"the training function cannot be called with (data, seed): {error}") from error
        except ValueError:  # of a function without a signature nothing is known
            pass

    def identity(self) -> dict[str, str]:
        """What makes two trained models, of the same data and seed, the same; JSON-able."""
        if not isinstance(self.how, Recipe):
            return {"train": name_of(self.how), "source": source_of(self.how), "said": self.recipe}
        settings = ", ".join(f"{name}={value!r}" for name, value in asdict(self.how).items())
        return {
            "train": f"expunge {__version__} Recipe({settings})",
            "source": source_of(self.make),
            "task": described(self.task),
            "said": self.recipe,
        }

    def blank(self) -> nn.Module:
        """A model of the architecture, for weights to be read into."""
        return copy.deepcopy(self.make) if isinstance(self.make, nn.Module) else fresh(self.make, 0)

    def trained(self, data: Data, seed: int) -> tuple[nn.Module, dict[str, float]]:
        """A model trained on `data`, in eval mode, and its cost; the global random streams are put back afterwards.

        Raises:
            RunFailed: where the user's function raises, or returns no finite model of the architecture.
        """
        if isinstance(self.how, Recipe):
            model, cost = train_counted(self.make, data, self.task, seed, self.how)
        else:
            start = time.perf_counter()
            with own_streams(Key(seed).at("train").seed):
                model = self.how(data, seed)
            cost = {"seconds": time.perf_counter() - start}
        self._check(model)
        return model.eval(), cost

    def _check(self, model: Any) -> None:
        if not isinstance(model, nn.Module):
            raise RunFailed(f"the training function returned a {type(model).__name__}: expected a torch.nn.Module")
        shapes, wanted = ({n: tuple(t.shape) for n, t in tensors_of(m).items()} for m in (model, self.blank()))
        odd = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
        if odd:
            raise RunFailed(
                f"the trained model is of another architecture than make gives: {odd[0]} has shape "
                f"{shapes.get(odd[0], 'none')}, expected {wanted.get(odd[0], 'none')}"
            )
        for name, value in tensors_of(model).items():
            if value.is_floating_point() and not runtime.finite([value]):
                raise RunFailed(f"the trained model's {name!r} has entries that are not finite: its training diverged")


def name_of(function: Any) -> str:
    """The qualified name of a function or of the type of a callable object."""
    function = inspect.unwrap(function) if callable(function) else function
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def source_of(function: Any) -> str:
    """What a function's behaviour depends on, as far as it can be seen: 32 hexadecimal digits.

    Seen: its source without comments and layout (its byte code where there is no source), its defaults, the values that
    it closes over, the arguments of a ``partial``, the fields of a callable dataclass; of the global names that it uses
    plain values, tensors and arrays, and, followed in the same way, functions and classes of the same module.

    Not seen: code of other modules and packages and their versions, files and environment variables that are read,
    attributes of other objects. Give a `recipe` string that changes with those, or another folder.
    """
    return hashlib.blake2b(repr(_seen(function)).encode(), digest_size=16).hexdigest()


def _seen(root: Any) -> tuple[str, ...]:
    """Every part that counts, each object once, in an order that does not depend on the process."""
    found: list[str] = []
    known: set[int] = set()
    keep: list[Any] = []  # so that no identity is used twice

    def go(name: str, value: Any, home: str | None) -> None:
        value = inspect.unwrap(value) if callable(value) else value
        if id(value) in known and callable(value):
            return
        known.add(id(value))
        keep.append(value)
        text, parts = _parts(value, home)
        found.append(f"{name}={text}")
        inner = getattr(value, "__module__", None) if callable(value) else home
        for part, content in parts:
            go(part, content, inner)

    go("", root, None)
    return tuple(found)


def _parts(value: Any, home: str | None) -> tuple[str, list[tuple[str, Any]]]:
    """What is said of one value itself, and the values that it leads to. `home`: the module that may be followed."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value), []
    if isinstance(value, nn.Module):
        return f"{value} {hash_tensors(tensors_of(value))}", []
    if isinstance(value, Tensor):
        return hash_tensors({"": value}), []
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return hash_tensors({"": torch.from_numpy(np.ascontiguousarray(value).reshape(-1).view(np.uint8))}), []
    if isinstance(value, Data):
        return fingerprint(value), []
    if isinstance(value, Mapping):
        return "mapping", [(str(key), part) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [(str(place), part) for place, part in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return repr(sorted(map(repr, value))), []
    if isinstance(value, functools.partial):
        return "partial", [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, types.MethodType):
        return "method", [("self", value.__self__), ("func", value.__func__)]
    if isinstance(value, types.FunctionType):
        return _function(value, home)
    if isinstance(value, type):
        if value.__module__ != home:
            return f"{value.__module__}.{value.__qualname__}", []
        return _source(value), [(n, part) for n, part in vars(value).items() if isinstance(part, types.FunctionType)]
    if is_dataclass(value):
        return type(value).__qualname__, [(name, getattr(value, name)) for name in value.__dataclass_fields__]
    call = vars(type(value)).get("__call__")
    return type(value).__qualname__, [] if call is None else [("__call__", call)]


def _function(value: types.FunctionType, home: str | None) -> tuple[str, list[tuple[str, Any]]]:
    """Source, defaults, closure, and the globals that it names."""
    if home is not None and value.__module__ != home and value.__module__.partition(".")[0] in _LIBRARIES:
        return f"{value.__module__}.{value.__qualname__}", []
    parts: list[tuple[str, Any]] = [("defaults", value.__defaults__), ("keywords", value.__kwdefaults__)]
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        parts.append((name, _content(cell)))
    for name in sorted(set(_names(value.__code__))):
        if name in value.__globals__ and _followed(value.__globals__[name], value.__module__):
            parts.append((name, value.__globals__[name]))
    return _source(value), parts


_LIBRARIES = {"torch", "numpy", "expunge", "sklearn", "scipy"}


def _followed(value: Any, home: str) -> bool:
    """Whether a global is looked into: plain values, tensors and what is defined in the same module."""
    if callable(value):
        return getattr(value, "__module__", None) == home
    return isinstance(value, (bool, int, float, complex, str, bytes, tuple, list, dict, Tensor, np.ndarray, Recipe))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that a code object and those inside it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _source(value: Any) -> str:
    """Without comments and layout where that can be parsed; byte code where there is no source."""
    try:
        text = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):
        code = getattr(value, "__code__", None)
        return described(value) if code is None else _bytes(code)
    if getattr(value, "__name__", "") == "<lambda>":  # its line may hold several
        text = f"{text} {_bytes(value.__code__)}"
    try:
        return ast.unparse(ast.parse(text))
    except SyntaxError:  # a lambda in the middle of an expression
        return text


def _bytes(code: types.CodeType) -> str:
    constants = [_bytes(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", f"{code.co_code.hex()} {code.co_names} {constants}")
