"""ResNets for images of 32 pixels, which no option of timm's gives: a 3x3 stem of stride 1, and no pooling behind it.

Named in timm's registry: where this module was imported, `timm.create_model` builds them, and loads their encoder
folders strictly, as any other model's. Where it was not, timm refuses the name.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn


class CifarResNet(ResNet):  # type: ignore[misc]  # timm is untyped
    """He et al. 2015 (arXiv:1512.03385) with the stem that self-supervised learning on CIFAR uses (Chen et al. 2020,
    arXiv:2002.05709, app. B.9; Chen & He 2020, arXiv:2011.10566, app. D). All but `conv1` and `maxpool` is timm's.
    """

    def __init__(self, *args: Any, in_chans: int = 3, **options: Any) -> None:
        super().__init__(*args, in_chans=in_chans, **options)
        stem: nn.Module = self.conv1  # type: ignore[has-type]
        if not isinstance(stem, nn.Conv2d):
            raise ValueError("stem_type: these models have a stem of their own")
        stem = nn.Conv2d(in_chans, stem.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as timm's others
        self.conv1, self.maxpool = stem, nn.Identity()
        for stage in self.feature_info:
            stage["reduction"] = max(1, stage["reduction"] // 4)


_CONFIG = {
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "first_conv": "conv1",
    "classifier": "fc",
}
default_cfgs = generate_default_cfgs({"resnet18_cifar.untrained": _CONFIG, "resnet50_cifar.untrained": _CONFIG})


@register_model  # type: ignore[untyped-decorator]
def resnet18_cifar(pretrained: bool = False, **options: Any) -> nn.Module:
    return _build("resnet18_cifar", pretrained, {"block": BasicBlock, "layers": (2, 2, 2, 2), **options})


@register_model  # type: ignore[untyped-decorator]
def resnet50_cifar(pretrained: bool = False, **options: Any) -> nn.Module:
    return _build("resnet50_cifar", pretrained, {"block": Bottleneck, "layers": (3, 4, 6, 3), **options})


def _build(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    module: nn.Module = build_model_with_cfg(CifarResNet, name, pretrained, **arguments)
    return module
