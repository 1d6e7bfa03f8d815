"""What tells one function or object of the user's from another, the same in every process: never an address."""

import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .functions import closed_over, gathers, is_of, names_in, sets_attributes, written_by
from .layer import SparseLayer
from .safefile import bytes_of

# Told by their names alone: a newer version of theirs is the same loss.
_LIBRARIES = (
    "torch",
    "numpy",
    "builtins",
    "functools",
    "math",
    "operator",
    __package__ or "sparsecore",
)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
_MOST = 1000  # entries of a container of settings
_MODULES_OWN = vars(nn.Module()).keys()  # every module has these: hooks, modes, dicts of parameters


def told_apart(value: Any) -> str:
    """A digest of a function, module or other value by what it computes with.

    A function is its code, its defaults, and the values that it takes from around it (closures; globals that are plain,
    tensors, functions or modules, and settings in containers and objects where it only reads); a module its class,
    attributes, parameters and buffers; a partial its parts.  Of other objects those attributes count that the code
    around them names, so that a logger in a closure does not make a run another.  Functions and classes of PyTorch and
    of this library are their names, sparse layers their weights and masks.

    Errors: ValueError for containers in each other beyond what Python's stack takes.
    """
    try:
        return _Telling().digest(value)
    except RecursionError:
        raise ValueError(
            "loss: expected what it computes with to lie in at most some hundred containers in each other, got more"
        ) from None


def network(model: nn.Module) -> str:
    """A digest of how a network computes, whatever its values: its modules by their names, with the code of the user's
    methods and the settings that none of them writes as it runs (strides, rates, activations; no counts).
    """
    return _Telling().digest_of_network(model)


