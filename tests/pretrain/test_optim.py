"""Who is decayed and at which rate, and that every optimizer computes what its paper says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from data_pipeline.errors import InputError
from pretrain.models.encoders import build_encoder, model_args
from pretrain.objectives.supervised.config import SupervisedConfig
from pretrain.objectives.supervised.objective import Supervised
from pretrain.optim.adamw.config import AdamW
from pretrain.optim.config import OptimConfig
from pretrain.optim.lamb.config import Lamb
from pretrain.optim.lars.config import Lars
from pretrain.optim.optimizers import build_optimizer, empty_state, param_groups, step_counters
from pretrain.optim.sgd.config import Sgd
from pretrain.recipe.recipe import Model

OPTIM = AdamW(base_lr=1e-3, betas=(0.8, 0.7), eps=1e-5, weight_decay=0.3)
SWIN = Model(
    name="swin_tiny_patch4_window7_224",
    image_size=32,
    options={"embed_dim": 8, "depths": (2, 2, 1), "num_heads": (1, 2, 4), "window_size": 2},
)
MODELS = {
    "vit": Model(name="vit_tiny_patch16_224", image_size=32, options={"reg_tokens": 2, "init_values": 0.1}),
    "vit, norm of the mean": Model(
        name="vit_tiny_patch16_224", image_size=32, options={"global_pool": "avg", "fc_norm": True, "depth": 3}
    ),
    "deit": Model(name="deit_tiny_distilled_patch16_224", image_size=32),
    "swin": SWIN,
    "swin, v2": SWIN.model_copy(update={"name": "swinv2_tiny_window8_256"}),
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


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_layers_learn_at_timm_s_rates(model: Model) -> None:
    config = SupervisedConfig(kind="supervised", num_classes=5)
    objective = Supervised(build_encoder(model), 32, config)
    with_head = timm.create_model(model.name, **{**model_args(model), "num_classes": 5})
    names = {id(p): name for name, p in with_head.named_parameters()}
    expected = {
        names[id(p)]: group["lr_scale"]
        for group in param_groups_layer_decay(with_head, layer_decay=0.7)
        for p in group["params"]
    }
    groups = param_groups(objective, AdamW(base_lr=1.0, layer_decay=0.7))
    assert len({group["name"] for group in groups}) == len(groups) > 4
    names = {id(p): name for name, p in objective.named_parameters()}
    found = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert found.pop("head.weight") == found.pop("head.bias") == 1
    for name, scale in found.items():
        assert scale == pytest.approx(expected[name.removeprefix("encoder.")]), name
    assert min(found.values()) < 0.3


def test_layer_decay_needs_an_encoder_with_layers() -> None:
    with pytest.raises(InputError, match=r"optim\.layer_decay"):
        param_groups(nn.Linear(2, 3), AdamW(base_lr=1.0, layer_decay=0.7))


def trust(weight: Tensor, gradient: float) -> float:
    norm = float(weight.norm())
    return norm / gradient if norm and gradient else 1.0


def sgd(p: Tensor, grads: list[Tensor], lr: float, wd: float, adapt: bool) -> Tensor:
    velocity = torch.zeros_like(p)
    for g in grads:
        d = g + wd * p
        velocity = 0.8 * velocity + d
        p = p - lr * (d + 0.8 * velocity)
    return p


def lars(p: Tensor, grads: list[Tensor], lr: float, wd: float, adapt: bool) -> Tensor:
    """1708.03888, Eq. 6 and Algorithm 1, with the rate outside of the velocity."""
    velocity = torch.zeros_like(p)
    for g in grads:
        ratio = 0.01 * trust(p, float(g.norm() + wd * p.norm())) if adapt else 1.0
        velocity = 0.8 * velocity + ratio * (g + wd * p)
        p = p - lr * velocity
    return p


def lamb(p: Tensor, grads: list[Tensor], lr: float, wd: float, adapt: bool) -> Tensor:
    """1904.00962, Algorithm 2."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m, v = 0.8 * m + 0.2 * g, 0.7 * v + 0.3 * g * g
        r = (m / (1 - 0.8**t)) / ((v / (1 - 0.7**t)).sqrt() + 1e-5) + wd * p
        p = p - lr * (trust(p, float(r.norm())) if adapt else 1.0) * r
    return p


