"""Several objectives over one encoder: the weighted sum of their losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.errors import InputError
from pretrain.objectives.contract import LossOutput, Objective, Teacher
from pretrain.objectives.kinds import build_on
from pretrain.objectives.sum.config import SumConfig
from pretrain.runtime.state import Progress


class Sum(Objective):
    """loss = sum over terms of weight x loss, as where masked images join labels (Chen et al. 2023, arXiv:2312.00950).

    Each term makes its own forward pass of the encoder, so that a classifier sees whole images where a masked
    term hides some. The encoder is the sum's alone: terms use it, and checkpoints hold it once, as `encoder.*`;
    heads and teachers are `terms.<kind>.*`. Terms initialize it in their order, the last that does so has its
    way, and teachers start from what came of it.

    Args:
        encoder: on which every term is built.
        image_size: pixels.
        config: terms, in order, with the weights of their losses.

    Raises:
        InputError: a term cannot be built; terms need different batches, such as different masks.
    """

    def __init__(self, encoder: nn.Module, image_size: int, config: SumConfig) -> None:
        super().__init__()
        terms = {term.objective.kind: build_on(encoder, image_size, term.objective) for term in config.terms}
        self.needs = joint_needs({name: term.needs for name, term in terms.items()})
        self.coupling = next((term.coupling for term in terms.values() if term.coupling), "")
        self.weights = {term.objective.kind: term.weight for term in config.terms}
        for term in terms.values():
            for teacher in term.teachers(Progress(0, 1, 0)):
                teacher.target.load_state_dict(teacher.online.state_dict())
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

    def teachers(self, progress: Progress) -> list[Teacher]:
        """The teachers of all terms."""
        return [teacher for name in self.terms for teacher in self._term(name).teachers(progress)]

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """The bounds of all terms."""
        return [bound for name in self.terms for bound in self._term(name).bounds()]

    def constant_lr_modules(self) -> list[nn.Module]:
        """The modules of all terms."""
        return [module for name in self.terms for module in self._term(name).constant_lr_modules()]

    def _term(self, name: str) -> Objective:
        term = self.terms[name]
        assert isinstance(term, Objective)
        return term


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
