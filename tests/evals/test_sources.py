"""An encoder is loaded whole or not at all, and is the same one whichever file it comes from."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.errors import CheckpointError, InputError
from pretrain.evals.encoder import Encoder
from pretrain.evals.sources.load import load_source
from pretrain.evals.sources.timm_names import Architecture
from pretrain.models.encoder_folders import save_encoder
from pretrain.models.weights_files import Part
from pretrain.objectives.kinds import build_objective
from pretrain.recipe.files import dump
from pretrain.recipe.recipe import Recipe
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress, RunState
from tests.ranks import run_ranks

TINY = {"depth": 1, "embed_dim": 24, "num_heads": 2}
ARCHITECTURE = Architecture("vit_tiny_patch16_224", 16, {"patch_size": 4, **TINY})


def recipe(kind: str = "mae") -> Recipe:
    mae = {"kind": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    vit = {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4, "options": TINY}
    resnet = {"name": "resnet10t", "image_size": 32}
    return Recipe.model_validate(
        {
            "name": kind,
            "seed": 11,
            "data": {"train": "shards", "mean": (0.4, 0.5, 0.6), "views": {"eval_crop": 0.9}},
            "model": vit if kind == "mae" else resnet,
            "objective": mae if kind == "mae" else {"kind": "supervised", "num_classes": 3},
            "optim": {"base_lr": 1e-3},
            "schedule": {"steps": 10},
            "batch": {"global_size": 8},
            "engine": {"precision": "fp32"},
        }
    )


def save_runs(world: World, root: Path) -> None:
    """A run of each kind as trainers leave it: recipe, encoder, checkpoint; weights of no initialisation."""
    from pretrain.checkpoints.writer import CheckpointWriter
    from pretrain.engine.engine import Engine

    for kind in ("mae", "supervised"):
        r = recipe(kind)
        torch.manual_seed(1234)
        objective = build_objective(r.model, r.objective)
        for buffer in objective.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
        engine = Engine(
            objective,
            r.optim,
            r.engine,
            world=world,
            device=torch.device("cpu"),
            micro_size=8,
            accumulation=1,
            seed=0,
        )
        state = RunState(Progress(7, 10, 56))
        writer = CheckpointWriter(root / kind / "checkpoints", engine.state, world=world, keep_last=1, say=print)
        writer.save(state)
        writer.finish()
        weights = objective.encoder.state_dict()
        data = r.data
        save_encoder(root / kind / "encoder", weights, r.model, data.preprocessing(r.model.judged_size))
        (root / kind / "recipe.yaml").write_text(dump(r))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run_ranks(save_runs, 1, root)
    return root


@pytest.fixture
def weights(runs: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_file(runs / "mae" / "encoder" / "model.safetensors")
    return state


def features(encoder: Encoder) -> Tensor:
    size = encoder.preprocessing.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    encoder.module.eval()
    with torch.no_grad():
        values: Tensor = encoder.module(images)
    return values


@pytest.mark.parametrize("kind", ["mae", "supervised"])
def test_a_run_its_checkpoint_and_its_encoder_folder_are_one_encoder(runs: Path, kind: str) -> None:
    run = load_source(str(runs / kind))
    checkpoint = load_source(str(runs / kind / "checkpoints" / "step_00000007"))
    folder = load_source(str(runs / kind / "encoder"))
    for other in (checkpoint, folder):
        assert other.weights_sha256() == run.weights_sha256()
        assert torch.equal(features(other), features(run))
        assert other.described_preprocessing() == run.described_preprocessing()
    assert run.described_preprocessing()["mean"] == [0.4, 0.5, 0.6]
    assert run.described_preprocessing()["eval_crop"] == 0.9
    assert (run.tag, checkpoint.tag) == ("encoder", "step_00000007")
    assert checkpoint.run is not None
    assert checkpoint.run.resolve() == (runs / kind).resolve()
    assert checkpoint.description["samples_seen"] == 56


def nested(state: dict[str, Tensor], path: Path) -> Path:
    torch.save({"model": state, "epoch": 3}, path)
    return path


def wrapped(state: dict[str, Tensor], path: Path) -> Path:
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    return path


def as_safetensors(state: dict[str, Tensor], path: Path) -> Path:
    path = path.with_suffix(".safetensors")
    save_file(state, path)
    return path


@pytest.mark.parametrize("save", [nested, wrapped, as_safetensors])
def test_a_weights_file_is_the_same_encoder(
    runs: Path, weights: dict[str, Tensor], tmp_path: Path, save: Callable[[dict[str, Tensor], Path], Path]
) -> None:
    file = save(weights, tmp_path / "weights.pth")
    found, run = load_source(str(file), architecture=ARCHITECTURE), load_source(str(runs / "mae"))
    assert found.weights_sha256() == run.weights_sha256()
    assert torch.equal(features(found), features(run))


@pytest.mark.parametrize(
    ("name", "told"),
    [("vit_base_patch16_224", "mae"), ("vit_base_patch16_224.mae", None), ("vit_tiny_patch16_224", None)],
)
def test_a_name_without_a_tag_is_told_where_weights_of_its_tags_want_other_pixels(
    tmp_path: Path, name: str, told: str | None
) -> None:
    architecture = Architecture(name, 16, {"patch_size": 4, **TINY})
    file = as_safetensors(architecture.build(num_classes=0).state_dict(), tmp_path / "weights")
    found = load_source(str(file), architecture=architecture)
    if told is None:
        assert found.notes == ()
        assert load_source(str(file), architecture=architecture, random_init=True).notes == ()
        return
    (note,) = found.notes
    assert note.startswith("as no tag was given, mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5), crop_pct 0.9")
    assert "dino, mae have mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)" in note
    assert note.endswith(f"name it: {name}.TAG")


@pytest.mark.parametrize("safe", [True, False, "both"])
def test_a_folder_as_timm_saves_it_is_the_same_encoder(tmp_path: Path, safe: Any) -> None:
    module = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=0, **TINY)
    args = {"img_size": 16, "patch_size": 4, "num_classes": 0, **TINY}
    timm.models.save_for_hf(module, tmp_path / "timm", model_args=args, safe_serialization=safe)
    found = load_source(str(tmp_path / "timm")).module.state_dict()
    assert found.keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in module.state_dict().items())


def test_a_classifier_is_left_out_and_said_so(weights: dict[str, Tensor], tmp_path: Path) -> None:
    head = {"head.weight": torch.zeros(10, 24), "head.bias": torch.zeros(10)}
    file = as_safetensors({**weights, **head}, tmp_path / "weights")
    found = load_source(str(file), architecture=ARCHITECTURE)
    assert found.description["classifier_left_out"] == ["head.bias", "head.weight"]


def test_the_hash_sees_every_name_and_every_bit(weights: dict[str, Tensor]) -> None:
    encoder = load_source("vit_tiny_patch16_224", random_init=True, architecture=ARCHITECTURE)
    before = encoder.weights_sha256()
    assert before == load_source("vit_tiny_patch16_224", random_init=True, architecture=ARCHITECTURE).weights_sha256()
    last = list(encoder.module.parameters())[-1]
    with torch.no_grad():
        last.view(-1)[-1] += 1e-6
    assert encoder.weights_sha256() != before
    first, second = (replace(encoder, module=nn.ModuleDict({name: nn.Identity()})) for name in "ab")
    for other, name in ((first, "a"), (second, "b")):
        other.module.register_buffer(name + "_", torch.zeros(2))
    assert first.weights_sha256() != second.weights_sha256()


def without(state: dict[str, Tensor]) -> str:
    del state["blocks.0.attn.qkv.weight"]
    return "1 missing: blocks.0.attn.qkv.weight"


def renamed(state: dict[str, Tensor]) -> str:
    state["blocks.0.qkv"] = state.pop("blocks.0.attn.qkv.weight")
    return "1 missing: blocks.0.attn.qkv.weight; 1 unexpected: blocks.0.qkv"


def reshaped(state: dict[str, Tensor]) -> str:
    state["pos_embed"] = torch.zeros(1, 5, 24)
    return "1 of another shape: pos_embed"


def broken(state: dict[str, Tensor]) -> str:
    state["norm.weight"] = torch.full((24,), torch.nan)
    return "1 not finite: norm.weight"


@pytest.mark.parametrize("change", [without, renamed, reshaped, broken])
def test_a_partial_load_is_refused_with_the_keys_that_differ(
    weights: dict[str, Tensor], tmp_path: Path, change: Callable[[dict[str, Tensor]], str]
) -> None:
    told = change(weights)
    file = as_safetensors(weights, tmp_path / "weights")
    with pytest.raises(CheckpointError, match=told):
        load_source(str(file), architecture=ARCHITECTURE)


def test_a_checkpoint_of_another_model_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(runs / "mae" / "checkpoints")
    other = recipe().model_copy(update={"model": recipe().model.model_copy(update={"image_size": 32})})
    (tmp_path / "recipe.yaml").write_text(dump(other))
    real = tmp_path / "checkpoints" / "step_00000007"
    copied = tmp_path / "run" / "checkpoints" / "step_00000007"
    copied.mkdir(parents=True)
    for file in real.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"recipe\.yaml"):
        load_source(str(copied))
    (tmp_path / "run" / "recipe.yaml").write_text(dump(other))
    with pytest.raises(CheckpointError, match="1 of another shape: pos_embed"):
        load_source(str(copied))


class Touch:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_that_could_run_code_is_refused_and_does_not(weights: dict[str, Tensor], tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"model": weights, "args": argparse.Namespace(path=Touch(ran))}, tmp_path / "code.pth")
    told = r"could run code, found UnpicklingError: the object getattr\. .*only if you trust it:\n  python -c "
    with pytest.raises(CheckpointError, match=told) as error:
        load_source(str(tmp_path / "code.pth"), architecture=ARCHITECTURE)
    assert not ran.exists()
    command = error.value.fix.splitlines()[1].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert ran.exists(), "as it says"
    load_source(str(tmp_path / "weights.pth"), architecture=ARCHITECTURE)


def test_what_training_keeps_beside_the_weights_is_passed_over(
    runs: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    beside = {
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        "scaler": {"scale": torch.ones(1)},
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.95)),
    }
    torch.save({"model": weights, **beside}, tmp_path / "mae.pth")
    found = load_source(str(tmp_path / "mae.pth"), architecture=ARCHITECTURE)
    assert found.weights_sha256() == load_source(str(runs / "mae")).weights_sha256()


def test_an_entry_and_a_prefix_choose_the_encoder(runs: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    student = {f"module.backbone.{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    teacher = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    head = {"head.mlp.weight": torch.zeros(3), "head.mlp.bias": torch.zeros(3)}
    torch.save({"student": student, "teacher": teacher | head, "epoch": 3}, tmp_path / "dino.pth")

    def load(key: str | None, prefix: str = "") -> Encoder:
        return load_source(str(tmp_path / "dino.pth"), architecture=ARCHITECTURE, part=Part(key, prefix))

    found = load("teacher", "backbone.")
    assert found.weights_sha256() == load_source(str(runs / "mae")).weights_sha256()
    assert found.description["weights_part"] == {"key": "teacher", "prefix": "backbone.", "left_out": 2}
    assert found.weights_sha256() != load("student", "backbone.").weights_sha256()
    for key, prefix, told in (
        (None, "backbone.", r"2 among student, teacher, epoch\. .*--weights-key \(student, teacher\)"),
        ("epoch", "", "there are student, teacher, found another kind"),
        ("model", "", "there are student, teacher, found no such entry"),
        ("teacher", "encoder.", "begin with 'encoder.', found others, such as backbone"),
        ("teacher", "", "unexpected: backbone"),
        ("teacher", "backbone.blocks.", "missing"),
    ):
        with pytest.raises(CheckpointError, match=told):
            load(key, prefix)
    with pytest.raises(InputError, match="they choose from a weights file"):
        load_source(str(runs / "mae"), part=Part("teacher"))


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 torn"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    file = (tmp_path / "weights").with_suffix(suffix)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="weights"):
        load_source(str(file), architecture=ARCHITECTURE)


def test_a_file_with_two_encoders_is_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"student": weights, "teacher": weights}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match="2 among student, teacher"):
        load_source(str(tmp_path / "two.pth"), architecture=ARCHITECTURE)


@pytest.mark.parametrize("kind", ["mae", "supervised"])
def test_random_weights_of_a_run_are_those_it_began_with(runs: Path, kind: str) -> None:
    r = recipe(kind)
    state = torch.get_rng_state()
    found = load_source(str(runs / kind), random_init=True)
    from_checkpoint = load_source(str(runs / kind / "checkpoints" / "step_00000007"), random_init=True)
    other = load_source(str(runs / kind), random_init=True, seed=12)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(r.seed)
    expected = build_objective(r.model, r.objective).encoder.state_dict()
    for name, tensor in found.module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert from_checkpoint.weights_sha256() == found.weights_sha256() != other.weights_sha256()
    assert (found.description["init_seed"], other.description["init_seed"]) == (11, 12)
    assert found.tag == "random"


def test_random_weights_of_a_timm_name(runs: Path) -> None:
    found = load_source("resnet10t", random_init=True, seed=3)
    torch.manual_seed(3)
    expected = timm.create_model("resnet10t", num_classes=0)
    assert torch.equal(next(found.module.parameters()), next(expected.parameters()))
    assert found.preprocessing.image_size == expected.pretrained_cfg["input_size"][-1]
    assert found.preprocessing.mean == expected.pretrained_cfg["mean"]


def test_published_weights_that_cannot_be_had_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, pretrained: bool = False, **_: object) -> nn.Module:
        assert pretrained
        raise ConnectionError("no network")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(InputError, match=r"published weights.*no network"):
        load_source("vit_tiny_patch16_224")


def published(name: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Options of a model, with which its published weights are those of a local file."""
    torch.manual_seed(0)
    path = folder / f"{name}.safetensors"
    save_file(timm.create_model(name, **options).state_dict(), path)
    return {**options, "pretrained_cfg_overlay": {"file": str(path)}}


