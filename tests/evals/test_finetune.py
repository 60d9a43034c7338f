"""Fine-tuning: the encoder that training starts from, the paper's recipe, and a run that is tested once at its end."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file

from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import CheckpointError, InputError, RecipeError, RunError
from data_pipeline.samples.preprocessing import Preprocessing
from launch.commands.eval_training import LocalTrainer
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction
from pretrain.evals.finetune.config import FinetuneConfig
from pretrain.evals.finetune.protocol import Finetune, _unseen, _watched
from pretrain.evals.finetune.recipe import finetune_recipe, finetuned_model, starting_encoder, usual_precision
from pretrain.evals.pseudo_label import load_teacher
from pretrain.evals.result import EvalReport
from pretrain.evals.sources.load import load_source
from pretrain.evals.sources.timm_names import Architecture
from pretrain.evals.task import Task
from pretrain.models.config import Model
from pretrain.models.encoder_folders import save_encoder
from pretrain.models.encoders import build_encoder
from pretrain.models.folders import weights_sha256
from pretrain.recipe.files import dump, load_recipe
from pretrain.recipe.recipe import Recipe
from pretrain.runtime.signals import STOPPED
from tests import runs
from tests.evals.conftest import Folders, small_encoder
from tests.evals.test_commands import evaluate
from tests.launch.suites import make_run

MODEL = Model(
    name="vit_tiny_patch16_224",
    image_size=8,
    patch_size=4,
    options={"depth": 2, "embed_dim": 24, "num_heads": 2},
)
SMALL = ["--paper", "mae", "--epochs", "1", "--batch-size", "50", "--set", "data.augment=[]"]
SMALL += ["--set", "runtime.peak_tflops=0.1", "--set", "runtime.threads=1", "--set", "logging.tensorboard=false"]


def saved(folder: Path, model: Model = MODEL, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    state = build_encoder(model).state_dict()
    save_encoder(
        folder, state, model, Preprocessing(model.judged_size, (0.5, 0.5, 0.5), (0.4, 0.4, 0.4), eval_crop=0.9)
    )
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return load_source(str(saved(tmp_path / "encoder")))


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        MODEL.model_copy(update={"name": "deit_tiny_patch16_224"}),
        Model(name="test_resnet", image_size=32),
        Model(
            name="swin_tiny_patch4_window7_224",
            image_size=32,
            options={"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2},
        ),
    ],
    ids=lambda model: model.name,
)
def test_the_model_of_a_folder_is_that_of_the_recipe(model: Model, tmp_path: Path) -> None:
    found = finetuned_model(load_source(str(saved(tmp_path / "encoder", model))))
    assert found.model_dump() == model.model_dump()


def test_the_model_of_a_timm_name_and_of_a_file(tmp_path: Path) -> None:
    architecture = Architecture("vit_tiny_patch16_224", 8, {"patch_size": 4, "depth": 1})
    fresh = load_source("vit_tiny_patch16_224", random_init=True, architecture=architecture)
    save_file(fresh.module.state_dict(), tmp_path / "weights.safetensors")
    of_file = load_source(str(tmp_path / "weights.safetensors"), architecture=architecture)
    for encoder in (fresh, of_file):
        assert finetuned_model(encoder).model_dump() == MODEL.model_copy(update={"options": {"depth": 1}}).model_dump()


def test_an_encoder_that_recipes_cannot_build_is_refused(encoder: Encoder) -> None:
    with pytest.raises(InputError, match="timm ViT, Swin or ResNet"):
        finetuned_model(small_encoder())
    encoder.module.norm.eps = 0.5  # type: ignore[union-attr, assignment]
    with pytest.raises(CheckpointError, match="the same features"):
        finetuned_model(encoder)


def test_the_paper_s_recipe_is_the_paper_s(tmp_path: Path) -> None:
    """What MAE's own command for ViT-B says, key by key."""
    module = Architecture("vit_base_patch16_224", None, {"depth": 1})
    encoder = load_source("vit_base_patch16_224", random_init=True, architecture=module)
    recipe = finetune_recipe(
        encoder, FinetuneConfig(train="t", test="", paper="mae"), num_classes=1000, start=tmp_path
    ).model_dump()
    optim = recipe["optim"]
    assert (optim["base_lr"], optim["lr_batch"], optim["layer_decay"]) == (5e-4, 256, 0.65)
    assert (optim["kind"], optim["weight_decay"], optim["betas"]) == ("adamw", 0.05, (0.9, 0.999))
    assert recipe["optim"]["clip_norm"] is None
    schedule = recipe["schedule"]
    assert (recipe["batch"]["global_size"], schedule["epochs"], schedule["warmup"]) == (1024, 100, 0.05)
    assert schedule["final_lr"] * 5e-4 * 4 == pytest.approx(1e-6)  # of the peak at batch 1024
    assert recipe["data"]["mixing"] == {"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "switch_probability": 0.5}
    (augment,) = recipe["data"]["augment"]
    assert augment["rand_augment"] == {
        "num_ops": 2, "magnitude": 9.0, "magnitude_std": 0.5, "probability": 0.5, "increasing": True,
    }  # fmt: skip
    assert (augment["erasing"]["probability"], augment["erasing"]["mode"]) == (0.25, "pixel")
    assert (augment["jitter"], augment["blur"], augment["grayscale"], augment["solarize"]) == (None, None, 0, 0)
    assert recipe["data"]["views"]["scale"] == (0.08, 1.0)
    assert recipe["objective"]["label_smoothing"] == 0.1
    assert recipe["objective"]["classifier_init"] == 2e-5
    assert recipe["model"]["options"] == {"depth": 1, "drop_path_rate": 0.1, "global_pool": "avg", "fc_norm": True}
    assert recipe["ema"] is None
    resnet = load_source("test_resnet", random_init=True)
    with pytest.raises(InputError, match="expected a ViT"):
        finetune_recipe(resnet, FinetuneConfig(train="t", test="", paper="mae"), num_classes=3, start=tmp_path)


@pytest.mark.parametrize("native", ["bf16", "fp32"])
def test_a_gpu_trains_in_bf16_where_it_has_instructions_for_it(monkeypatch: pytest.MonkeyPatch, native: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native == "bf16")
    assert usual_precision("auto") == usual_precision("cuda") == native
    assert usual_precision("cpu") == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usual_precision("auto") == "fp32"


def test_training_starts_from_the_encoder_but_for_the_norm_of_the_mean(encoder: Encoder) -> None:
    module, new, left = starting_encoder(encoder, MODEL, seed=1)
    assert (weights_sha256(module), new, left) == (encoder.weights_sha256(), (), ())
    pooled = MODEL.model_copy(update={"options": {**MODEL.options, "global_pool": "avg", "fc_norm": True}})
    module, new, left = starting_encoder(encoder, pooled, seed=1)
    assert (new, left) == (("fc_norm.bias", "fc_norm.weight"), ("norm.bias", "norm.weight"))
    assert module.fc_norm.weight.eq(1).all()  # type: ignore[union-attr, operator]
    given = encoder.module.state_dict()
    assert all(torch.equal(t, given[name]) for name, t in module.state_dict().items() if name not in new)
    larger = MODEL.model_copy(update={"image_size": 16})
    with pytest.raises(CheckpointError, match="pos_embed"):
        starting_encoder(encoder, larger, seed=1)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.train=elsewhere", "data.train"),
        ("objective.num_classes=11", "objective.num_classes"),
        ("init_from=elsewhere", "init_from"),
        ("optim.layer_decai=0.5", "layer_decay"),
    ],
)
def test_an_override_may_not_change_what_is_asked(
    encoder: Encoder, override: str, told: str, folders: Folders, tmp_path: Path
) -> None:
    data = ["--train", folders.train, "--test", folders.test, "--out", str(tmp_path / "out.json")]
    with pytest.raises(RecipeError, match=told):
        evaluate("finetune", str(encoder.description["source"]), *data, "--set", override)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("in_a_job", [False, True])