def adamw(p: Tensor, grads: list[Tensor], lr: float, wd: float, adapt: bool) -> Tensor:
    """1711.05101, Algorithm 2."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m, v = 0.8 * m + 0.2 * g, 0.7 * v + 0.3 * g * g
        p = p - lr * ((m / (1 - 0.8**t)) / ((v / (1 - 0.7**t)).sqrt() + 1e-5) + wd * p)
    return p


Update = Callable[[Tensor, list[Tensor], float, float, bool], Tensor]
KINDS: dict[str, tuple[OptimConfig, Update]] = {
    "adamw": (OPTIM, adamw),
    "sgd": (Sgd(kind="sgd", base_lr=1.0, momentum=0.8, nesterov=True, weight_decay=0.3), sgd),
    "lars": (Lars(kind="lars", base_lr=1.0, momentum=0.8, eta=0.01, weight_decay=0.3), lars),
    "lars, no decay": (Lars(kind="lars", base_lr=1.0, momentum=0.8, eta=0.01, weight_decay=0), lars),
    "lamb": (Lamb(kind="lamb", base_lr=1.0, betas=(0.8, 0.7), eps=1e-5, weight_decay=0.3), lamb),
    "lamb, no decay": (Lamb(kind="lamb", base_lr=1.0, betas=(0.8, 0.7), eps=1e-5, weight_decay=0), lamb),
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("optim", "update"), KINDS.values(), ids=KINDS.keys())
def test_five_steps_are_those_of_the_paper(optim: OptimConfig, update: Update, foreach: bool, prepared: bool) -> None:
    """In fp64, with state from `empty_state` and with what the optimizer itself creates; as on a CPU and as on CUDA."""
    torch.manual_seed(0)
    module = nn.Linear(3, 4).double()
    nn.init.zeros_(module.bias)  # the trust ratio of a norm of 0 is 1
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    grads = {name: [torch.randn_like(p) for _ in range(5)] for name, p in start.items()}
    optimizer = build_optimizer(module, optim)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
        group["foreach"] = foreach
        if prepared:
            for p in group["params"]:
                optimizer.state[p] = empty_state(group, p)
    for step in range(5):
        for name, p in module.named_parameters():
            p.grad = grads[name][step].clone()
        optimizer.step()
    for name, p in module.named_parameters():
        decayed = name == "weight"
        wd = optim.weight_decay if decayed else 0.0
        torch.testing.assert_close(p.detach(), update(start[name], grads[name], 0.1, wd, decayed), rtol=1e-6, atol=0)
    for group in optimizer.param_groups:
        counters = step_counters(optimizer, group, group["params"])
        assert {float(counter) for counter in counters} == (set() if optim.kind in ("sgd", "lars") else {5.0})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optim", [*(optim for optim, _ in KINDS.values()), Sgd(kind="sgd", base_lr=1.0, momentum=0.0)])
def test_empty_state_is_what_the_optimizer_would_have_made(optim: OptimConfig, fused: bool) -> None:
    module = nn.Linear(2, 3, bias=False)
    plain, prepared = (build_optimizer(module, optim, fused=fused) for _ in range(2))
    p, (group,) = module.weight, prepared.param_groups
    state = empty_state(group, p)
    p.grad = torch.randn(3, 2)
    plain.step()
    expected = {key: value for key, value in plain.state[p].items() if value is not None}
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert (state[key].dtype, state[key].shape, state[key].device) == (value.dtype, value.shape, value.device)
