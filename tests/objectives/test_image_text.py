"""CLIP and SigLIP: equal to naive twins in fp64, to open_clip's losses, over any number of ranks; locked towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.errors import InputError
from pretrain.objectives.base import Features
from pretrain.objectives.clip import clip_loss
from pretrain.objectives.siglip import sigmoid_loss
from pretrain.state import Progress
from tests.objectives import towers

START = Progress(0, 10, 0)
KINDS = ["clip", "siglip"]


def unit_features(kind: str, size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Features:
    """Leaves; far from the start, so that no term of the loss is negligible."""
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, size, 5, generator=generator, dtype=dtype).unbind()
    scale, bias = torch.tensor([7.0, -3.0 if kind == "siglip" else 0.0], dtype=dtype).unbind()
    values = (nn.functional.normalize(image, dim=1), nn.functional.normalize(text, dim=1), scale, bias)
    return Features(*(value.clone().requires_grad_() for value in values))


def compute(kind: str, features: Features, **options: Any) -> Tensor:
    """block 3 divides neither the batch nor the texts."""
    if kind == "clip":
        return clip_loss(features, across_ranks=True).loss
    return sigmoid_loss(features, across_ranks=True, block=3, **options).loss


def naive(kind: str, f: Features) -> Tensor:
    """Pair by pair: the definitions in the papers."""
    size = len(f.image)
    logits = [
        [f.logit_scale * sum(a * b for a, b in zip(x, y, strict=True)) + f.logit_bias for y in f.text] for x in f.image
    ]
    total = torch.zeros((), dtype=f.image.dtype)
    for i in range(size):
        if kind == "siglip":
            for j in range(size):
                z = 1 if i == j else -1
                total = total - torch.log(1 / (1 + torch.exp(-z * logits[i][j]))) / size
        else:
            row = sum(torch.exp(logits[i][j]) for j in range(size))
            column = sum(torch.exp(logits[j][i]) for j in range(size))
            total = total - (2 * logits[i][i] - torch.log(row) - torch.log(column)) / (2 * size)
    return total


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_naive_twin(kind: str, size: int) -> None:
    ours, theirs = unit_features(kind, size), unit_features(kind, size)
    loss, expected = compute(kind, ours), naive(kind, theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (3 * loss).backward()
    (3 * expected).backward()
    for name, a, b in zip(Features._fields, ours, theirs, strict=True):
        if name != "logit_bias" or kind == "siglip":
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11, msg=name)


def test_the_nearest_of_all_texts_is_counted() -> None:
    features = unit_features("siglip", 7)
    cosines = features.image @ features.text.T
    expected = (cosines.argmax(1) == torch.arange(7)).double().mean()
    found = sigmoid_loss(features, across_ranks=False, block=3).metrics["image_to_text"]
    assert found == expected
    assert clip_loss(features, across_ranks=False).metrics["image_to_text"] == expected.float()


# Whole objectives against towers that are written here token by token.

Weights = dict[str, Tensor]


def weights_of(module: nn.Module) -> Weights:
    return {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in module.named_parameters()}


def layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / (variance + 1e-5) ** 0.5 * w[f"{name}.weight"] + w[f"{name}.bias"]


def blocks(w: Weights, prefix: str, tokens: list[Tensor], heads: int, causal: bool) -> list[Tensor]:
    for layer in range(2):
        name = f"{prefix}.transformer.resblocks.{layer}"
        normed = [layer_norm(w, f"{name}.ln_1", token) for token in tokens]
        projected = [w[f"{name}.attn.in_proj_weight"] @ t + w[f"{name}.attn.in_proj_bias"] for t in normed]
        width = len(tokens[0])
        size = width // heads
        mixed = []
        for i, query in enumerate(projected):
            parts = []
            for h in range(heads):
                at = h * size
                seen = projected[: i + 1] if causal else projected
                scores = [
                    torch.exp((query[at : at + size] * k[width + at : width + at + size]).sum() / size**0.5)
                    for k in seen
                ]
                values = [v[2 * width + at : 2 * width + at + size] for v in seen]
                parts.append(sum(s * v for s, v in zip(scores, values, strict=True)) / sum(scores))
            out = w[f"{name}.attn.out_proj.weight"] @ torch.cat(parts) + w[f"{name}.attn.out_proj.bias"]
            mixed.append(out)
        tokens = [t + a for t, a in zip(tokens, mixed, strict=True)]
        following = []
        for token in tokens:
            hidden = w[f"{name}.mlp.c_fc.weight"] @ layer_norm(w, f"{name}.ln_2", token) + w[f"{name}.mlp.c_fc.bias"]
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
            following.append(token + w[f"{name}.mlp.c_proj.weight"] @ hidden + w[f"{name}.mlp.c_proj.bias"])
        tokens = following
    return tokens


def embed_text(w: Weights, tokens: Tensor) -> Tensor:
    embedded = [w["text.token_embedding.weight"][t] + w["text.positional_embedding"][i] for i, t in enumerate(tokens)]
    end = max(range(len(tokens)), key=lambda i: int(tokens[i]))
    out = layer_norm(w, "text.ln_final", blocks(w, "text", embedded, 2, True)[end])
    return unit(out @ w["text.text_projection"])


def embed_image(w: Weights, image: Tensor) -> Tensor:
    patches = [image[:, y : y + 8, x : x + 8].reshape(-1) for y in (0, 8) for x in (0, 8)]
    kernel = w["encoder.conv1.weight"].reshape(16, -1)
    tokens = [w["encoder.class_embedding"], *(kernel @ patch for patch in patches)]
    tokens = [layer_norm(w, "encoder.ln_pre", t + w["encoder.positional_embedding"][i]) for i, t in enumerate(tokens)]
    out = layer_norm(w, "encoder.ln_post", blocks(w, "encoder", tokens, 2, False)[0])
    return unit(out @ w["encoder.proj"])


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum() ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_objective_equals_a_naive_one(kind: str) -> None:
    objective = towers.make(kind).double()
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    batch = towers.captioned(3, dtype=torch.float64)
    w = weights_of(objective)
    assert batch.tokens is not None
    features = Features(
        torch.stack([embed_image(w, image) for image in batch.views[0]]),
        torch.stack([embed_text(w, tokens) for tokens in batch.tokens]),
        torch.exp(w["logit_scale"][0]),
        w["logit_bias"][0] if kind == "siglip" else torch.zeros((), dtype=torch.float64),
    )
    expected = naive(kind, features)
    expected.backward()
    loss = objective(batch, START).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for name, p in objective.named_parameters():
        torch.testing.assert_close(p.grad, w[name].grad, rtol=1e-8, atol=1e-11, msg=name)


# LiT


def test_a_locked_tower_takes_no_gradient_and_stays_in_evaluation_mode() -> None:
    objective = towers.make("clip", timm=True, lock_image=True)
    objective.train()
    assert not any(module.training for module in objective.encoder.modules())
    assert objective.text.training
    objective(towers.captioned(4), START).loss.backward()
    assert all(p.grad is None for p in objective.encoder.parameters())
    assert all(p.grad is not None for p in (*objective.text.parameters(), *objective.projection.parameters()))


@pytest.mark.parametrize("timm", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_last_groups_may_stay_unlocked(timm: bool, groups: int) -> None:
    objective = towers.make("clip", timm=timm, lock_image=groups, lock_text=groups)
    locked = {name for name, p in objective.named_parameters() if not p.requires_grad}
    if timm:
        last = {"encoder.norm", "encoder.blocks.1"} | ({"encoder.blocks.0"} if groups == 2 else set())
    else:
        last = (
            {"encoder.proj"} if groups == 1 else {"encoder.proj", "encoder.ln_post", "encoder.transformer.resblocks.1"}
        )
    for name, p in objective.encoder.named_parameters():
        assert p.requires_grad == f"encoder.{name}".startswith(tuple(last)), name
    assert "text.token_embedding.weight" in locked
    assert "text.text_projection" not in locked


def test_more_unlocked_groups_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match=r"objective\.lock_image: expected fewer than its 4 groups"):
        towers.make("clip", lock_image=4)
