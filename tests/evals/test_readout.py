"""Readouts of blocks, against what the libraries' own forward passes compute."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from data_pipeline.errors import InputError
from pretrain.evals.readout import OWN, Reader, Readout


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **{**small, **options}).eval()


def read(module: nn.Module, *readouts: Readout, size: int = 16) -> tuple[Tensor, ...]:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found: tuple[Tensor, ...] = Reader(module, readouts)(images)
    return found


def test_the_own_pooling_of_a_vit_is_its_class_token_or_its_mean() -> None:
    own, cls = read(vit(), OWN, Readout("cls"))
    torch.testing.assert_close(own, cls)
    own, mean = read(vit(global_pool="avg"), OWN, Readout("mean"))  # whose norm comes after the pooling
    torch.testing.assert_close(own, mean)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}], ids=["plain", "registers"])
def test_blocks_are_those_of_a_pass_by_hand(options: dict[str, object]) -> None:
    module = vit(**options)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    cls, mean = [], []
    with torch.inference_mode():
        x = module.norm_pre(module._pos_embed(module.patch_embed(images)))
        for block in module.blocks:
            x = block(x)
            cls.append(module.norm(x)[:, 0])
            mean.append(module.norm(x)[:, module.num_prefix_tokens :].mean(dim=1))
    found = read(module, Readout("cls", 2), Readout("both"), Readout("mean", 3))
    torch.testing.assert_close(found[0], torch.cat(cls[1:], dim=1))
    torch.testing.assert_close(found[1], torch.cat([cls[2], mean[2]], dim=1))
    torch.testing.assert_close(found[2], torch.cat(mean, dim=1))


def test_stages_of_a_resnet_and_of_a_swin_are_averaged_over_positions() -> None:
    torch.manual_seed(0)
    resnet = timm.create_model("resnet18", num_classes=0).eval()
    own, last, three = read(resnet, OWN, Readout("mean"), Readout("mean", 3), size=32)
    torch.testing.assert_close(own, last)
    assert three.shape == (2, 128 + 256 + 512)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=12, depths=(1, 1), num_heads=(2, 2),
        num_classes=0,
    ).eval()  # fmt: skip
    own, last, two = read(swin, OWN, Readout("mean"), Readout("mean", 2), size=32)
    torch.testing.assert_close(own, last)
    assert two.shape == (2, 12 + 24)


def test_the_class_token_of_open_clip_s_tower_is_what_it_projects() -> None:
    torch.manual_seed(0)
    tower = open_clip.create_model("ViT-B-32").visual.eval()
    own, cls, both = read(tower, OWN, Readout("cls"), Readout("both", 2), size=224)
    torch.testing.assert_close(own, cls @ tower.proj.detach(), atol=1e-5, rtol=1e-5)
    assert both.shape == (2, 2 * 2 * 768)


@pytest.mark.parametrize(
    ("module", "readout", "told"),
    [
        (nn.Flatten(), Readout("mean"), "does not show its blocks"),
        (vit(global_pool="avg", class_token=False), Readout("both"), "no class token"),
        (vit(), Readout("cls", 4), "between 1 and the encoder's 3"),
        (vit(), Readout("own", 2), "--pooling"),
    ],
)
def test_what_an_encoder_does_not_have_is_refused(module: nn.Module, readout: Readout, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Reader(module, [readout])
