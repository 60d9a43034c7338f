"""The cases of sums, their naive twin and their papers' numbers; further tests of them: test_combined.py."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.objectives.sum.config import SumConfig, Term
from pretrain.objectives.sum.objective import Sum
from tests.objectives import cases, naive, papers, test_byol, test_mae, test_simmim, test_supervised
from tests.objectives.cases import Case, Twin

SUM = SumConfig(
    kind="sum",
    terms=(
        Term(objective=test_supervised.SUPERVISED),
        Term(weight=0.5, objective=test_simmim.SIMMIM),
    ),
)
# Little of BYOL: its batch norm leaves nothing but rounding of what some parameters get from it.
SUM_WITH_TEACHER = SumConfig(
    kind="sum", terms=(Term(weight=0.02, objective=test_byol.BYOL), Term(objective=test_mae.MAE))
)
CASES = {
    "sum": Case(cases.TINY_VIT, SUM),
    "sum, swin": Case(cases.TINY_SWIN, SUM),
    "sum, with a teacher": Case(cases.TINY_VIT, SUM_WITH_TEACHER),
}


def naive_loss(objective: Sum, weights: naive.Weights, batch: Batch) -> Tensor:
    """Each term's twin is given the leaves under the names that the term alone would give them."""
    twins = {"supervised": test_supervised.naive_loss, "simmim": test_simmim.naive_loss}
    total = torch.zeros((), dtype=batch.views[0].dtype)
    for name, twin in twins.items():
        own = {key.removeprefix(f"terms.{name}."): value for key, value in weights.items()}
        total = total + objective.weights[name] * twin(objective.terms[name], own, batch)  # type: ignore[arg-type]
    return total


TWIN = Twin(Case(test_simmim.TWIN.case.model, SUM), naive_loss, batch_size=1)


PUBLISHED: dict[str, papers.Numbers] = {}

# Chen et al. 2023 (2312.00950) with SimMIM's masks; the weights of the terms are ours.
PUBLISHED["supervised_simmim_vit_b16"] = {
    **test_supervised.PUBLISHED["supervised_vit_b16"],
    "model": {
        "name": "vit_base_patch16_224", "image_size": 224,
        "options": {"pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "global_pool": "avg"},
    },
    "objective": {
        "kind": "sum",
        "terms": (
            {"weight": 1.0, "objective": {**papers.CLASSES, "classifier_init": 0.02, "over_classes": "mean"}},
            {"weight": 1.0, "objective": {"kind": "simmim", "mask_ratio": 0.6, "mask_patch": 32}},
        ),
    },
}  # fmt: skip
