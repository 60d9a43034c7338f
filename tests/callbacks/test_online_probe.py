"""The online probe: the encoder does not notice it, and it is the same classifier at any ZeRO stage and world size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import FieldError
from pretrain.callbacks.online_probe import OnlineProbe, ProbeShape, find_probe_shape
from pretrain.checkpoints import checkpoint
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.engine.engine import Engine
from pretrain.objectives.kinds import build_objective
from pretrain.recipe.recipe import OnlineProbe as Config
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress, RunState
from tests.contracts.test_objectives import CASES, batch_for
from tests.engine.test_engine import make_engine
from tests.ranks import run_ranks
from tests.shards import write_images
from tests.toy import split, toy_batch

NUM_CLASSES = 6
# At ZeRO 3 those of which some parameters are large enough to be sharded, used by the encoder or not.
AT_STAGE = {
    0: ("supervised, resnet", "simsiam"),
    1: ("mae", "clip"),
    2: ("simmim, swin",),
    3: ("mae", "byol", "sum, with a teacher", "siglip, timm"),
}
TOY = ProbeShape(width=11, num_classes=3)


def shape_of(name: str) -> ProbeShape:
    with torch.device("meta"):
        objective = build_objective(CASES[name].model, CASES[name].config)
    size = objective.needs.image_size
    with torch.no_grad():
        width = objective.encoder.eval()(torch.empty(2, 3, size, size, device="meta")).shape[1]
    return ProbeShape(width, NUM_CLASSES)


def share_of(name: str, world: World, at: int) -> Batch:
    """This rank's part of the global batch of 8 of a step, with labels whatever the objective needs."""
    needs = replace(CASES[name].build().needs, num_classes=NUM_CLASSES)
    whole = batch_for(needs, 8, seed=at)
    rows = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
    assert whole.labels is not None
    return replace(
        whole,
        keys=whole.keys[rows],
        views=tuple(view[rows] for view in whole.views),
        labels=whole.labels[rows],
        masks=None if whole.masks is None else whole.masks[rows],
        tokens=None if whole.tokens is None else whole.tokens[rows],
    )


def of_objective(world: World, names: tuple[str, ...], stage: int) -> dict[str, Any]:
    """Losses of two steps with and without a probe, whole weights after them, and the probe's own metrics."""
    found = {}
    for name in names:
        shape = shape_of(name)
        by_probe = []
        for probed in (False, True):
            engine = make_engine(world, stage, objective=CASES[name].build())
            probe = OnlineProbe(Config(), shape, engine) if probed else None
            losses, metrics = [], []
            for at in range(2):
                batch = share_of(name, world, at)
                losses.append(float(engine.step([batch], Progress(at, 2, 0), 1e-3).metrics["loss"]))
                if probe is not None:
                    metrics.append({k: float(v) for k, v in probe.train([batch], at + 1).items()})
                    probe.measure(batch)
            weights = engine.materialize(engine.objective)
            by_probe.append((losses, weights, metrics))
        found[name] = by_probe
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", AT_STAGE)
def test_no_objective_notices_it(stage: int) -> None:
    first, second = run_ranks(of_objective, 2, AT_STAGE[stage], stage)
    for name in AT_STAGE[stage]:
        (losses, weights, _), (probed_losses, probed_weights, metrics) = first[name]
        assert losses == probed_losses, name
        assert all(torch.equal(weights[key], probed_weights[key]) for key in weights), name
        assert metrics == second[name][1][2], name
        at_start, next_one = (values["probe/loss"] for values in metrics)
        assert at_start == pytest.approx(math.log(NUM_CLASSES)), name
        assert next_one != at_start, name


