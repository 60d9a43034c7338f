"""A ViT, MAE and a classifier written token by token in Python loops: what the objectives are held to.

Weights come by name out of the objective's state; nothing else is shared with it, nor with timm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Of a square image of `grid` x `grid` patches; `no_embed_class`: prefix tokens have no position."""

    grid: int
    patch: int
    heads: int
    decoder_heads: int = 1
    registers: int = 0
    class_token: bool = True
    no_embed_class: bool = False

    @property
    def prefix(self) -> int:
        return self.registers + int(self.class_token)


def weights_of(module: torch.nn.Module) -> Weights:
    """A copy of every parameter, each a leaf that takes its own gradient."""
    return {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in module.named_parameters()}


def assert_same_gradients(module: torch.nn.Module, weights: Weights) -> None:
    for name, p in module.named_parameters():
        expected = weights[name].grad
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-11, msg=f"gradient of {name} differs")


def mae_loss(w: Weights, positions: Tensor, images: Tensor, masks: Tensor, shape: Shape, normalize: bool) -> Tensor:
    """Mean over samples and hidden patches of the mean squared error of a patch's values.

    Args:
        positions: the decoder's position of each patch, [N, width].
    """
    errors = []
    for image, mask in zip(images, masks, strict=True):
        visible = [n for n in range(len(mask)) if not mask[n]]
        hidden = [n for n in range(len(mask)) if mask[n]]
        predictions = decode(w, positions, encode(w, image, visible, shape), visible, hidden, shape)
        for n, prediction in zip(hidden, predictions, strict=True):
            target = target_of(patch_values(image, n, shape), normalize)
            errors.append(sum((p - t) ** 2 for p, t in zip(prediction, target, strict=True)) / len(target))
    return sum(errors) / len(errors)  # type: ignore[return-value]


