"""Who is decayed and at which rate, and that every optimizer computes what its paper says."""

from __future__ import annotations

from importlib import import_module

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from data_pipeline.errors import InputError
from pretrain.models.encoders import build_encoder, model_args
from pretrain.objectives.supervised.config import SupervisedConfig
from pretrain.objectives.supervised.objective import Supervised
from pretrain.optim.adamw.config import AdamW
from pretrain.optim.config import KINDS, OptimConfig
from pretrain.optim.optimizers import build_optimizer, empty_state, param_groups, step_counters
from pretrain.optim.sgd.config import Sgd
from pretrain.recipe.recipe import Model
from tests.contracts import listing
from tests.optim.cases import Update, all_cases, module_of

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


CASES = all_cases()


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("optim", CASES.values(), ids=CASES.keys())
def test_five_steps_are_those_of_the_paper(optim: OptimConfig, foreach: bool, prepared: bool) -> None:
    """In fp64, with state from `empty_state` and with what the optimizer itself creates; as on a CPU and as on CUDA."""
    update: Update = module_of(optim.kind).update
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
        assert {float(counter) for counter in counters} == ({5.0} if module_of(optim.kind).COUNTS_STEPS else set())


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_has_cases_and_a_line_of_documentation(kind: str) -> None:
    cases = module_of(kind).CASES
    assert cases
    assert all(name.split(",")[0] == case.kind == kind for name, case in cases.items())
    line = import_module(f"pretrain.optim.{kind}").__doc__
    assert line, f"{kind}: say in its __init__.py what it is and where it is published"
    assert line in listing.optimizers()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "optim", [*CASES.values(), Sgd(kind="sgd", base_lr=1.0, momentum=0.0)], ids=[*CASES, "sgd, no momentum"]
)
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