def of_toy(
    world: World, stage: int, accumulation: int, options: dict[str, Any], dropout: float = 0.0, probed: bool = True
) -> tuple[Any, ...]:
    """Four steps: losses, the probe's metrics, its state, whole weights and buffers of the objective."""
    engine = make_engine(world, stage, accumulation, dropout=dropout, batch_norm=accumulation == 1)
    probe = OnlineProbe(Config(**options), TOY, engine)
    losses, metrics = [], []
    for at in range(4):
        batches = split(toy_batch(at), world.rank, world.size, accumulation)
        result = engine.step(batches, Progress(at, 10, 0), 1e-2)
        losses.append(float(result.metrics["loss"]))
        if probed:
            metrics.append({name: float(value) for name, value in probe.train(batches, at + 1).items()})
            assert all(module.training for module in engine.objective.modules())
    return losses, metrics, state_of(probe), engine.materialize(engine.objective)


def state_of(probe: OnlineProbe) -> dict[str, Tensor]:
    return {fragment.name: fragment.data.view(fragment.shape).clone() for fragment in probe.fragments()}


TOYS = [(1, {"weight_decay": 0.1}), (2, {}), (2, {"batch_norm": False})]


def of_toys(world: World, stages: tuple[int, ...]) -> list[list[tuple[Any, ...]]]:
    return [[of_toy(world, stage, *toy) for toy in TOYS] for stage in stages]


def test_one_rank_times_8_is_two_times_4_at_every_stage() -> None:
    """However the batch is cut. In the first, a bias before a batch norm is left to rounding, and with it the mean."""
    (alone,) = run_ranks(of_toys, 1, (0,))[0]
    for first_rank, second_rank in zip(*run_ranks(of_toys, 2, (0, 1, 2, 3)), strict=True):
        for (accumulation, _), first, second, expected in zip(TOYS, first_rank, second_rank, alone, strict=True):
            assert first[1] == second[1], "equal on all ranks"
            assert all(torch.equal(value, second[2][name]) for name, value in first[2].items())
            for ours, theirs in zip(first[1], expected[1], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-6)
            for name in expected[2].keys() - ({"probe/mean"} if accumulation == 1 else set()):
                torch.testing.assert_close(first[2][name], expected[2][name], rtol=1e-5, atol=1e-6)


def with_and_without(world: World, stages: tuple[int, ...]) -> list[list[tuple[Any, ...]]]:
    return [[of_toy(world, stage, 1, {}, 0.3, probed) for probed in (True, False)] for stage in stages]


def test_dropout_and_running_statistics_stay_what_they_are() -> None:
    for probed, without in run_ranks(with_and_without, 2, (0, 1, 2, 3))[0]:
        assert probed[0] == without[0]
        assert any("running_mean" in name for name in without[3])
        assert all(torch.equal(probed[3][name], value) for name, value in without[3].items())


PROBED = 13  # steps; from the 11th on the running statistics are no plain averages any more


