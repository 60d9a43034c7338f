"""Who is decayed: matrices and kernels, and nothing that timm itself exempts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.models.encoders import build_encoder
from pretrain.optim import build_optimizer, empty_state, param_groups
from pretrain.recipe import AdamW, Model

OPTIM = AdamW(base_lr=1e-3, betas=(0.8, 0.7), eps=1e-5, weight_decay=0.3)
MODELS = {
    "vit": Model(name="vit_tiny_patch16_224", image_size=32, options={"reg_tokens": 2, "init_values": 0.1}),
    "deit": Model(name="deit_tiny_distilled_patch16_224", image_size=32),
    "resnet": Model(name="test_resnet", image_size=32),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_decay_is_on_matrices_alone(model: Model) -> None:
    encoder = build_encoder(model)
    groups = param_groups(encoder, OPTIM)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decay", 0.3), ("no_decay", 0.0)]
    decayed, rest = ({id(p) for p in group["params"]} for group in groups)
    assert not decayed & rest
    exempt = getattr(encoder, "no_weight_decay", set)()
    for name, p in encoder.named_parameters():
        assert (id(p) in rest) == (p.ndim < 2 or name in exempt), name
        assert id(p) in decayed | rest


def test_frozen_parameters_are_in_no_group_and_no_group_is_empty() -> None:
    module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    module[1].requires_grad_(False)
    groups = param_groups(module, OPTIM)
    assert [group["name"] for group in groups] == ["decay"]
    assert groups[0]["params"] == [module[0].weight]


def test_optimizer_keeps_the_names_and_takes_the_recipe_s_values() -> None:
    optimizer = build_optimizer(nn.Linear(2, 3), OPTIM)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["name"] for group in optimizer.param_groups] == ["decay", "no_decay"]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.7), 1e-5, 0.0)


def test_empty_state_is_what_torch_would_have_made() -> None:
    p = nn.Parameter(torch.randn(3, 2))
    plain, prepared = (torch.optim.AdamW([p], lr=0.0) for _ in range(2))
    prepared.state[p] = empty_state(p)
    p.grad = torch.randn(3, 2)
    for optimizer in (plain, prepared):
        optimizer.step()
    assert plain.state[p].keys() == prepared.state[p].keys()
    for key, value in plain.state[p].items():
        assert torch.equal(value, prepared.state[p][key])
        assert value.dtype == prepared.state[p][key].dtype
