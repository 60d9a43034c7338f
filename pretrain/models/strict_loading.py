"""Weights go into a module exactly, or not at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from data_pipeline.errors import CheckpointError
from data_pipeline.messages import short_list

FIX = "Name the weights that were saved from this very architecture."


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, where: str, fix: str = FIX) -> None:
    """Loads all of `state` into all of `module`, or refuses and changes nothing.

    Args:
        module: takes it.
        state: by the module's names.
        where: it comes from, for the error.
        fix: what to do, for the error.

    Raises:
        CheckpointError: names or shapes differ, or a value is not finite; the message lists the names.
    """
    check_exactly(module.state_dict(), state, where=where, of=type(module).__name__, fix=fix)
    module.load_state_dict(state)


def check_exactly(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, where: str, of: str, fix: str = FIX
) -> None:
    """`state` has exactly the names and shapes of `own`, and is finite; errors as in `load_strictly`."""
    both = own.keys() & state.keys()
    faults = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "of another shape": {name for name in both if own[name].shape != state[name].shape},
        "not finite": {name for name in both if not torch.isfinite(state[name]).all()},
    }
    told = [f"{len(names)} {fault}: {short_list(sorted(names))}" for fault, names in faults.items() if names]
    if told:
        raise CheckpointError(
            where=where,
            expected=f"exactly the {len(own)} tensors of {of}, all finite",
            found="; ".join(told),
            fix=fix,
        )