def test_published_weights_at_another_size_are_told_in_grids(tmp_path: Path) -> None:
    vit = published("vit_tiny_patch16_224", tmp_path, **TINY)
    own = load_source("vit_tiny_patch16_224", architecture=Architecture("vit_tiny_patch16_224", None, vit))
    assert "position_embedding" not in own.description
    for size, options, grid in ((32, {}, [2, 2]), (None, {"patch_size": 32}, [7, 7])):
        architecture = Architecture("vit_tiny_patch16_224", size, {**vit, **options})
        told = load_source("vit_tiny_patch16_224", architecture=architecture).description["position_embedding"]
        assert isinstance(told, dict)
        assert (told["from"], told["to"]) == ([14, 14], grid)
        resized = load_source("vit_tiny_patch16_224", architecture=architecture).description["resized_positions"]
        assert resized == {"pos_embed": {"from": [1, 197, 24], "to": [1, grid[0] ** 2 + 1, 24]}}
    name = "swin_tiny_patch4_window7_224"
    swin = published(name, tmp_path, depths=(1, 1), embed_dim=8, num_heads=(1, 2))
    found = load_source(name, architecture=Architecture(name, 112, swin))
    assert features(found).shape == (2, 16)
    assert not found.description.keys() & {"position_embedding", "resized_positions"}


