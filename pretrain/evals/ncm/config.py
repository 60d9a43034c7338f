"""What may be chosen of the nearest class mean: which feature, and of how many samples."""

from __future__ import annotations

from typing import Literal

from pretrain.evals.config import FeatureConfig


class NcmConfig(FeatureConfig):
    """The nearest class mean by cosine. Nothing is fitted but the means."""

    summary = "Nearest class mean, by cosine, of L2-normalized features (1703.05175 with all training samples)."
    title = "nearest class mean"
    examples = ("pretrain eval ncm runs/mae --train shards/train --test shards/test",)

    kind: Literal["ncm"] = "ncm"
