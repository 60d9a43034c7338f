"""What may be chosen of kNN."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pretrain.evals.config import Count, FeatureConfig, Option
from pretrain.recipe.base import Positive


class KnnConfig(FeatureConfig):
    """Exact weighted kNN; of several k or temperatures the first is the reported one."""

    summary = "Exact weighted k nearest neighbors on L2-normalized features (1805.01978)."
    title = "kNN, k = {k}"
    found = frozenset({"sweep", "temperatures"})
    examples = (
        "pretrain eval knn runs/mae --train shards/train --test shards/test",
        "pretrain eval knn runs/mae --random-init --train shards/train --test shards/test",
        "pretrain eval knn mae.pth --model vit_base_patch16_224.mae --train images/train --test images/val",
    )

    kind: Literal["knn"] = "knn"
    k: Annotated[
        Count | Annotated[tuple[Count, ...], Field(min_length=1)],
        Option("Neighbors; repeatable, the first is the reported one.", default=(20, 10, 100, 200)),
    ] = 20
    temperature: Annotated[
        Positive | Annotated[tuple[Positive, ...], Field(min_length=1)],
        Option("T of the weights exp(cosine / T); repeatable, the first is the reported one."),
    ] = 0.07

    @property
    def ks(self) -> tuple[int, ...]:
        """All numbers of neighbors, the reported one first, each once."""
        return tuple(dict.fromkeys(self.k if isinstance(self.k, tuple) else (self.k,)))

    @property
    def temperatures(self) -> tuple[float, ...]:
        """All temperatures, the reported one first, each once."""
        given = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        return tuple(dict.fromkeys(given))
