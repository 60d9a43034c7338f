"""What every objective of the table must hold; a new one joins by its test module (tests/objectives) and a recipe."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch

from pretrain.augment.augment import augmentations
from pretrain.models.encoders import build_encoder
from pretrain.objectives.config import KINDS
from pretrain.objectives.contract import LossOutput, Objective
from pretrain.objectives.kinds import build_objective
from pretrain.optim.adamw.config import AdamW
from pretrain.optim.optimizers import build_optimizer, param_groups
from pretrain.recipe import recipe
from pretrain.recipe.files import load_recipe
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress
from tests.contracts import listing
from tests.objectives.cases import Case, Twin, all_cases, batch_for, module_of
from tests.objectives.naive import assert_same_gradients, weights_of
from tests.ranks import run_ranks

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"
PROGRESS = Progress(3, 10, 24)

CASES = all_cases()
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_has_cases_a_recipe_and_a_line_of_documentation(kind: str) -> None:
    cases = module_of(kind).CASES
    assert cases
    for name, case in cases.items():
        assert name.split(",")[0] == case.config.kind == kind
    recipes = [load_recipe(path, []) for path in sorted(RECIPES.rglob("*.yaml"))]
    assert any(r.objective.kind == kind for r in recipes), f"{kind}: add a recipe in {RECIPES}"
    line = import_module(f"pretrain.objectives.{kind}").__doc__
    assert line, f"{kind}: say in its __init__.py what it is and where it is published"
    assert line in listing.objectives()


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_the_naive_twin(kind: str) -> None:
    """In fp64, off the zeros and ones of the start, which would hide a wrong formula."""
    twin: Twin = module_of(kind).TWIN
    assert twin.case.config.kind == kind
    objective = twin.case.build().double()
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    batch = batch_for(objective.needs, twin.batch_size, dtype=torch.float64)
    weights = weights_of(objective)
    loss, expected = objective(batch, PROGRESS).loss, twin.loss(objective, weights, batch)
    loss.backward()
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert_same_gradients(objective, weights)


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
