"""Readouts of blocks, against what the libraries' own forward passes compute."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from data_pipeline.errors import InputError
from pretrain.evals.features.readout import OWN, Reader, Readout


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
    found = read(
        module, Readout("cls", 2), Readout("both"), Readout("mean", 3), Readout("dinov2", 3), Readout("both", 3)
    )
    torch.testing.assert_close(found[0], torch.cat(cls[1:], dim=1))
    torch.testing.assert_close(found[1], torch.cat([cls[2], mean[2]], dim=1))
    torch.testing.assert_close(found[2], torch.cat(mean, dim=1))
    # As dinov2/eval/linear.py's create_linear_input with use_avgpool: four D of three blocks, where both is six D.
    torch.testing.assert_close(found[3], torch.cat([*cls, mean[2]], dim=1))
    assert (found[3].shape[1], found[4].shape[1]) == (4 * module.num_features, 6 * module.num_features)


STAGES: dict[str, tuple[int, dict[str, object], list[int]]] = {
    "resnet18": (32, {}, [128, 256, 512]),
    "swin_tiny_patch4_window7_224": (
        32, {"img_size": 32, "window_size": 2, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)}, [12, 24],
    ),
    "test_convnext": (64, {}, [32, 48, 64]),  # whose head normalises the pooled map
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_averaged_over_positions_and_the_last_is_the_own(name: str) -> None:
    size, options, widths = STAGES[name]
    torch.manual_seed(0)
    module = unsettled(timm.create_model(name, num_classes=0, **options))
    own, last, several = read(module, OWN, Readout("mean"), Readout("mean", len(widths)), size=size)
    torch.testing.assert_close(own, last)
    assert several.shape == (2, sum(widths))
    torch.testing.assert_close(several[:, -widths[-1] :], last)


def unsettled(module: nn.Module) -> nn.Module:
    """Norms and biases with a say: as they begin, leaving one out may change next to nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def test_a_norm_behind_the_pooling_is_taken_of_every_block_of_a_vit() -> None:
    module: Any = unsettled(vit(global_pool="avg"))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = []
    with torch.inference_mode():
        x = module.norm_pre(module._pos_embed(module.patch_embed(images)))
        for block in module.blocks:
            x = block(x)
            expected.append(module.fc_norm(x[:, module.num_prefix_tokens :].mean(dim=1)))
    (found,) = read(module, Readout("mean", 2))
    torch.testing.assert_close(found, torch.cat(expected[1:], dim=1))


@pytest.mark.parametrize("name", ["cait_xxs24_224", "convit_tiny", "xcit_nano_12_p8_224"])
def test_class_tokens_that_join_late_are_no_block_s(name: str) -> None:
    options = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 0}
    module = timm.create_model(name, **options).eval()
    (mean,) = read(module, Readout("mean", 2), size=32)
    assert mean.shape == (2, 2 * module.num_features)
    with pytest.raises(InputError, match="shows no class token"):
        Reader(module, [Readout("cls")])


def test_blocks_of_open_clip_s_tower_are_those_of_a_pass_by_hand() -> None:
    torch.manual_seed(0)
    tower = unsettled(VisionTransformer(16, 4, 24, 3, 2, 4.0, output_dim=8))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    tokens: list[Tensor] = []
    for block in tower.transformer.resblocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda _, __, out: tokens.append(out))
    with torch.inference_mode():
        own = tower(images)
        normed = [tower.ln_post(x) for x in tokens[:3]]  # type: ignore[operator]
    cls, both, mean = read(tower, Readout("cls"), Readout("both", 2), Readout("mean", 3))
    torch.testing.assert_close(own, cls @ tower.proj.detach())  # type: ignore[operator]
    of_two = [part for x in normed[1:] for part in (x[:, 0], x[:, 1:].mean(dim=1))]
    torch.testing.assert_close(both, torch.cat(of_two, dim=1))
    torch.testing.assert_close(mean, torch.cat([x[:, 1:].mean(dim=1) for x in normed], dim=1))


@pytest.mark.parametrize(
    ("name", "pool", "readout", "width"),
    [("test_convnext", "avg", Readout("mean", 2), 48 + 64), ("test_vit", "token", Readout("cls", 2), 2 * 64)],
)
def test_of_timm_s_encoders_in_open_clip_the_trunk_is_read(name: str, pool: str, readout: Readout, width: int) -> None:
    torch.manual_seed(0)
    tower = unsettled(TimmModel(name, embed_dim=8, image_size=160, pool=pool))
    own, one, several = read(tower, OWN, Readout(readout.pooling), readout, size=160)
    torch.testing.assert_close(own, one @ tower.head.proj.weight.detach().T)  # type: ignore[union-attr, operator]
    assert several.shape == (2, width)


@pytest.mark.parametrize(
    ("module", "readout", "told"),
    [
        (nn.Flatten(), Readout("mean"), "does not show its blocks"),
        (vit(global_pool="avg", class_token=False), Readout("both"), "no class token"),
        (vit(global_pool="avg", class_token=False), Readout("dinov2"), "no class token"),
        (vit(), Readout("cls", 4), "between 1 and the encoder's 3"),
        (timm.create_model("test_efficientnet"), Readout("mean"), "own, as EfficientNet makes more"),
        (timm.create_model("test_nfnet"), Readout("mean"), "own, as NormFreeNet makes more"),
        (vit(), Readout("own", 2), "--pooling"),
    ],
)
def test_what_an_encoder_does_not_have_is_refused(module: nn.Module, readout: Readout, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Reader(module, [readout])
