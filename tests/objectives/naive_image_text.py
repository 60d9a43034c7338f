"""CLIP and SigLIP written pair by pair, over open_clip's towers written token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.objectives.contract import PairFeatures
from tests.objectives.naive import Weights


def objective_loss(kind: str, w: Weights, batch: Batch) -> Tensor:
    """The loss of a whole objective on the towers of towers.py."""
    assert batch.tokens is not None
    features = PairFeatures(
        torch.stack([embed_image(w, image) for image in batch.views[0]]),
        torch.stack([embed_text(w, tokens) for tokens in batch.tokens]),
        torch.exp(w["logit_scale"][0]),
        w["logit_bias"][0] if kind == "siglip" else torch.zeros((), dtype=torch.float64),
    )
    return pairs_loss(kind, features)


def pairs_loss(kind: str, f: PairFeatures) -> Tensor:
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
