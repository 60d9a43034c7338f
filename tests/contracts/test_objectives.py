"""What every objective of the recipe's union must hold; a new one joins by a case below and a recipe."""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import timm
import torch

from data_pipeline.batch import Batch, BatchSpec
from pretrain.augment.augment import augmentations
from pretrain.models.encoders import build_encoder
from pretrain.objectives.byol.config import ByolConfig
from pretrain.objectives.config import ObjectiveConfig, config_classes
from pretrain.objectives.contract import LossOutput, Objective
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.mae.config import MaeConfig
from pretrain.objectives.simmim.config import SimmimConfig
from pretrain.objectives.simsiam.config import SimSiamConfig
from pretrain.objectives.sum.config import SumConfig, Term
from pretrain.objectives.supervised.config import SupervisedConfig
from pretrain.optim.adamw.config import AdamW
from pretrain.optim.optimizers import build_optimizer, param_groups
from pretrain.recipe import recipe
from pretrain.recipe.files import load_recipe
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress
from tests.objectives import towers
from tests.ranks import run_ranks

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"
CONFIGS = config_classes()
PROGRESS = Progress(3, 10, 24)

TINY_VIT = recipe.Model(
    name="vit_tiny_patch16_224",
    image_size=16,
    patch_size=4,
    options={
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    },
)
CLASS_TOKEN_VIT = TINY_VIT.model_copy(
    update={"options": {"embed_dim": 16, "depth": 2, "num_heads": 2, "reg_tokens": 2}}
)
TINY_SWIN = recipe.Model(
    name="swin_tiny_patch4_window7_224",
    image_size=32,
    patch_size=2,
    options={"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "drop_path_rate": 0.0},
)
TINY_SWIN_V2 = TINY_SWIN.model_copy(update={"name": "swinv2_tiny_window8_256"})
TINY_RESNET = recipe.Model(name="test_resnet", image_size=32)


@dataclass(frozen=True)
class Case:
    model: recipe.ModelConfig
    config: ObjectiveConfig
    bf16_atol: float = 0.0  # of losses that start near 0

    def build(self, seed: int = 0) -> Objective:
        torch.manual_seed(seed)
        return build_objective(self.model, self.config)


MAE = MaeConfig(kind="mae", decoder_width=16, decoder_depth=1, decoder_heads=2)
SUPERVISED = SupervisedConfig(kind="supervised", num_classes=6, label_smoothing=0.1)
BYOL = ByolConfig(kind="byol", hidden_width=24, out_width=12, base_decay=0.9)
SIMSIAM = SimSiamConfig(kind="simsiam", projector_width=24, predictor_width=12)
SIMMIM = SimmimConfig(kind="simmim", mask_patch=8)
SUM = SumConfig(
    kind="sum",
    terms=(
        Term(objective=SUPERVISED),
        Term(weight=0.5, objective=SIMMIM),
    ),
)
# Little of BYOL: its batch norm leaves nothing but rounding of what some parameters get from it.
SUM_WITH_TEACHER = SumConfig(kind="sum", terms=(Term(weight=0.02, objective=BYOL), Term(objective=MAE)))
CASES = {
    "mae": Case(TINY_VIT, MAE),
    "mae, class token and registers": Case(CLASS_TOKEN_VIT, MAE),
    "supervised": Case(TINY_VIT, SUPERVISED),
    "supervised, class token and registers": Case(CLASS_TOKEN_VIT, SUPERVISED),
    "supervised, resnet": Case(TINY_RESNET, SUPERVISED),
    "supervised, binary": Case(TINY_VIT, SUPERVISED.model_copy(update={"loss": "bce", "over_classes": "sum"})),
    "byol": Case(TINY_RESNET, BYOL),
    "byol, vit": Case(TINY_VIT, BYOL),
    "simsiam": Case(TINY_RESNET, SIMSIAM, bf16_atol=1e-2),
    "simsiam, vit": Case(TINY_VIT, SIMSIAM, bf16_atol=1e-2),
    "supervised, swin": Case(TINY_SWIN, SUPERVISED),
    "simmim": Case(TINY_VIT, SIMMIM),
    "simmim, class token and registers": Case(CLASS_TOKEN_VIT, SIMMIM),
    "simmim, swin": Case(TINY_SWIN, SIMMIM),
    "simmim, swin v2": Case(TINY_SWIN_V2, SIMMIM),
    "sum": Case(TINY_VIT, SUM),
    "sum, swin": Case(TINY_SWIN, SUM),
    "sum, with a teacher": Case(TINY_VIT, SUM_WITH_TEACHER),
    "clip": Case(towers.OPEN_CLIP, towers.config("clip")),
    "clip, timm": Case(towers.TIMM, towers.config("clip", **towers.BESIDE_TIMM)),
    "siglip": Case(towers.OPEN_CLIP, towers.config("siglip")),
    "siglip, timm": Case(towers.TIMM, towers.config("siglip", **towers.BESIDE_TIMM)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def batch_for(needs: BatchSpec, size: int = 4, seed: int = 1) -> Batch:
    """A batch that holds what `needs` asks for, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size, 3, needs.image_size, needs.image_size)
    labels = masks = tokens = None
    if needs.num_classes is not None:
        labels = torch.randint(needs.num_classes, (size,), generator=generator)
    if needs.mask is not None:
        order = torch.rand(size, needs.mask.num_patches, generator=generator).argsort(1)
        masks = order < needs.mask.num_hidden
    if needs.tokens is not None:
        assert needs.tokens.vocab_size is not None
        shape_of_tokens = (size, needs.tokens.context_length)
        tokens = torch.randint(needs.tokens.vocab_size, shape_of_tokens, generator=generator)
    return Batch(
        keys=tuple(str(i) for i in range(size)),
        views=tuple(torch.randn(shape, generator=generator) for _ in range(needs.num_views)),
        labels=labels,
        masks=masks,
        tokens=tokens,
    )


def kind_of(config: type[recipe.Group]) -> str:
    return str(typing.get_args(config.model_fields["kind"].annotation)[0])


@pytest.mark.parametrize("config", CONFIGS, ids=kind_of)
def test_every_objective_has_a_case_and_a_recipe(config: type[recipe.Group]) -> None:
    assert any(isinstance(case.config, config) for case in CASES.values()), f"{kind_of(config)}: add a case above"
    recipes = [load_recipe(path, []) for path in sorted(RECIPES.rglob("*.yaml"))]
    assert any(isinstance(r.objective, config) for r in recipes), f"{kind_of(config)}: add a recipe in {RECIPES}"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_ours_can_be_built(path: Path) -> None:
    given = load_recipe(path)
    with torch.device("meta"):
        objective = build_objective(given.model, given.objective)
    augmentations(given, objective.needs)
    assert param_groups(objective, given.optim)


@every_case
def test_the_loss_is_a_finite_fp32_scalar_and_metrics_are_detached(case: Case) -> None:
    objective = case.build()
    batch = batch_for(objective.needs)
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = objective(batch, PROGRESS)
        assert isinstance(output, LossOutput)
        for value in (output.loss, *output.metrics.values()):
            assert (value.dtype, value.shape) == (torch.float32, ())
            assert torch.isfinite(value)
        assert output.loss.requires_grad
        assert not any(value.requires_grad for value in output.metrics.values())


@every_case
def test_bf16_is_near_fp32(case: Case) -> None:
    objective = case.build()
    batch = batch_for(objective.needs)
    exact = objective(batch, PROGRESS).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = objective(batch, PROGRESS).loss
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=case.bf16_atol)
    assert rounded != exact


@every_case
def test_gradients_reach_every_trainable_parameter(case: Case) -> None:
    """One that is reached by none would be frozen at random, and some engines wait for it for ever."""
    objective = case.build()
    with torch.no_grad():  # off the zeros at which some branches start
        for p in objective.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    objective(batch_for(objective.needs), PROGRESS).loss.backward()
    unreached = [
        name
        for name, p in objective.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any() or not torch.isfinite(p.grad).all())
    ]
    assert unreached == []


@every_case
def test_the_encoder_is_the_library_s_module_as_the_recipe_names_it(case: Case) -> None:
    objective = case.build()
    encoder = objective.encoder
    assert objective.get_submodule("encoder") is encoder
    plain = build_encoder(case.model) if case.model.library == "open_clip" else timm.create_model(case.model.name)
    assert type(encoder).__module__.split(".")[0] == case.model.library
    assert type(encoder) is type(plain)
    assert type(encoder).forward is type(plain).forward
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())
    size = case.model.image_size
    width = encoder.output_dim if case.model.library == "open_clip" else encoder.head_hidden_size
    assert encoder.eval()(torch.zeros(2, 3, size, size)).shape == (2, width)


@every_case
def test_needs_are_the_model_s_and_are_all_that_is_used(case: Case) -> None:
    objective = case.build()
    needs = objective.needs
    assert needs.image_size == case.model.image_size
    assert needs.num_views >= 1
    if needs.mask is not None:
        assert 0 < needs.mask.num_hidden < needs.mask.num_patches
    batch = batch_for(needs)
    for missing in ("labels", "masks", "tokens"):
        if getattr(batch, missing) is not None:
            with pytest.raises(ValueError, match=missing):
                objective(replace(batch, **{missing: None}), PROGRESS)


@every_case
def test_the_start_is_a_function_of_the_seed(case: Case) -> None:
    first, second, other = case.build(1), case.build(1), case.build(2)
    batch = batch_for(first.needs)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert torch.equal(first(batch, PROGRESS).loss, second(batch, PROGRESS).loss)
    assert not torch.equal(first(batch, PROGRESS).loss, other(batch, PROGRESS).loss)


@every_case
def test_evaluation_mode_draws_no_random_numbers_and_changes_no_buffer(case: Case) -> None:
    objective = case.build().eval()
    batch = batch_for(objective.needs)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    random_state = torch.get_rng_state()
    assert torch.equal(objective(batch, PROGRESS).loss, objective(batch, PROGRESS).loss)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


@every_case
def test_a_few_steps_on_one_batch_lower_its_loss(case: Case) -> None:
    objective = case.build()
    batch = batch_for(objective.needs)
    optimizer = build_optimizer(objective, AdamW(base_lr=1e-3))
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = objective(batch, PROGRESS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@every_case
def test_every_trainable_parameter_is_in_exactly_one_group(case: Case) -> None:
    objective = case.build()
    grouped = [id(p) for group in param_groups(objective, AdamW(base_lr=1e-3)) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in objective.parameters() if p.requires_grad)


OPTIM = AdamW(base_lr=1e-3)


@torch.no_grad()
def teach(objective: Objective) -> None:
    """Moves momentum teachers, as the engine does after a step."""
    for target, online, decay in objective.teachers(PROGRESS):
        for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
            slow.copy_(decay * slow + (1 - decay) * fast)


def sharded_losses(world: World) -> dict[str, list[float]]:
    from pretrain.engine.engine import Engine  # imports DeepSpeed, which only the processes of this test need

    losses: dict[str, list[float]] = {}
    for name, case in CASES.items():
        engine = Engine(
            case.build(),
            OPTIM,
            recipe.EngineConfig(zero_stage=3, precision="fp32"),
            world=world,
            device=torch.device("cpu"),
            micro_size=4,
            accumulation=1,
            seed=0,
        )
        batches = [batch_for(engine.objective.needs, seed=seed) for seed in range(3)]
        losses[name] = [float(engine.step((batch,), PROGRESS, 1e-3).metrics["loss"]) for batch in batches]
    return losses


def test_sharded_weights_train_as_whole_ones_do() -> None:
    """At ZeRO 3 a weight is there only while its own module computes, and MAE reads some of the encoder's."""
    sharded = run_ranks(sharded_losses, 1)[0]
    for name, case in CASES.items():
        objective = case.build()
        optimizer = build_optimizer(objective, OPTIM)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        for seed, expected in enumerate(sharded[name]):
            optimizer.zero_grad()
            loss = objective(batch_for(objective.needs, seed=seed), PROGRESS).loss
            loss.backward()
            optimizer.step()
            teach(objective)
            assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6), f"{name}, step {seed}"