@pytest.mark.parametrize(
    ("name", "size", "options", "changed", "rows"),
    [
        ("beit_base_patch16_224", 48, {"depth": 1, "embed_dim": 24, "num_heads": 2}, {}, [732, 5**2 + 3]),
        (
            "swin_tiny_patch4_window7_224", None, {"depths": (1, 1), "embed_dim": 8, "num_heads": (2, 2)},
            {"window_size": 14}, [13**2, 27**2],
        ),
    ],
)  # fmt: skip
def test_relative_positions_that_timm_interpolates_are_told(
    tmp_path: Path, name: str, size: int | None, options: dict[str, Any], changed: dict[str, Any], rows: list[int]
) -> None:
    options = published(name, tmp_path, **options)
    assert "resized_positions" not in load_source(name, architecture=Architecture(name, None, options)).description
    told = load_source(name, architecture=Architecture(name, size, {**options, **changed})).description
    resized = told["resized_positions"]
    assert isinstance(resized, dict)
    assert resized
    for table, shapes in resized.items():
        assert table.endswith("relative_position_bias_table")
        assert (shapes["from"], shapes["to"]) == ([rows[0], 2], [rows[1], 2])


def test_options_with_which_timm_leaves_blocks_at_random_are_refused(tmp_path: Path) -> None:
    """Of weights of one block, taken for those of two."""
    name = "vit_tiny_patch16_224"
    options = {**published(name, tmp_path, **TINY), "depth": 2}
    with pytest.raises(InputError, match="Missing key"):
        load_source(name, architecture=Architecture(name, None, options))
    for option, value in (("num_classes", 10), ("in_chans", 3), ("pretrained_strict", False)):
        with pytest.raises(InputError, match=f"--option {option}.*found {value}"):
            load_source(name, architecture=Architecture(name, None, {**options, option: value}))


