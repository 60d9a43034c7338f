"""Keeps libraries from loading, at import or at the first step, what an eager run never uses.

`torch._dynamo` (the front end of torch.compile), inductor, sympy and wandb take seconds to import, in every process.
Each door below is one place where a library loads one of them for nothing, and says how it is closed. What is closed
opens by itself: as soon as something is compiled, `torch._dynamo` is loaded for real, and from then on the own code of
the libraries runs. Nothing is computed differently: where nothing is compiled, what is passed over does nothing.

A door whose module or function is not there, as in another version of a library, is passed over. A test names every
door that is no longer needed; when the last one is gone, so is this file.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

DYNAMO = "torch._dynamo"

Door = Callable[[ModuleType], AbstractContextManager[None]]  # entered before a module is executed, left after it


def install() -> None:
    """To be called before torch is imported; calling it again does nothing. Imports nothing itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the modules that have a door as Python does, and has them executed inside it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        door = DOORS.get(name)
        spec = PathFinder.find_spec(name, path, target) if door is not None else None
        if door is None or spec is None or spec.loader is None:
            return None
        plain = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with door(module):
                plain(module)

        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010  a loader serves one module only
        return spec


def _loaded(name: str = DYNAMO) -> bool:
    return name in sys.modules


class _StandIn(ModuleType):
    """A module in the place of one that is not loaded yet; asked for more than it was given, it loads the real one."""

    def __init__(self, name: str, **given: Any) -> None:
        super().__init__(name)
        self.__dict__.update(given)

    def __getattr__(self, name: str) -> Any:
        for stand_in in [key for key, module in sys.modules.items() if type(module) is _StandIn]:
            del sys.modules[stand_in]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def _in_place(*modules: _StandIn) -> Iterator[None]:
    """For as long as one module is executed, where the real ones are not loaded."""
    placed = [module for module in modules if module.__name__ not in sys.modules]
    sys.modules.update((module.__name__, module) for module in placed)
    try:
        yield
    finally:
        for module in placed:
            if sys.modules.get(module.__name__) is module:
                del sys.modules[module.__name__]


@contextmanager
def torch_disable(module: Any) -> Iterator[None]:
    """`torch._compile._disable_dynamo` loads torch._dynamo when what it wraps is called: `zero_grad`, `checkpoint`."""
    yield
    if hasattr(module, "_disable_dynamo"):
        module._disable_dynamo = _lazy_disable(module._disable_dynamo)


def _lazy_disable(disable: Callable[..., Any]) -> Callable[..., Any]:
    """Where nothing can be compiled yet, the function itself is what is called."""

    def lazy(fn: Callable[..., Any] | None = None, recursive: bool = True) -> Callable[..., Any]:
        if fn is None:
            return functools.partial(lazy, recursive=recursive)
        disabled = disable(fn, recursive)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            return disabled(*args, **kwargs) if _loaded() else fn(*args, **kwargs)

        return call

    return lazy


@contextmanager
def optimizer_step(module: Any) -> Iterator[None]:
    """`torch.optim` loads torch._dynamo at the first step, to break a graph there, were there one."""
    yield
    if not hasattr(module, "_use_grad_for_differentiable"):
        return
    decorate = module._use_grad_for_differentiable

    def lazy(step: Callable[..., Any]) -> Callable[..., Any]:
        breaking = decorate(step)

        @functools.wraps(step)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _loaded():
                return breaking(*args, **kwargs)
            with module.torch.set_grad_enabled(args[0].defaults["differentiable"]):
                return step(*args, **kwargs)

        return call

    module._use_grad_for_differentiable = lazy


@contextmanager
def torchvision_roi_align(_: ModuleType) -> Iterator[None]:
    """`torchvision.ops.roi_align` takes from torch._dynamo a function that it calls for detectors only."""

    def is_compile_supported(device_type: Any) -> Any:
        return importlib.import_module(f"{DYNAMO}.utils").is_compile_supported(device_type)

    utils = _StandIn(f"{DYNAMO}.utils", __path__=[], is_compile_supported=is_compile_supported)
    with _in_place(_StandIn(DYNAMO), utils):
        yield


@contextmanager
def timm_disable(module: Any) -> Iterator[None]:
    """timm wraps functions of its NaFlexVit in `torch.compiler.disable`, which loads torch._dynamo at once."""
    yield
    lazy = getattr(sys.modules["torch"], "_disable_dynamo", None)  # the same, made to wait
    if lazy is not None and hasattr(module, "disable_compiler"):
        module.disable_compiler = lazy


_of_kron = SimpleNamespace()  # what timm's Kron sets in torch._dynamo.config, until there is one


@contextmanager
def timm_kron(_: ModuleType) -> Iterator[None]:
    """`timm.optim.kron` raises a limit in `torch._dynamo.config` when it is imported, which `timm.optim` does."""
    with _in_place(_StandIn(DYNAMO, config=_of_kron)):
        yield


@contextmanager
def dynamo(module: Any) -> Iterator[None]:
    """No door: when torch._dynamo is loaded for real, it gets the limit that `timm.optim.kron` was to raise."""
    yield
    for name, value in vars(_of_kron).items():
        setattr(module.config, name, value)


@contextmanager
def timm_muon(_: ModuleType) -> Iterator[None]:
    """`timm.optim.muon` loads distributed tensors, and sympy with them, to ask whether a gradient is one of them."""
    tensors = "torch.distributed.tensor"

    class DTensorCheck(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return _loaded(tensors) and isinstance(instance, sys.modules[tensors].DTensor)

    class DTensor(metaclass=DTensorCheck):
        """Nothing is one before they are loaded."""

    with _in_place(_StandIn(tensors, __path__=[], DTensor=DTensor)):
        yield


@contextmanager
def timm_wandb(_: ModuleType) -> Iterator[None]:
    """`timm.utils.summary` loads wandb where it is installed, for a function of timm's own training script."""
    with _in_place(_StandIn("wandb")):
        yield


@contextmanager
def deepspeed_compile(module: Any) -> Iterator[None]:
    """`deepspeed.runtime.compiler.compile` decorates DeepSpeed's Muon, and loads torch._dynamo and inductor at once."""
    yield
    if not hasattr(module, "compile"):
        return
    decorator = module.compile

    def compile_when_called() -> Callable[..., Any]:
        def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
            compiled: list[Callable[..., Any]] = []

            @functools.wraps(fn)
            def call(*args: Any, **kwargs: Any) -> Any:
                if not compiled:
                    compiled.append(decorator()(fn))
                return compiled[0](*args, **kwargs)

            return call

        return decorate

    module.compile = compile_when_called


DOORS: dict[str, Door] = {
    "torch._compile": torch_disable,
    "torch.optim.optimizer": optimizer_step,
    "torchvision.ops.roi_align": torchvision_roi_align,
    "timm.layers.typing": timm_disable,
    "timm.optim.kron": timm_kron,
    "timm.optim.muon": timm_muon,
    "timm.utils.summary": timm_wandb,
    "deepspeed.runtime.compiler": deepspeed_compile,
    DYNAMO: dynamo,
}