def plain(world: World) -> tuple[list[Any], list[Any], dict[str, Tensor], dict[str, Tensor]]:
    """Against torch's own batch norm, linear layer and SGD on the features of the encoder, every second step."""
    engine = make_engine(world, 0, batch_norm=True)
    probe = OnlineProbe(Config(lr=0.2, weight_decay=0.1, every_steps=2), TOY, engine)
    norm, linear = nn.BatchNorm1d(11, eps=1e-6, affine=False), nn.Linear(11, 3)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    groups = [{"params": [linear.weight], "weight_decay": 0.1}, {"params": [linear.bias]}]
    sgd = torch.optim.SGD(groups, lr=0.2, momentum=0.9)
    ours, theirs, moments = [], [], []
    for at in range(2 * PROBED):
        batch = toy_batch(at)
        engine.step([batch], Progress(at, 99, 0), 1e-2)
        ours.append({name: float(value) for name, value in probe.train([batch], at + 1).items()})
        if at % 2 == 0:
            assert ours.pop() == {}
            continue
        with torch.no_grad():
            features = engine.objective.encoder.eval()(batch.views[0])
        logits = linear(norm(features))
        loss = nn.functional.cross_entropy(logits, batch.labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        moments.append(torch.stack([features.mean(0), features.var(0, unbiased=False)]))
        theirs.append(
            {"probe/loss": loss.item(), "probe/top1": (logits.argmax(1) == batch.labels).float().mean().item()}
        )
    mean, var = torch.stack(moments[:10]).mean(0)
    for latest_mean, latest_var in moments[10:]:
        mean, var = 0.9 * mean + 0.1 * latest_mean, 0.9 * var + 0.1 * latest_var
    expected = {"weight": linear.weight.detach(), "bias": linear.bias.detach(), "mean": mean, "var": var}
    return ours, theirs, state_of(probe), expected


def test_it_is_batch_norm_a_linear_layer_and_sgd() -> None:
    """Running statistics: the plain average of the first ten batches' moments, then a tenth of each further one."""
    ours, theirs, state, expected = run_ranks(plain, 1)[0]
    assert len(ours) == len(theirs) == PROBED
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(state[f"probe/{name}"], value, rtol=1e-4, atol=1e-5)
    assert state["probe/steps"].tolist() == [PROBED]


def odd_batches(world: World) -> dict[str, Any]:
    engine = make_engine(world, 0)
    probe = OnlineProbe(Config(), TOY, engine)
    batch = toy_batch(0)
    assert batch.labels is not None
    probe.train([batch], 1)
    before = state_of(probe)
    infinite = replace(batch, views=(batch.views[0] * torch.inf,))
    found: dict[str, Any] = {"infinite": float(probe.train([infinite], 2)["probe/loss"])}
    found["unchanged"] = all(torch.equal(value, before[name]) for name, value in state_of(probe).items())
    hard = probe.measure(batch)
    soft = probe.measure(replace(batch, labels=nn.functional.one_hot(batch.labels, 3).double()))
    found["soft"] = all(torch.allclose(hard[name], soft[name]) for name in hard)
    mixed = probe.measure(replace(batch, labels=torch.tensor([[0.3, 0.7, 0.0]]).expand(8, 3)))
    ones, twos = (probe.measure(replace(batch, labels=torch.full((8,), label))) for label in (0, 1))
    found["mixed"] = (mixed, ones, twos)
    return found


def test_what_is_not_finite_changes_nothing_and_labels_may_be_soft() -> None:
    found = run_ranks(odd_batches, 1)[0]
    assert found["infinite"] != found["infinite"]
    assert found["unchanged"]
    assert found["soft"]
    mixed, ones, twos = found["mixed"]
    expected = 0.3 * ones["probe_loss"] + 0.7 * twos["probe_loss"]
    torch.testing.assert_close(mixed["probe_loss"], expected)
    assert mixed["probe_top1"] == twos["probe_top1"], "the largest counts"


def steps(engine: Engine, probe: OnlineProbe, world: World, first: int, last: int) -> list[float]:
    found = []
    for at in range(first, last):
        batches = split(toy_batch(at), world.rank, world.size, 1)
        engine.step(batches, Progress(at, 99, 0), 1e-2)
        found.append(float(probe.train(batches, at + 1)["probe/loss"]))
    return found


def save(folder: Path, engine: Engine, probe: OnlineProbe | None, world: World) -> None:
    auxiliary = () if probe is None else probe.fragments()
    writer = CheckpointWriter(folder, engine.state, world=world, keep_last=5, say=lambda _: None, auxiliary=auxiliary)
    writer.save(RunState(Progress(3, 99, 24), cursor=24))
    writer.finish()


def hand_on(world: World, source: Path | None, target: Path, stage: int) -> list[float]:
    engine = make_engine(world, stage, batch_norm=True, seed=0 if source is None else 7)
    probe = OnlineProbe(Config(), TOY, engine)
    if source is None:
        steps(engine, probe, world, 0, 3)
    else:
        steps(engine, probe, world, 50, 51)  # another state, to be replaced entirely
        opened = checkpoint.open_checkpoint(source, world)
        checkpoint.load(opened, engine.state)
        assert checkpoint.load_auxiliary(opened, probe.fragments())
    save(target, engine, probe, world)
    return steps(engine, probe, world, 3, 8)


def test_a_checkpoint_brings_it_back_at_any_world_size_and_stage(tmp_path: Path) -> None:
    expected = run_ranks(hand_on, 1, None, tmp_path / "start", 1)[0]
    source = tmp_path / "start" / "step_00000003"
    original = checkpoint.digests(source)
    assert sum(name.startswith("probe/") for name in original) == 7
    assert not any(name.startswith("probe/") for name in checkpoint.module_state(source))
    for stop, (world_size, stage) in enumerate([(1, 1), (2, 3), (1, 0)]):
        losses = run_ranks(hand_on, world_size, source, tmp_path / str(stop), stage)[0]
        source = tmp_path / str(stop) / "step_00000003"
        assert checkpoint.digests(source) == original
        if (world_size, stage) == (1, 1):
            assert losses == expected, "to the bit"
        assert losses == pytest.approx(expected, rel=1e-5)


def take_or_leave(world: World, folder: Path) -> list[bool]:
    engine = make_engine(world, 1)
    probe = OnlineProbe(Config(), TOY, engine)
    other = OnlineProbe(Config(), ProbeShape(11, 4), engine)
    bare = OnlineProbe(Config(batch_norm=False), TOY, engine)
    save(folder / "with", engine, probe, world)
    save(folder / "without", engine, None, world)
    found = []
    save(folder / "bare", engine, bare, world)
    for name, wanted in (
        ("with", probe), ("bare", bare), ("with", other), ("without", probe), ("with", bare), ("bare", probe),
    ):  # fmt: skip
        opened = checkpoint.open_checkpoint(folder / name / "step_00000003", world)
        checkpoint.load(opened, engine.state)  # the training's state fits, whatever there is beside it
        before = state_of(wanted)
        found.append(checkpoint.load_auxiliary(opened, wanted.fragments()))
        assert all(torch.equal(value, before[key]) for key, value in state_of(wanted).items())
    return found


def test_one_of_another_shape_or_norm_or_none_at_all_is_not_taken(tmp_path: Path) -> None:
    assert run_ranks(take_or_leave, 1, tmp_path)[0] == [True, True, False, False, False, False]


class TestShape:
    def test_classes_are_the_objectives_or_those_of_the_data(self, tmp_path: Path) -> None:
        write_images(tmp_path / "data", 20, num_classes=4)
        data = open_dataset(str(tmp_path / "data"))
        with torch.device("meta"):
            mae, supervised = (build_objective(CASES[n].model, CASES[n].config) for n in ("mae", "supervised"))
        assert find_probe_shape(mae, data, None) == ProbeShape(16, 4)
        assert find_probe_shape(supervised, data, data) == ProbeShape(16, 6)

    def test_data_without_labels_or_with_more_of_them_are_refused(self, tmp_path: Path) -> None:
        write_images(tmp_path / "four", 20, num_classes=4)
        write_images(tmp_path / "five", 20, num_classes=5)
        (tmp_path / "bare").mkdir()
        for image in (tmp_path / "four").glob("*/*.jpg"):
            (tmp_path / "bare" / f"{image.stem}.jpg").write_bytes(image.read_bytes())
        four, five, bare = (open_dataset(str(tmp_path / name)) for name in ("four", "five", "bare"))
        with torch.device("meta"):
            mae = build_objective(CASES["mae"].model, CASES["mae"].config)
        with pytest.raises(FieldError, match=r"online_probe, data\.train, label field(?s:.)*Leave online_probe out"):
            find_probe_shape(mae, bare, None)
        with pytest.raises(FieldError, match=r"online_probe, data\.val, label field(?s:.)*found label 4"):
            find_probe_shape(mae, four, five)
        with pytest.raises(FieldError, match=r"online_probe, data\.val, label field"):
            find_probe_shape(mae, four, bare)