@pytest.mark.parametrize(
    ("spec", "architecture", "told"),
    [
        ("vit_tiny_patch16_225", None, "Nearest timm models: .*vit_tiny_patch16_224"),
        ("EMPTY", None, "none of these"),
        ("EMPTY", ARCHITECTURE, "says its own architecture"),
        ("FILE", None, "--model"),
        ("FILE", Architecture("vit_tinny_patch16_224"), "Nearest timm models"),
        ("FILE", Architecture("vit_tiny_patch16_224", None, {"depht": 1}), "options it takes.*depht"),
        ("resnet18", Architecture("resnet34"), "resnet34"),
        ("resnet18", Architecture("resnet18", None, {"in_chans": 1}), "--option in_chans.*found 1"),
    ],
)
def test_what_makes_no_sense_is_an_input_error(
    tmp_path: Path, weights: dict[str, Tensor], spec: str, architecture: Architecture | None, told: str
) -> None:
    file = as_safetensors(weights, tmp_path / "weights")
    (tmp_path / "empty").mkdir()
    spec = spec.replace("EMPTY", str(tmp_path / "empty")).replace("FILE", str(file))
    with pytest.raises(InputError, match=told):
        load_source(spec, architecture=architecture)


@pytest.mark.parametrize(
    ("name", "options", "size", "above"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 4, **TINY}, 18, "multiple of the patch size 4, found 18, .* above: 20"),
        ("deit_tiny_patch16_224", {"depth": 1}, 230, "multiple of the patch size 16, .* last 6 rows .* above: 240"),
        ("convnext_atto", {}, 65, "multiple of the patch size 4, found 65, whose last 1 rows .* above: 68"),
        ("resnet10t", {}, 33, None),
        ("convnext_atto", {}, 68, None),
    ],
)
def test_a_size_whose_edge_would_not_be_seen_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], size: int, above: str | None
) -> None:
    """The encoder must depend on the last pixel of each size that is taken; of a name and of a weights file alike."""
    made = load_source(name, random_init=True, architecture=Architecture(name, None, options))
    file = as_safetensors(dict(made.module.state_dict()), tmp_path / "weights")
    asked = Architecture(name, size, options)
    for spec, random_init in ((name, True), (str(file), False)):
        if above:
            with pytest.raises(InputError, match=rf"--image-size: expected .*{above}"):
                load_source(spec, random_init=random_init, architecture=asked)
            continue
        module = load_source(spec, random_init=random_init, architecture=asked).module.eval()
        images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
        module(images).square().sum().backward()
        assert images.grad is not None
        assert images.grad[0, :, -1].abs().sum() > 0
