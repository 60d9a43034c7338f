"""Whole runs with an online probe: their losses, what it learns, and what becomes of it when a run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import InputError
from data_pipeline.loader import evaluation_batches
from data_pipeline.procedural.make import make
from pretrain.augment.augment import prepare
from pretrain.checkpoints.checkpoint import Tensors, complete_checkpoints, digests, module_state
from pretrain.models.encoders import build_encoder
from pretrain.models.strict_loading import load_strictly
from pretrain.preflight import preflight
from pretrain.recipe.files import load_recipe
from pretrain.runtime.collectives import World
from tests.ranks import started
from tests.runs import MODEL, logged, losses, train, write_recipe
from tests.shards import write_shards

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "val", 27)  # no multiple of anything


@pytest.fixture(scope="module")
def recipe(shards: Path, val: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MAE, which has no labels of its own, with a probe and a validation set."""
    return write_recipe(
        tmp_path_factory.mktemp("recipe") / "r.yaml", shards,
        data={"train": str(shards), "val": str(val), "read_streams": 3, "shuffle_window": 16},
        schedule={"steps": STEPS, "warmup": 0.1}, online_probe={"lr": 0.1}, validation={"every_epochs": 0.4},
        checkpoint={"every_steps": 5, "keep_last": 9},
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps at ZeRO 2 on one rank; checkpoints at 5, 10 and 12."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(recipe, out)
    return out


def probed(out: Path) -> dict[int, dict[str, float]]:
    return logged(out, "probe/loss", "probe/top1")


SUPERVISED: dict[str, Any] = {
    "objective": {"kind": "supervised", "num_classes": 3},
    "model": {**MODEL, "options": {**MODEL["options"], "drop_path_rate": 0.3}},
    "optim": {"base_lr": 0.1, "clip_norm": 1.0},
    "engine": {"zero_stage": 3, "precision": "fp32"},
}
SIMSIAM: dict[str, Any] = {
    "objective": {"kind": "simsiam", "projector_width": 32, "predictor_width": 16},
    "model": {"name": "test_resnet", "image_size": 32},
    "engine": {"zero_stage": 1, "precision": "fp32"},
}


@pytest.mark.parametrize("groups", [SUPERVISED, SIMSIAM], ids=["supervised, drop path", "simsiam, batch norm"])
def test_losses_are_the_same_with_all_that_is_judged_on_the_way_and_with_nothing(
    shards: Path, val: Path, tmp_path: Path, groups: dict[str, Any]
) -> None:
    """Drop path draws randomness, batch norm keeps statistics; probe, validation and kNN touch neither."""
    groups = {**groups, "schedule": {"steps": 8}}
    judged = write_recipe(
        tmp_path / "judged.yaml", shards, **groups, data={"train": str(shards), "val": str(val), "read_streams": 3},
        online_probe={"every_steps": 1}, validation={"every_epochs": 0.3},
        evals=[
            {"kind": "knn", "train": str(shards), "test": str(val), "every_epochs": 0.3, "k": 5},
            {
                "kind": "linear", "train": str(shards), "test": str(val), "every_epochs": 0.6, "min_steps": 5,
                "learning_rates": [0.1], "epochs": 0,
            },
        ],
    )  # fmt: skip
    bare = write_recipe(tmp_path / "bare.yaml", shards, **groups, data={"train": str(shards), "read_streams": 3})
    train(judged, tmp_path / "judged", 2)
    train(bare, tmp_path / "bare", 2)
    assert losses(tmp_path / "judged") == losses(tmp_path / "bare")
    assert len(losses(tmp_path / "bare")) == 8
    assert probed(tmp_path / "judged").keys() == losses(tmp_path / "bare").keys()
    assert not probed(tmp_path / "bare")
    assert list(logged(tmp_path / "judged", "knn/top1_k5")) == [4, 8]
    assert list(logged(tmp_path / "judged", "linear2/top1")) == [8]
    assert len(list((tmp_path / "judged" / "evals").glob("*.json"))) == 3
    if groups["objective"]["kind"] == "supervised":
        validated = logged(tmp_path / "judged", "val/loss", "val/top1")
        assert list(validated) == [4, 8]
        assert validated[8]["val/top1"] > 0.6  # three colours: easily learnt
    ours, theirs = (digests(complete_checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("judged", "bare"))
    assert {name: digest for name, digest in ours.items() if not name.startswith("probe/")} == theirs


def prepared_in_a_run(_: World, path: Path, out: Path) -> list[tuple[int, bool]]:
    """Of every batch that a run brings to the device: the number of its views, and whether it has masks."""
    from pretrain import run

    found, prepare = [], run.prepare

    def recorded(batch: Batch, *arguments: Any) -> Batch:
        found.append((len(batch.views), batch.masks is not None))
        return prepare(batch, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "prepare", recorded)
        run.run(load_recipe(path), out)
    return found


def test_only_what_it_looks_at_is_prepared_again(shards: Path, tmp_path: Path) -> None:
    groups: dict[str, Any] = {"schedule": {"steps": 3}, "online_probe": {"every_steps": 2}}
    groups["logging"] = {"every_steps": 2, "tensorboard": False}
    masked = write_recipe(tmp_path / "mae.yaml", shards, **groups)
    paired = write_recipe(tmp_path / "simsiam.yaml", shards, **SIMSIAM, **groups)
    found = []
    for path in (masked, paired):
        with started(prepared_in_a_run, 1, path, tmp_path / path.stem, joined=False) as ranks:
            found += ranks.results()
    assert found[0] == [(1, True), (1, True), (1, False), (1, True)]
    assert found[1] == [(2, False), (2, False), (1, False), (2, False)]


def test_goes_on_at_other_world_sizes_and_stages(recipe: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "moved"
    for last, nproc, stage in ((3, 1, 1), (6, 2, 2), (8, 2, 3), (10, 1, 0), (STEPS, 1, 1)):
        train(recipe, out, nproc, f"engine.zero_stage={stage}", max_steps=last)
    found, expected = losses(out), losses(finished)
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    assert probed(out).keys() == expected.keys()
    for step, values in probed(finished).items():
        assert probed(out)[step] == pytest.approx(values, rel=1e-5), step


def test_validation_is_over_every_sample_once(recipe: Path, finished: Path, val: Path, tmp_path: Path) -> None:
    """Against the weights of the checkpoint, on all of the validation set at once; and on two ranks at ZeRO 3."""
    given = load_recipe(recipe)
    saved = complete_checkpoints(finished / "checkpoints")[-1]
    encoder = build_encoder(given.model)
    load_strictly(encoder, module_state(saved, "encoder."), where="the encoder")
    stored = Tensors(saved)
    mean, var, weight, bias = (stored.whole(f"probe/{name}") for name in ("mean", "var", "weight", "bias"))
    spec, data = BatchSpec(16, num_classes=3), given.data
    batches = evaluation_batches(
        open_dataset(str(val)), spec, data.preprocessing(spec.image_size), batch_size=99, max_pixels=data.max_pixels
    )
    (batch,) = (prepare(batch, torch.device("cpu"), data.mean, data.std) for batch in batches)
    assert batch.labels is not None
    with torch.no_grad():
        logits = (encoder.eval()(batch.views[0]) - mean) / (var + 1e-6).sqrt() @ weight.T + bias
    found = logged(finished, "val/probe_top1", "val/probe_loss")
    assert list(found) == [5, 10, 12]
    assert found[12]["val/probe_top1"] == pytest.approx((logits.argmax(1) == batch.labels).double().mean().item())
    assert found[12]["val/probe_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, batch.labels).item(), rel=1e-4
    )
    assert stored.whole("probe/steps").tolist() == [STEPS]
    out = Path(shutil.copytree(finished, tmp_path / "again"))
    for path in complete_checkpoints(out / "checkpoints")[1:]:
        shutil.rmtree(path)
    train(recipe, out, 2, "engine.zero_stage=3")
    assert logged(out, "val/probe_loss")[12]["val/probe_loss"] == pytest.approx(found[12]["val/probe_loss"], rel=1e-4)
    assert logged(out, "val/probe_top1")[12]["val/probe_top1"] == pytest.approx(found[12]["val/probe_top1"])


def test_it_may_come_and_go(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """A run goes on with a probe that it did not have, or without the one that it had; its losses do not care."""
    out = tmp_path / "run"
    train(recipe, out, 1, "online_probe=null", max_steps=4)
    log = train(recipe, out, max_steps=8)
    assert "the online probe starts anew: the checkpoint has none" in log
    assert list(probed(out)) == [5, 6, 7, 8]
    assert probed(out)[5]["probe/loss"] == pytest.approx(torch.tensor(3.0).log().item())
    log = train(recipe, out, 1, "online_probe=null")
    assert "the checkpoint's online probe is left behind" in log
    assert losses(out) == losses(finished)
    newest = complete_checkpoints(out / "checkpoints")[-1]
    assert not [name for name in Tensors(newest).shapes if name.startswith("probe/")]


def test_one_without_batch_norm_starts_anew_with_it(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(recipe, out, 1, "online_probe.batch_norm=false", max_steps=4)
    log = train(recipe, out, max_steps=6)
    assert "the online probe starts anew: the checkpoint has another" in log
    assert probed(out)[5]["probe/loss"] == pytest.approx(torch.tensor(3.0).log().item())


def test_it_learns_real_handwriting(tmp_path: Path) -> None:
    """Ten classes of an encoder that is told none of them."""
    for split, number in (("train", 600), ("test", 200)):
        make("digits", tmp_path / split, split=split, num_samples=number, size=16)
    path = write_recipe(
        tmp_path / "r.yaml", tmp_path / "train",
        data={"train": str(tmp_path / "train"), "val": str(tmp_path / "test"), "read_streams": 3,
              "views": {"scale": [0.6, 1.0], "flip": 0.0}},
        schedule={"steps": 80}, batch={"global_size": 64}, online_probe={},
    )  # fmt: skip
    train(path, tmp_path / "run")
    found = probed(tmp_path / "run")
    assert found[1]["probe/loss"] == pytest.approx(torch.tensor(10.0).log().item())
    assert found[80]["probe/loss"] < 0.9 * found[1]["probe/loss"]
    assert logged(tmp_path / "run", "val/probe_top1")[80]["val/probe_top1"] > 0.3  # by chance: 0.1


class TestRefused:
    """Before anything starts."""

    def refused(self, recipe: Path, folder: Path, *overrides: str) -> str:
        with pytest.raises(InputError) as caught:
            preflight(load_recipe(recipe, list(overrides)), 1, folder / "run")
        assert not (folder / "run").exists()
        return str(caught.value)

    def test_without_labels(self, recipe: Path, tmp_path: Path) -> None:
        bare = write_shards(tmp_path / "bare", 30, label=False)
        message = self.refused(recipe, tmp_path, f"data.train={bare}")
        assert "online_probe, data.train" in message
        assert "Leave online_probe out" in message
        assert "online_probe, data.val" in self.refused(recipe, tmp_path, f"data.val={bare}")
        preflight(load_recipe(recipe, [f"data.train={bare}", "online_probe=null"]), 1, tmp_path / "run")

    def test_steps_that_the_log_would_miss(self, recipe: Path) -> None:
        with pytest.raises(InputError, match=r"every_steps that divides logging\.every_steps 10, .*found 4"):
            load_recipe(recipe, ["online_probe.every_steps=4", "logging.every_steps=10"])
        with pytest.raises(InputError, match=r"online_probe\.lr"):
            load_recipe(recipe, ["online_probe.lr=0"])


def test_a_recipe_keeps_its_identity(recipe: Path) -> None:
    from pretrain.recipe.resolve import identity

    assert yaml.safe_load(recipe.read_text())["online_probe"]
    assert identity(load_recipe(recipe)) == identity(load_recipe(recipe, ["online_probe=null"]))
