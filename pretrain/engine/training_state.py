"""What a run has learned, as this rank keeps it: weights, their averages, optimizer state and buffers, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.engine.partitions import Partitions
from pretrain.optim.averages import WeightEma
from pretrain.optim.config import Ema
from pretrain.optim.optimizers import empty_state, step_counters
from pretrain.runtime.collectives import sum_over_ranks


@dataclass(frozen=True)
class Fragment:
    """A contiguous stretch of a logical tensor that this rank keeps; writing into `data` changes the state.

    Attributes:
        name: `param/<name>`, `ema/<name>`, `optim/<key>/<name>` or `buffer/<name>`.
        shape: of the whole logical tensor.
        start: index of the first element in the flattened logical tensor.
        data: the elements, flat, a live view.
        replicated: every rank keeps the same.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor
    replicated: bool


class TrainingState:
    """Reads and writes it in place, with no collective but in `whole_average`.

    Attributes:
        stage: of ZeRO, whose layout it has.
        buffers: those that are saved, in the order of `fragments`.

    Args:
        objective: whose state it is; its parameters may be sharded already.
        shapes: of its whole parameters, by name.
        optimizer: the torch optimizer; its state is made here, so that there is one to load into before the first step.
        partitions: where the weights are kept.
        ema: moving average of the trained weights; None: there is none. Averaged weights do not go with the running
            statistics of the latest: these are averaged too, as in timm.
    """

    def __init__(
        self,
        objective: nn.Module,
        shapes: Mapping[str, tuple[int, ...]],
        optimizer: torch.optim.Optimizer,
        partitions: Partitions,
        ema: Ema | None,
    ) -> None:
        self._objective, self._shapes, self._optimizer, self._partitions = objective, shapes, optimizer, partitions
        self.stage = partitions.stage
        stepped = []
        for group in optimizer.param_groups:
            for kept in partitions.stepped(group):
                optimizer.state[kept] = empty_state(group, kept)
                stepped.append(kept)
        self.buffers = [buffer for _, buffer in self._named_buffers()]
        statistics = [buffer for buffer in self.buffers if buffer.is_floating_point()]
        self._averages = WeightEma(ema, [*stepped, *statistics]) if ema is not None else None

    def fragments(self) -> list[Fragment]:
        """All that this rank keeps, as live views.

        Together the ranks' fragments cover every logical tensor. What is not sharded every rank has whole.
        """
        found = []
        for name, p in self._objective.named_parameters():
            replicated = self._partitions.is_replicated(p)
            for kind, data, start in self._of_parameter(p):
                found.append(Fragment(f"{kind}/{name}", self._shapes[name], start, data, replicated))
        for name, buffer in self._named_buffers():
            found.append(Fragment(f"buffer/{name}", tuple(buffer.shape), 0, buffer.view(-1), True))
            average = self.average_of(buffer)
            if average is not None:
                found.append(Fragment(f"ema/{name}", tuple(buffer.shape), 0, average.view(-1), True))
        return found

    def group_values(self) -> list[dict[str, Any]]:
        """Name, hyperparameters and step count of each parameter group: the optimizer's state that is no tensor."""
        values = []
        for group in self._optimizer.param_groups:
            steps = [
                float(counter) for counter in step_counters(self._optimizer, group, self._partitions.stepped(group))
            ]
            hyper = {
                k: v for k, v in group.items() if isinstance(v, int | float | bool | tuple | list) and k != "params"
            }
            values.append({**hyper, "name": str(group["name"]), "step": max(steps, default=0.0)})
        return values

    def after_load(self, groups: list[dict[str, Any]]) -> None:
        """Call once the fragments are written: takes the groups' step counts and refreshes the working weights."""
        steps = {group["name"]: float(group["step"]) for group in groups}
        for group in self._optimizer.param_groups:
            for counter in step_counters(self._optimizer, group, self._partitions.stepped(group)):
                counter.fill_(steps[str(group["name"])])
        self._partitions.refresh_weights()

    def update_averages(self, step: int) -> None:
        """Call after the `step`-th applied step, counted from 1."""
        if self._averages is not None:
            self._averages.update(step)

    def average_of(self, kept: Tensor) -> Tensor | None:
        """The moving average of what the optimizer steps, or of a running statistic; None where there is none."""
        return self._averages.average_of(kept) if self._averages is not None else None

    def whole_average(self, name: str, p: nn.Parameter) -> Tensor | None:
        """That of a trained parameter, on the CPU of every rank; None without averages. Every rank must call it.

        Each rank contributes what it keeps, and exact zeros elsewhere.
        """
        if self._averages is None:
            return None
        whole = torch.zeros(self._shapes[name], device=p.device)
        piece = self._partitions.piece(p)
        if piece is not None:
            average = self._averages.average_of(piece.kept)
            assert average is not None
            whole.view(-1).narrow(0, piece.start, piece.numel).copy_(piece.of(average))
        if not self._partitions.is_replicated(p):
            sum_over_ranks(whole)
        return whole.cpu()

    def _of_parameter(self, p: nn.Parameter) -> Iterator[tuple[str, Tensor, int]]:
        """(kind, live flat view, start) of the parameter itself, of its average, of each of its optimizer states."""
        piece = self._partitions.piece(p)
        if piece is None:
            return
        yield "param", piece.of(piece.kept), piece.start
        average = self.average_of(piece.kept)
        if average is not None:
            yield "ema", piece.of(average), piece.start
        for key, value in self._optimizer.state.get(piece.kept, {}).items():
            if isinstance(value, Tensor) and value.shape == piece.kept.shape:
                yield f"optim/{key}", piece.of(value), piece.start

    def _named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._objective.state_dict(keep_vars=True).items():
            if name not in self._shapes:
                yield name, value