@pytest.mark.parametrize("status", [0, STOPPED, 1])
def test_the_ranks_are_given_the_recipe(
    encoder: Encoder, status: int, in_a_job: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = finetune_recipe(encoder, FinetuneConfig(train="t", test=""), num_classes=3, start=tmp_path)
    seen: list[object] = []

    def launch(
        arguments: list[str], num_ranks: int, threads: int | None, passed_on: dict[int, int], second_ends: bool
    ) -> int:
        assert second_ends != in_a_job, "schedulers repeat their word"
        assert passed_on[signal.SIGTERM] == signal.SIGUSR2, "whoever stops us may have told every process of ours"
        seen.extend([load_recipe(arguments[0]), *arguments[1:], num_ranks])
        return status

    monkeypatch.setattr("launch.ranks.launcher.launch", launch)
    if in_a_job:
        monkeypatch.setenv("PRETRAIN_ATTEMPT", "0")
    with pytest.raises(typer.Exit) if status else nullcontext() as error:
        LocalTrainer(3).train(recipe, tmp_path / "run")
    assert error is None or error.value.exit_code == status, "what becomes of a job depends on it"
    assert seen == [recipe, "--out", str(tmp_path / "run"), 3]


def _forked(max_steps: int | None = None) -> Callable[[LocalTrainer, Recipe, Path], None]:
    """Training as a local trainer's, without importing everything again."""

    def train(trainer: LocalTrainer, recipe: Recipe, run: Path) -> None:
        path = run.with_suffix(".yaml")
        path.write_text(dump(recipe))
        runs.train(path, run, max_steps=max_steps)

    return train


def test_the_last_step_is_tested_once(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = saved(tmp_path / "encoder"), tmp_path / "out"
    data = ["--train", folders.train, "--test", folders.test, "--out", str(out.with_suffix(".json"))]
    monkeypatch.setattr(LocalTrainer, "train", _forked(max_steps=4))
    with pytest.raises(RunError, match="step 4 of 6"):
        evaluate("finetune", str(source), *data, *SMALL)
    assert not out.with_suffix(".json").exists()
    monkeypatch.setattr(LocalTrainer, "train", _forked())
    evaluate("finetune", str(source), *data, *SMALL)
    report = EvalReport.load(out.with_suffix(".json"))
    test = open_dataset(folders.test)
    assert sorted(report.outcomes.keys) == sorted(test.read(i).key for i in range(test.num_samples))
    assert report.metrics["top5"] >= report.value == 100 * report.outcomes.correct.mean()
    assert report.protocol["preprocessing"]["eval_crop"] == 0.875  # type: ignore[index]
    assert report.protocol["recipe"]["optim"]["eps"] == 1e-8  # type: ignore[index]
    assert str(tmp_path) not in json.dumps(report.protocol)  # or elsewhere it would be another question
    assert report.protocol["resolved"]["total_steps"] == 6  # type: ignore[index]
    assert report.weights_sha256 == load_source(str(source)).weights_sha256()

    teacher = load_teacher(str(out / "finetune-run"))  # another way to the run's classifier
    classifier = torch.nn.Sequential(teacher.model.encoder, teacher.model.head)
    assert report.encoder["finetuned"]["weights_sha256"] == weights_sha256(classifier)  # type: ignore[index]
    log = (out / "finetune-run" / "log-rank0.txt").read_text()
    assert "steps 0 to 6, with weights of" in log
    assert "steps 4 to 6, from" in log
    assert "layer_3_decay" in json.dumps([g["name"] for g in _state(out)["groups"]])

    evaluate("finetune", str(source), *data, *SMALL)
    assert "steps 6 to 6" in (out / "finetune-run" / "log-rank0.txt").read_text()
    again = EvalReport.load(out.with_suffix(".json"))
    assert np.array_equal(again.outcomes.predicted, report.outcomes.predicted)
    evaluate("finetune", str(source), *data, *SMALL, "--set", "engine.precision=auto")  # is what the run settled on
    again = EvalReport.load(out.with_suffix(".json"))
    assert again.protocol["precision"] == report.protocol["precision"] == {"training": "fp32", "test": "fp32"}

    other = saved(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="Choose another folder"):  # the same question of another encoder
        evaluate("finetune", str(other), *data, *SMALL)
    for changed in (["--seed", "1"], ["--epochs", "2"], ["--precision", "bf16"]):
        with pytest.raises(RecipeError, match="holds another fine-tuning"):
            evaluate("finetune", str(source), *data, *SMALL, *changed)

    shutil.copytree(out, tmp_path / "out.rerun")  # as a rerun leaves it
    with pytest.raises(InputError, match="would be taken for the new answer"):
        evaluate("rerun", str(out.with_suffix(".json")))


@pytest.mark.parametrize("kind", ["run", "folder"])
@pytest.mark.parametrize("model", [MODEL, Model(name="test_resnet", image_size=32, eval_size=48)], ids=lambda m: m.name)
def test_it_is_trained_at_the_size_that_is_asked_for(kind: str, model: Model, tmp_path: Path) -> None:
    path = saved(tmp_path / "run" / "encoder", model)
    if kind == "run":
        path = make_run(tmp_path / "run", 0)
        recipe = load_recipe(path / "recipe.yaml").model_copy(update={"model": model})
        (path / "recipe.yaml").write_text(dump(recipe))
        saved(path / "encoder", model)
        assert finetuned_model(load_source(str(path))) == model
    encoder = load_source(str(path), architecture=Architecture(str(path), 64))
    found = finetuned_model(encoder)
    assert (found.image_size, found.judged_size) == (64, 64)
    module, new, left = starting_encoder(encoder, found, seed=1)
    assert (weights_sha256(module), new, left) == (encoder.weights_sha256(), (), ())


def test_what_a_reader_should_know_is_noted(encoder: Encoder, folders: Folders, tmp_path: Path) -> None:
    task = Task(open_dataset(folders.train), open_dataset(folders.test))
    for overrides, watched in (
        ((), False),
        ((f"data.val={folders.test}",), True),
        ((f"data.val={folders.train}",), False),
    ):
        config = FinetuneConfig(train=folders.train, test=folders.test, overrides=overrides)
        recipe = finetune_recipe(encoder, config, num_classes=10, start=tmp_path)
        assert bool(_watched(recipe, task)) == watched
    assert _unseen(task) == []
    task.train.label_counts[3] = 0  # type: ignore[index]
    (note,) = _unseen(task)
    lost = int(task.test.label_counts[3])  # type: ignore[index]
    assert note == f"1 of 10 classes have no training sample: {lost} of 100 test samples cannot be right"


def test_the_ranks_of_an_evaluation_do_not_each_start_a_run(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--nproc"):
        Finetune(
            open_dataset(folders.train), open_dataset(folders.test), FinetuneConfig(train="", test=""), out=tmp_path,
            trainer=LocalTrainer(1), extraction=Extraction(world_size=2),
        )  # fmt: skip


def _state(out: Path) -> dict[str, list[dict[str, str]]]:
    path = out / "finetune-run" / "checkpoints" / "step_00000006" / "state.json"
    found: dict[str, list[dict[str, str]]] = json.loads(path.read_text())
    return found