class _Telling:
    """One walk, in the order of meeting: what has a name of its own (a function, a class, an object) is told once, and
    is its number wherever it is met again, so that code that names itself in circles takes no longer than its length.

    Args:
        within: containers that are being told around it, by their ids.
    """

    def __init__(self, within: frozenset[int] = frozenset()) -> None:
        self.within = within
        self.numbers: dict[tuple[int, frozenset[str] | None], int] = {}
        self.met: list[
            tuple[Any, frozenset[str] | None]
        ] = []  # kept alive: another must not come by its id

    def digest(self, value: Any) -> str:
        told, done = [self.of(value)], 0
        while done < len(self.met):
            told.append(self._named(*self.met[done]))
            done += 1
        return _hash(repr(told).encode())

    def digest_of_network(self, model: nn.Module) -> str:
        return self.digest([(name, self._settings(module)) for name, module in _modules(model)])

    def _settings(self, module: nn.Module) -> Any:
        kind = type(module)
        written = frozenset[str]().union(*map(sets_attributes, _methods(kind, but=("__init__",))))
        sparse = isinstance(module, SparseLayer)
        own = {
            name: value
            for name, value in vars(module).items()
            if name not in _MODULES_OWN and name not in written and _is_setting(value)
            if not (sparse and name.startswith("_"))  # what its pattern is at
        }
        return kind.__qualname__, [self._code(f.__code__) for f in _methods(kind)], self.of(own)

    def of(self, value: Any, names: frozenset[str] | None = None) -> Any:
        """Nested tuples of plain values and numbers.  names: attributes of unknown objects that count; None: all."""
        if isinstance(value, _PLAIN) and not isinstance(value, Enum):
            return type(value).__name__, repr(value)
        if isinstance(value, Tensor):
            return "tensor", str(value.dtype), list(value.shape), _digest(value)
        if isinstance(value, np.ndarray):
            return "array", str(value.dtype), list(value.shape), _hash(value.tobytes())
        if isinstance(value, (Mapping, set, frozenset, list, tuple)):
            return self._container(value, names)
        if isinstance(value, (Enum, np.generic, torch.dtype, torch.device)):
            return type(value).__name__, str(value)
        if isinstance(value, torch.Generator):
            return "generator", value.initial_seed()
        key = id(value), names
        if key not in self.numbers:
            self.numbers[key] = len(self.met)
            self.met.append((value, names))
        return "met", self.numbers[key]

    def _container(self, value: Any, names: frozenset[str] | None) -> Any:
        if id(value) in self.within:
            return "within"
        before, self.within = self.within, self.within | {id(value)}
        try:
            if isinstance(value, Mapping):
                keyed = sorted(((self._apart(k), v) for k, v in value.items()), key=itemgetter(0))
                return type(value).__name__, [(key, self.of(v, names)) for key, v in keyed]
            if isinstance(value, (set, frozenset)):
                return type(value).__name__, sorted(map(self._apart, value))
            return type(value).__name__, [self.of(v, names) for v in value]
        finally:
            self.within = before

    def _apart(self, item: Any) -> str:
        """By itself: the order of a set, in which others would be met before it, is another in each process."""
        return _Telling(self.within).digest(item)

    def _named(self, value: Any, names: frozenset[str] | None) -> Any:
        children = value.named_children() if isinstance(value, nn.Module) else ()
        compiled = dict(children).get("_orig_mod")
        # Of its own: a mock has whatever it is asked for.
        own = getattr(value, "__dict__", None)
        inner = compiled or (own or {}).get("_torchdynamo_orig_callable")
        if inner is not None:  # compiled: computes the same
            return self.of(inner, names)
        if isinstance(value, functools.partial):
            return "partial", self.of([value.func, value.args, value.keywords], names)
        if isinstance(value, types.MethodType):
            return "method", self.of([value.__func__, value.__self__], names)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, (types.ModuleType, types.BuiltinFunctionType)):
            return "library", getattr(value, "__name__", "")
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        return self._object(value, names)

    def _function(self, fn: types.FunctionType) -> Any:
        around, code, names = closed_over(fn), fn.__code__, names_in(fn.__code__)
        if is_of(fn, _LIBRARIES):  # a decorator of theirs holds what is the user's
            return "library", fn.__module__, fn.__qualname__, self.of(around, names)
        told = self.of([around, fn.__defaults__, fn.__kwdefaults__], names)
        taken = {
            n: fn.__globals__[n] for n in sorted(names & fn.__globals__.keys() - written_by(fn))
        }
        reads = not gathers(fn)
        taken = {n: v for n, v in taken.items() if _counts(v) or (reads and _configures(v, names))}
        return "function", self._code(code), told, self.of(taken, names)

    def _code(self, code: types.CodeType) -> Any:
        inner = [
            self._code(c) if isinstance(c, types.CodeType) else self.of(c) for c in code.co_consts
        ]
        return _hash(code.co_code), code.co_names, inner

    def _class(self, kind: type) -> Any:
        """Its name, and the code of the user's methods."""
        return "class", kind.__qualname__, [self.of(f) for f in _methods(kind)]

    def _module(self, module: nn.Module) -> Any:
        if isinstance(module, SparseLayer):  # under whatever plan
            return "sparse", type(module).__qualname__, self.of(module.state_dict())
        own = {k: v for k, v in vars(module).items() if k not in _MODULES_OWN}
        parts = [own, dict(module._parameters), dict(module._buffers), dict(module._modules)]
        return "module", self.of([type(module), *parts], _named_by(type(module)))

    def _object(self, value: Any, names: frozenset[str] | None) -> Any:
        held = dict(getattr(value, "__dict__", {}))
        for base in type(value).__mro__:
            slots = getattr(base, "__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, slot):
                    held[slot] = getattr(value, slot)
        if not callable(value) and names is not None:
            held = {k: v for k, v in held.items() if k in names}
        names = _named_by(type(value)) if names is None else names | _named_by(type(value))
        return "object", self.of([type(value), held], names)


def _digest(t: Tensor) -> str:
    return _hash(bytes_of(t).tobytes())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _named_by(kind: type) -> frozenset[str]:
    """What the user's methods of a class name."""
    return frozenset[str]().union(*(names_in(f.__code__) for f in _methods(kind)))


def _methods(kind: type, but: tuple[str, ...] = ()) -> list[types.FunctionType]:
    own = [base for base in kind.__mro__ if not is_of(base, _LIBRARIES)]
    found = [
        getattr(f, "__func__", f)
        for base in own
        for name, f in sorted(vars(base).items())
        if name not in but
    ]
    return [f for f in found if isinstance(f, types.FunctionType)]


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All by name, sparse layers without what they compute with."""
    below = set[nn.Module]()
    for name, module in model.named_modules():
        if module not in below:
            yield name, module
            if isinstance(module, SparseLayer):
                below.update(module.modules())


def _is_setting(value: Any) -> bool:
    kinds = (*_PLAIN, type, torch.dtype, types.FunctionType, types.BuiltinFunctionType)
    return isinstance(value, kinds) or (isinstance(value, tuple) and all(map(_is_setting, value)))


def _counts(value: Any) -> bool:
    """Whether a global is a part of what a function computes: not what gathers as it runs."""
    known = (*_PLAIN, tuple, Tensor, np.ndarray, nn.Module, type, functools.partial)
    return isinstance(value, known) or inspect.isroutine(value)


def _configures(value: Any, names: frozenset[str], depth: int = 4) -> bool:
    """Whether it is settings: plain values and arrays in containers, or what an object has by these names."""
    if isinstance(value, (*_PLAIN, Tensor, np.ndarray, np.generic, torch.dtype, torch.device)):
        return True
    if isinstance(value, Mapping):
        inner = [*value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = [*value]
    elif callable(value) or isinstance(value, types.ModuleType):
        return False
    else:
        inner = [v for k, v in getattr(value, "__dict__", {}).items() if k in names]
    return (
        depth > 0
        and 0 < len(inner) <= _MOST
        and all(_configures(v, names, depth - 1) for v in inner)
    )
