"""Weights files that hold more than an encoder, other names, or objects of somebody's program."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipeline.errors import CheckpointError, InputError
from launch.commands.eval_options import EncoderOptions
from pretrain.checkpoints.start import find_start
from pretrain.evals.encoder import Encoder
from pretrain.evals.sources.load import load_source
from pretrain.evals.sources.timm_names import Architecture
from pretrain.evals.sources.towers import load_towers
from pretrain.models.foreign.fitting import first_parts, joined_chunks
from pretrain.models.foreign.pickle_contents import expressions, look_into
from pretrain.models.weights_files import Part, read_tensors
from pretrain.objectives.kinds import build_objective
from pretrain.recipe.recipe import Recipe
from pretrain.runtime.collectives import World
from tests.recipe.recipes import SMALL

VIT = Architecture("vit_tiny_patch16_224", 8, {"patch_size": 4, "depth": 3, "embed_dim": 24, "num_heads": 2})
MORE = {
    "mask_token": torch.zeros(1),
    "decoder_embed.weight": torch.zeros(2),
    "decoder_blocks.0.norm.bias": torch.ones(1),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return dict(VIT.build(num_classes=0).state_dict())


def load(path: Path, key: str | None = None, prefix: str = "", ignore: tuple[str, ...] = ()) -> Encoder:
    return load_source(str(path), architecture=VIT, part=Part(key, prefix, ignore))


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def digest(weights: dict[str, Tensor], tmp_path: Path) -> str:
    return load(saved(tmp_path / "plain.pth", weights)).weights_sha256()


def test_more_than_the_encoder_is_refused_with_the_options_that_leave_it_out(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """As MAE's and DINOv2's files; the options that are told are those that work."""
    path = saved(tmp_path / "mae.pth", {"model": weights | MORE})
    with pytest.raises(CheckpointError, match="3 unexpected: decoder_blocks") as error:
        load(path)
    patterns = re.findall(r"--weights-ignore (\S+?)[ .]*(?= |$)", error.value.fix)
    assert [shlex.split(p)[0] for p in patterns] == ["decoder_blocks.*", "decoder_embed.*", "mask_token"]
    found = load(path, ignore=("decoder_*", "mask_token"))
    assert found.weights_sha256() == digest(weights, tmp_path)
    assert found.description["weights_ignored"] == {
        "patterns": ["decoder_*", "mask_token"], "names": sorted(MORE),
    }  # fmt: skip
    assert "3 tensors were ignored, as asked: decoder_blocks.0.norm.bias" in " ".join(found.notes)
    assert load(path, ignore=("*",)).weights_sha256() == found.weights_sha256(), "what it needs stays"


@pytest.mark.parametrize(
    ("pattern", "told"),
    [("cls_token", "one that names only what it needs"), ("mask_tokens", "one that no name fits")],
)
def test_a_pattern_without_effect_is_refused(
    weights: dict[str, Tensor], tmp_path: Path, pattern: str, told: str
) -> None:
    path = saved(tmp_path / "mae.pth", {"model": weights | MORE})
    with pytest.raises(CheckpointError, match=rf"--weights-ignore {pattern}: .*{told}.*These are not needed: decoder_"):
        load(path, ignore=("decoder_*", pattern))


def test_what_the_encoder_needs_is_never_ignored(weights: dict[str, Tensor], tmp_path: Path) -> None:
    short = {name: tensor for name, tensor in weights.items() if name != "norm.weight"}
    with pytest.raises(CheckpointError) as error:
        load(saved(tmp_path / "short.pth", short | MORE), ignore=("*",))
    assert error.value.found == "1 missing: norm.weight"


def test_patterns_need_a_file(weights: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match="--weights-ignore: expected none"):
        load_source("vit_tiny_patch16_224", random_init=True, part=Part(ignore=("x",)))
    with pytest.raises(InputError, match="--weights-ignore: expected none"):
        load_towers("ViT-B-32", random_init=True, ignore=("x",))


def test_the_prefix_that_fits_is_told(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Under several names, and with what is no part of the encoder there."""
    content = {f"student.backbone.{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    content |= {
        f"teacher.backbone.{name}": tensor for name, tensor in (weights | {"mask_token": torch.ones(1)}).items()
    }
    path = saved(tmp_path / "dino.pth", content | {"teacher.head.weight": torch.ones(1)})
    right = (
        r"fit with --weights-prefix student.backbone. or --weights-prefix teacher.backbone. --weights-ignore mask_token"
    )
    for wrong in ("", "encoder.", "teacher."):
        with pytest.raises(CheckpointError, match=right):
            load(path, prefix=wrong)
    found = load(path, prefix="teacher.backbone.", ignore=("mask_token",))
    assert found.weights_sha256() == digest(weights, tmp_path)
    with pytest.raises(CheckpointError, match=r"this very architecture\.$"):
        load(saved(tmp_path / "other.pth", {"conv.weight": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="Its names fit with no --weights-prefix"):
        load(saved(tmp_path / "plain.pth", weights), prefix="backbone.")


def test_chunks_of_blocks_are_joined_and_it_is_recorded(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """DINOv2's names: blocks.CHUNK.N, N counting through all."""
    chunked = {
        re.sub(r"^blocks\.(\d)\.", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}.", n): t for n, t in weights.items()
    }
    assert "blocks.1.2.norm1.weight" in chunked
    found = load(
        saved(tmp_path / "chunked.pth", {"teacher": {f"backbone.{n}": t for n, t in chunked.items()}}),
        prefix="backbone.",
    )
    assert found.weights_sha256() == digest(weights, tmp_path)
    assert "blocks.CHUNK.N" in str(found.description["block_chunks"])
    twice = chunked | {"blocks.0.2.norm1.weight": torch.ones(24)}  # two blocks of one number
    assert joined_chunks(twice, weights) == twice
    stages = {"blocks.0.0.conv.weight": torch.ones(1)}  # an architecture that has such names of its own
    assert joined_chunks(stages, stages) == stages


def test_many_first_parts_are_one_pattern() -> None:
    assert first_parts([f"part{i}.weight" for i in range(9)]) == ["*"]
    assert first_parts(["b.c.d", "b.e", "a"]) == ["a", "b.*"]


def test_an_encoder_of_init_from_may_have_more_beside_it(weights: dict[str, Tensor], tmp_path: Path) -> None:
    model = {
        "name": VIT.name, "image_size": 8, "patch_size": 4,
        "options": {"depth": 3, "embed_dim": 24, "num_heads": 2},
    }  # fmt: skip
    save_file(weights | MORE, path := tmp_path / "mae.safetensors")
    given: dict[str, Any] = {
        "model": model,
        "objective": {"kind": "supervised", "num_classes": 3},
        "init_from": str(path),
    }
    plain = Recipe.model_validate({**SMALL, **given})
    objective = build_objective(plain.model, plain.objective)
    with pytest.raises(
        CheckpointError, match=r'left out by init_ignore: \["decoder_blocks.\*", "decoder_embed.\*", "mask'
    ):
        find_start(objective, None, World(), **plain.start_from)
    ignoring = Recipe.model_validate({**SMALL, **given, "init_ignore": ["decoder_*", "mask_token"]})
    start = find_start(objective, None, World(), **ignoring.start_from)
    assert any("3 tensors were ignored" in note for note in start.notes)
    state = objective.state_dict()
    assert all(torch.equal(state[f"encoder.{name}"], tensor) for name, tensor in weights.items())


class Ours(nn.Linear):
    """Of somebody's program."""


class Record:
    def __init__(self, **values: object) -> None:
        self.__dict__.update(values)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return print, ("this code was run",)


CONTENTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], list[str]]] = {
    "an entry": (lambda w: {"net": w, "args": Record()}, ['x["net"]']),
    "two entries": (lambda w: {"student": w, "teacher": w, "args": Record()}, ['x["student"]', 'x["teacher"]']),
    "beside": (lambda w: {"optimizer": w, "state_dict": w, "cfg": Record()}, ['x["state_dict"]']),
    "a model": (lambda w: Ours(2, 3), ["x.state_dict()"]),
    "a model in it": (lambda w: {"epoch": 3, "ema": Ours(2, 3)}, ['x["ema"].state_dict()']),
    "the top": (lambda w: {**w, "args": Record()}, ["{name: t for name, t in x.items() if torch.is_tensor(t)}"]),
    "nothing": (lambda w: {"args": Record()}, ["x"]),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("case", CONTENTS)
def test_the_command_that_is_advised_takes_what_is_there(
    weights: dict[str, Tensor], tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str, zipped: bool
) -> None:
    make, places = CONTENTS[case]
    path = tmp_path / "theirs.pth"
    torch.save(make(weights), path, _use_new_zipfile_serialization=zipped)
    capfd.readouterr()
    with pytest.raises(CheckpointError) as error:
        read_tensors(path)
    assert "this code was run" not in capfd.readouterr().out
    commands = [shlex.split(line)[2] for line in error.value.fix.splitlines() if "python -c" in line]
    assert commands == [
        f'import torch; x = torch.load("{path}", weights_only=False); torch.save({place}, "weights.pth")'
        for place in places
    ]
    if case != "nothing":
        for code in commands:
            exec(code.replace('"weights.pth"', repr(str(tmp_path / "weights.pth"))), {})
            assert all(isinstance(tensor, Tensor) for tensor in read_tensors(tmp_path / "weights.pth").values())


def test_a_key_that_is_given_is_the_one_that_is_advised(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path / "two.pth", {"student": weights, "teacher": weights, "args": Record()})
    with pytest.raises(CheckpointError) as error:
        read_tensors(path, "teacher")
    assert 'x["teacher"]' in error.value.fix
    assert "student" not in error.value.fix


def test_a_look_runs_nothing_and_never_fails(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04", b"\x80\x04c", b"cposix\nsystem\n(S'true'\ntR."):
        (tmp_path / "file").write_bytes(content)
        assert expressions(look_into(tmp_path / "file")) == []


def test_the_options_of_the_command_line_are_given(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path / "mae.pth", {"model": weights | MORE})
    option = [f"{key}={value}" for key, value in VIT.options.items()]
    given = {"model": VIT.name, "image_size": 8, "option": option}
    found = EncoderOptions(encoder=str(path), **given, weights_ignore=["decoder_*", "mask_token"]).load()  # type: ignore[arg-type]
    assert found.weights_sha256() == digest(weights, tmp_path)
