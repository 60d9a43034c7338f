"""Where DeepSpeed keeps what: pieces of logical tensors in the flat partitions that it steps, at each ZeRO stage.

At stage 0 the parameters themselves are stepped. At stages 1 and 2 each parameter group is laid end to end and cut into
one partition per rank; a parameter may lie across a cut. At stage 3 each parameter is cut, and padded, by itself.
Parameters that are not trained are whole on every rank below stage 3, and cut like any other at stage 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A contiguous stretch of one parameter that this rank keeps.

    Attributes:
        kept: the tensor it lies in: what the optimizer steps, or a parameter that is not trained.
        offset: its first element in `kept`, flattened.
        start: its first element in the flattened parameter.
        numel: elements.
    """

    kept: Tensor
    offset: int
    start: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same stretch, flat and live, of a tensor that is laid out as `kept` is."""
        return tensor.data.view(-1).narrow(0, self.offset, self.numel)


class Partitions:
    """This rank's pieces of everything.

    Args:
        engine: DeepSpeed's.
        optimizer: the torch optimizer that was given to it.
        stage: ZeRO 0-3.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, stage: int) -> None:
        self._zero, self._optimizer, self.stage = engine.optimizer, optimizer, stage

    def stepped(self, group: dict[str, Any]) -> list[Tensor]:
        """The tensors that the optimizer steps for a group: parameters at stage 0, else flat partitions, in fp32."""
        if self.stage < 3:
            return list(group["params"])
        index = next(i for i, g in enumerate(self._optimizer.param_groups) if g is group)
        return [
            flat
            for sub_group, flat in enumerate(self._zero.fp32_partitioned_groups_flat)
            if self._zero.sub_group_to_group_id[sub_group] == index
        ]

    def piece(self, p: Any) -> Piece | None:
        """What this rank keeps of a parameter; None where that is nothing."""
        if self.stage == 3:
            return self._piece_of_shard(p)
        if self.stage == 0 or not p.requires_grad:
            return Piece(p, 0, 0, p.numel())
        mapping = p._hp_mapping
        if mapping is None:  # no element of it lies in this rank's partition
            return None
        kept = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.get_hp_fragment_address()
        return Piece(kept, address.start, mapping.lp_fragment_address.start, address.numel)

    def is_replicated(self, p: Any) -> bool:
        """Whether every rank keeps all of it."""
        return self.stage == 0 or (self.stage < 3 and not p.requires_grad)

    def refresh_weights(self) -> None:
        """After the kept tensors were written to: brings the weights that the modules compute with up to date."""
        if self.stage in (1, 2):
            self._zero.update_lp_params()
        elif self.stage == 3:
            with self.local_weights():
                for sub_group in range(len(self._zero.fp16_groups)):
                    self._zero._reassign_or_swap_out_partitioned_parameters(sub_group)

    @contextmanager
    def local_weights(self) -> Iterator[None]:
        """What is written to `local_weight` inside is what the modules compute with afterwards.

        At stage 3 small parameters stay gathered between steps; they are let go of before, and gathered again after.
        """
        if self.stage == 3:
            self._zero.checkpoint_event_prologue()
        yield
        if self.stage == 3:
            self._zero.checkpoint_event_epilogue()

    def local_weight(self, p: Any) -> Tensor:
        """What this rank holds of the weight that the modules compute with; padded at stage 3."""
        tensor: Tensor = p.ds_tensor if self.stage == 3 else p
        return tensor.data

    def _piece_of_shard(self, p: Any) -> Piece | None:
        if p.requires_grad:
            sub_group, offset, padded = self._zero.grad_position[self._zero.get_param_id(p)]
            kept = self._zero.fp32_partitioned_groups_flat[sub_group]
        else:
            kept, offset, padded = p.ds_tensor, 0, p.ds_tensor.ds_numel
        start = padded * self._zero._get_param_partition_rank(p)
        numel = max(0, min(padded, p.ds_numel - start))  # the rest is padding
        return Piece(kept, offset, start, numel) if numel else None
