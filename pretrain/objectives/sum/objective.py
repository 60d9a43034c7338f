"""Several objectives over one encoder: the weighted sum of their losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.errors import InputError
from pretrain.objectives.contract import LossOutput, Objective
from pretrain.runtime.state import Progress


class Combined(Objective):
    """loss = sum over terms of weight x loss, as where masked images join labels (Chen et al. 2023, arXiv:2312.00950).

    Each term makes its own forward pass of the encoder, so that a classifier sees whole images where a masked
    term hides some. The encoder is the sum's alone: terms use it, and checkpoints hold it once, as `encoder.*`;
    heads and teachers are `terms.<kind>.*`. Terms initialise it in their order, the last that does so has its
    way, and teachers start from what came of it.

    Args:
        encoder: which every term was built with.
        terms: by name, in order.
        weights: of their losses, positive.

    Raises:
        InputError: terms that need different batches, such as different masks, or have momentum teachers that
            follow at different rates.
    """

    def __init__(self, encoder: nn.Module, terms: Mapping[str, Objective], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.needs = joint_needs({name: term.needs for name, term in terms.items()})
        self.weights = dict(weights)
        _check_decays(terms)
        for term in terms.values():
            for target, online in term.ema(Progress(0, 1, 0))[1]:
                target.load_state_dict(online.state_dict())
        self.encoder = encoder
        for term in terms.values():
            assert term.encoder is encoder
            del term.encoder  # as a submodule; as a plain attribute it has no second name
            term.__dict__["encoder"] = encoder
        self.terms = nn.ModuleDict(terms)

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        """Metrics: each term's loss, before its weight, and its own, as `<kind>/<name>`."""
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            output: LossOutput = term(batch, progress)
            losses.append(self.weights[name] * output.loss)
            found = {"loss": output.loss.detach(), **output.metrics}
            metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
        return LossOutput(sum(losses[1:], losses[0]), metrics)

    def ema(self, progress: Progress) -> tuple[float, list[tuple[nn.Module, nn.Module]]]:
        """Those of the terms."""
        found = [(decay, pairs) for decay, pairs in (self._term(name).ema(progress) for name in self.terms) if pairs]
        return found[0][0] if found else 0.0, [pair for _, pairs in found for pair in pairs]

    def undecayed(self) -> list[nn.Module]:
        return [module for name in self.terms for module in self._term(name).undecayed()]

    def _term(self, name: str) -> Objective:
        term = self.terms[name]
        assert isinstance(term, Objective)
        return term


def _check_decays(terms: Mapping[str, Objective]) -> None:
    """At the start and on the way: the engine moves all teachers by one decay."""
    for progress in (Progress(0, 2, 0), Progress(1, 2, 0)):
        found = {name: decay for name, (decay, pairs) in ((n, t.ema(progress)) for n, t in terms.items()) if pairs}
        if len(set(found.values())) > 1:
            raise InputError(
                where="objective.terms",
                expected="one decay of all momentum teachers",
                found=", ".join(f"{decay} for {name}" for name, decay in found.items()),
            )


def joint_needs(needs: Mapping[str, BatchSpec]) -> BatchSpec:
    """What satisfies every term: the most views, and whatever else any asks for.

    Raises:
        InputError: two terms ask for different things under one name, such as masks of two grids.
    """
    joint: dict[str, Any] = {"num_views": max(spec.num_views for spec in needs.values())}
    for field in fields(BatchSpec):
        if field.name in joint:
            continue
        values = {name: getattr(spec, field.name) for name, spec in needs.items()}
        asked = {name: value for name, value in values.items() if field.default is MISSING or value != field.default}
        if any(value != next(iter(asked.values())) for value in asked.values()):
            raise InputError(
                where="objective.terms",
                expected=f"terms that need the same {field.name} of a batch",
                found=", ".join(f"{value} for {name}" for name, value in asked.items()),
            )
        joint[field.name] = next(iter(asked.values()), field.default)
    return BatchSpec(**joint)
