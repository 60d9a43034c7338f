"""What a PyTorch file holds that cannot be loaded without running its code: looked at, while none of it is run.

Every name of a class or a function that the pickle asks for is answered with an inert stand-in.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

_TENSORS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state"}
_MOST_BYTES = 1 << 28  # of the pickle alone; tensors lie beside it
# Before the content of a file of torch < 1.6: a magic number, a version, and what the machine was.
_PICKLES_BEFORE = 3


class StandIn:
    """In place of whatever the pickle would make; takes all that pickles do to objects, and keeps none of it."""

    is_module = False  # of torch's, which has its state by name

    def __init__(self, *_: object, **__: object) -> None:
        """Keeps nothing of what the pickle would make the object of."""

    def append(self, *_: object) -> None:
        """Keeps no member, whichever way the pickle adds it."""

    __setitem__ = extend = add = update = append

    def __call__(self, *_: object, **__: object) -> StandIn:
        return StandIn()

    def __setstate__(self, state: object) -> None:
        self.is_module = isinstance(state, dict) and "_modules" in state


class TensorStandIn(StandIn):
    """In place of a tensor."""


class _Dictionary(OrderedDict[Any, Any]):
    def __setstate__(self, state: object) -> None:
        """Drops the attributes that a state dict may have: its entries alone are looked at."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in _TENSORS:
            return TensorStandIn
        return _Dictionary if (module, name) == ("collections", "OrderedDict") else type(name, (StandIn,), {})

    def persistent_load(self, pid: Any) -> Any:
        """A class with its source, as torch wrote those of modules before 1.6; else a storage, which is not read."""
        return pid[1] if isinstance(pid, tuple) and pid[0] == "module" else StandIn()


def look_into(path: Path) -> object:
    """The content with a stand-in for every object but plain data; None where it cannot be told."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
                if archive.getinfo(name).file_size > _MOST_BYTES:
                    return None
                return _Reader(io.BytesIO(archive.read(name))).load()
        with path.open("rb") as file:
            for _ in range(_PICKLES_BEFORE):
                _Reader(file).load()
            return _Reader(file).load()
    except Exception:  # a pickle may be wrong in any way, and then it just cannot be told
        return None


def expressions(content: object) -> list[str]:
    """Python that takes tensors by name out of the content, which it calls `x`; one for each place that has some.

    Args:
        content: as `look_into` found it.
    """
    here = _expression("x", content)
    if here is not None or not isinstance(content, dict):
        return [here] if here is not None else []
    inside = (_expression(entry(key), value) for key, value in content.items() if isinstance(key, str))
    return [found for found in inside if found is not None]


def entry(key: str) -> str:
    """An entry of the content, with quotes that a shell's need not escape."""
    return f"x[{json.dumps(key)}]"


def _expression(place: str, value: object) -> str | None:
    """What has the tensors of a value by name; None: it has none that could be meant."""
    if isinstance(value, StandIn):
        return f"{place}.state_dict()" if value.is_module else None
    tensors = [isinstance(member, TensorStandIn) for member in value.values()] if isinstance(value, dict) else []
    if not any(tensors):
        return None
    return place if all(tensors) else f"{{name: t for name, t in {place}.items() if torch.is_tensor(t)}}"