def simmim_loss(w: Weights, images: Tensor, masks: Tensor, shape: Shape, block: int) -> Tensor:
    """Mean absolute error over samples and hidden pixels; masks of blocks of `block` pixels, [B, G * G]."""
    errors = []
    for image, mask in zip(images, masks, strict=True):
        side = shape.grid * shape.patch // block
        hidden = [
            n
            for n in range(shape.grid**2)
            if mask[(n // shape.grid * shape.patch // block) * side + n % shape.grid * shape.patch // block]
        ]
        tokens = encode(w, image, list(range(shape.grid**2)), shape, hidden)[shape.prefix :]
        for n in hidden:
            prediction = linear(w, "head", tokens[n])
            errors += [abs(p - t) for p, t in zip(prediction, patch_values(image, n, shape), strict=True)]
    return sum(errors) / len(errors)  # type: ignore[return-value]


def classifier_loss(
    w: Weights,
    images: Tensor,
    targets: Tensor,
    sample_weights: Sequence[float],
    smoothing: float,
    shape: Shape,
) -> Tensor:
    """Cross entropy against target distributions [B, K], smoothed; weighted, and divided by B."""
    total = torch.zeros((), dtype=images.dtype)
    for image, target, weight in zip(images, targets, sample_weights, strict=True):
        logits = class_logits(w, image, shape)
        normalizer = sum(math.e**logit for logit in logits)
        for logit, share in zip(logits, target, strict=True):
            smoothed = (1 - smoothing) * share + smoothing / len(target)
            total = total - weight * smoothed * (logit - torch.log(normalizer))  # type: ignore[arg-type]
    return total / len(images)


def binary_loss(
    w: Weights,
    images: Tensor,
    targets: Tensor,
    sample_weights: Sequence[float],
    smoothing: float,
    threshold: float | None,
    shape: Shape,
) -> Tensor:
    """A coin for each class, whose odds are e^logit: its surprise at the target, meant over K, weighted, over B."""
    total = torch.zeros((), dtype=images.dtype)
    for image, target, weight in zip(images, targets, sample_weights, strict=True):
        for logit, share in zip(class_logits(w, image, shape), target.tolist(), strict=True):
            wanted = (1 - smoothing) * share + smoothing / len(target)
            if threshold is not None:
                wanted = 1.0 if wanted > threshold else 0.0
            present = 1 / (1 + math.e**-logit)
            surprise = -wanted * torch.log(present) - (1 - wanted) * torch.log(1 - present)
            total = total + weight * surprise / len(target)
    return total / len(images)


def class_logits(w: Weights, image: Tensor, shape: Shape) -> Tensor:
    """Of one image, [K], from its class token or else the mean of its patches."""
    tokens = encode(w, image, list(range(shape.grid**2)), shape)
    patches = tokens[shape.prefix :]
    feature = tokens[0] if shape.class_token else sum(patches) / len(patches)  # type: ignore[assignment]
    return linear(w, "head", feature)


def encode(w: Weights, image: Tensor, shown: list[int], shape: Shape, replaced: Sequence[int] = ()) -> list[Tensor]:
    """Prefix tokens, then the shown patches, after the last norm; in place of the replaced stands the mask token."""
    positions = w["encoder.pos_embed"][0]
    tokens = [w["encoder.cls_token"][0, 0]] if shape.class_token else []
    tokens += [w["encoder.reg_token"][0, i] for i in range(shape.registers)]
    if not shape.no_embed_class:
        tokens = [token + positions[i] for i, token in enumerate(tokens)]
    first = 0 if shape.no_embed_class else shape.prefix
    for n in shown:
        values = patch_values(image, n, shape)
        kernel = w["encoder.patch_embed.proj.weight"].reshape(-1, len(values))
        token = w["encoder.patch_embed.proj.bias"]
        for i, value in enumerate(values):
            token = token + value * kernel[:, i]
        if n in replaced:
            token = w["mask_token"]
        tokens.append(token + positions[first + n])
    return blocks(w, "encoder", tokens, shape.heads)


def decode(
    w: Weights, positions: Tensor, tokens: list[Tensor], visible: list[int], hidden: list[int], shape: Shape
) -> list[Tensor]:
    """The predicted values of each hidden patch. Tokens stand in the order of the image here."""
    embedded = [linear(w, "decoder.embed", token) for token in tokens]
    prefix, seen = embedded[: shape.prefix], dict(zip(visible, embedded[shape.prefix :], strict=True))
    patches = [seen.get(n, w["decoder.mask_token"][0, 0]) + positions[n] for n in range(shape.grid**2)]
    decoded = blocks(w, "decoder", prefix + patches, shape.decoder_heads)
    return [linear(w, "decoder.head", decoded[shape.prefix + n]) for n in hidden]


def patch_values(image: Tensor, n: int, shape: Shape) -> list[Tensor]:
    """Values of the n-th patch, row by row of the grid; by channel, then y, then x."""
    row, column = n // shape.grid, n % shape.grid
    return [
        image[c, row * shape.patch + y, column * shape.patch + x]
        for c in range(3)
        for y in range(shape.patch)
        for x in range(shape.patch)
    ]


def target_of(values: list[Tensor], normalize: bool) -> list[Tensor]:
    if not normalize:
        return values
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return [(v - mean) / (variance + 1e-6) ** 0.5 for v in values]


def blocks(w: Weights, prefix: str, tokens: list[Tensor], heads: int) -> list[Tensor]:
    depth = len({name.split(".")[2] for name in w if name.startswith(f"{prefix}.blocks.")})
    for i in range(depth):
        name = f"{prefix}.blocks.{i}"
        normed = [layer_norm(w, f"{name}.norm1", token) for token in tokens]
        tokens = [t + a for t, a in zip(tokens, attention(w, f"{name}.attn", normed, heads), strict=True)]
        tokens = [t + mlp(w, f"{name}.mlp", layer_norm(w, f"{name}.norm2", t)) for t in tokens]
    return [layer_norm(w, f"{prefix}.norm", token) for token in tokens]


def attention(w: Weights, name: str, tokens: list[Tensor], heads: int) -> list[Tensor]:
    width = len(tokens[0])
    size = width // heads
    projected = [linear(w, f"{name}.qkv", token) for token in tokens]
    out = []
    for query in projected:
        parts = []
        for h in range(heads):
            q, at = query[h * size : (h + 1) * size], h * size
            scores = [(q * other[width + at : width + at + size]).sum() / size**0.5 for other in projected]
            exponentials = [torch.exp(score) for score in scores]
            values = [other[2 * width + at : 2 * width + at + size] for other in projected]
            mixed = sum(e * v for e, v in zip(exponentials, values, strict=True))
            parts.append(mixed / sum(exponentials))
        out.append(linear(w, f"{name}.proj", torch.cat(parts)))
    return out


def mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    x = linear(w, f"{name}.fc1", x)
    return linear(w, f"{name}.fc2", 0.5 * x * (1 + torch.erf(x / 2**0.5)))


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    rows = w[f"{name}.weight"].flatten(1)
    return torch.stack([(row * x).sum() + b for row, b in zip(rows, w[f"{name}.bias"], strict=True)])


def layer_norm(w: Weights, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / (variance + eps) ** 0.5 * w[f"{name}.weight"] + w[f"{name}.bias"]
