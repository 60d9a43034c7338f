"""Two towers on disk: open_clip reads ours, ours reads open_clip's, and nothing is loaded in part or from two saves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.batch import TokenSpec
from data_pipeline.errors import CheckpointError, InputError, RecipeError
from data_pipeline.samples.preprocessing import Preprocessing
from pretrain.evals.sources.load import load_source
from pretrain.evals.sources.towers import load_towers
from pretrain.models.config import Model, OpenClip
from pretrain.models.load_encoder import load_encoder
from pretrain.models.open_clip_models import model_config
from pretrain.models.tokenizers import build_tokenizer
from pretrain.models.tower_folders import save_towers
from pretrain.objectives.clip.config import ClipConfig
from pretrain.objectives.image_text import ImageText
from pretrain.objectives.kinds import build_objective
from pretrain.recipe.files import dump
from pretrain.recipe.recipe import Recipe
from pretrain.runtime.state import Progress
from tests.models.test_tokenizers import save_tokenizer
from tests.objectives import towers

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
PROGRESS = Progress(0, 1, 0)


def saved(folder: Path, kind: str, *, beside_timm: bool = False, seed: int = 0, tokenizer: str = "clip") -> ImageText:
    objective = towers.make(kind, timm=beside_timm, seed=seed).eval()
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    model = towers.TIMM if beside_timm else towers.OPEN_CLIP
    given = (towers.BESIDE_TIMM["embed_dim"], towers.TEXT) if beside_timm else (None, None)
    pixels = Preprocessing(model.image_size, MEAN, STD, "bilinear", 0.9)
    save_towers(folder, objective.state_dict(), model, *given, tokenizer, pixels)
    return objective


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_open_clip_reads_the_folder_and_computes_the_same(tmp_path: Path, kind: str) -> None:
    objective = saved(tmp_path, kind)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    batch = towers.captioned(3)
    with torch.no_grad():
        found = objective.features(batch, PROGRESS)
        image, text, scale, *bias = theirs.eval()(batch.views[0], batch.tokens)
    torch.testing.assert_close(image, found.image)
    torch.testing.assert_close(text, found.text)
    torch.testing.assert_close(scale, found.logit_scale)
    assert [b.item() for b in bias] == ([] if kind == "clip" else [found.logit_bias.item()])
    assert tuple(preprocess.transforms[-1].mean) == MEAN


def test_a_folder_of_open_clips_with_a_tokenizer_beside_is_read_as_open_clip_reads_it(tmp_path: Path) -> None:
    """As SigLIP's are published."""
    saved(tmp_path, "siglip")
    told = json.loads((tmp_path / "open_clip_config.json").read_text())
    asked = {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "canonicalize"}}
    told["model_cfg"]["text_cfg"] |= asked
    del told["tokenizer"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    with pytest.raises(RecipeError, match=r"found no file at .*fetch its files"):
        load_towers(str(tmp_path))
    save_tokenizer(tmp_path)
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    texts = ["A Red_circle, beside  a Blue: square!", "fish"]
    assert torch.equal(load_towers(str(tmp_path)).tokenize(texts), theirs(texts))


@pytest.mark.parametrize("beside_timm", [False, True])
def test_a_saved_tokenizer_travels_with_the_towers(tmp_path: Path, beside_timm: bool) -> None:
    (tmp_path / "tokenizer").mkdir()
    given = save_tokenizer(tmp_path / "tokenizer")
    expected = build_tokenizer(TokenSpec(str(given), 6))("a red circle")
    saved(tmp_path / "run", "siglip", beside_timm=beside_timm, tokenizer=str(given))
    shutil.rmtree(given)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert torch.equal(load_towers(str(tmp_path / "elsewhere")).tokenize(["a red circle"])[0], expected)


@pytest.mark.parametrize("beside_timm", [False, True])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_loaded_towers_are_those_that_were_saved(tmp_path: Path, kind: str, beside_timm: bool) -> None:
    objective = saved(tmp_path, kind, beside_timm=beside_timm)
    found = load_towers(str(tmp_path))
    batch = towers.captioned(3)
    assert batch.tokens is not None
    weights = objective.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.module.state_dict().items())
    with torch.no_grad():  # attention is computed in another way where it needs no gradient
        expected = objective.features(batch, PROGRESS)
        torch.testing.assert_close(found.encode_image(batch.views[0]), expected.image)
        torch.testing.assert_close(found.encode_text(batch.tokens), expected.text)
    assert found.logit_scale == pytest.approx(float(expected.logit_scale))
    assert found.logit_bias == pytest.approx(float(expected.logit_bias))
    assert found.preprocessing == Preprocessing(16, MEAN, STD, "bilinear", 0.9)
    assert found.tokenize(["a red star"]).shape == (1, 6)
    assert not found.module.training
    encoder, config = load_encoder(tmp_path)
    with torch.no_grad():
        expected_features = objective.encoder(batch.views[0])
        torch.testing.assert_close(encoder.eval()(batch.views[0]), expected_features)
    assert config.preprocessing == Preprocessing(16, MEAN, STD, "bilinear", 0.9)
    if beside_timm:
        plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(plain(batch.views[0]), expected_features)


def test_a_run_is_judged_at_the_size_that_its_folder_says(tmp_path: Path) -> None:
    model = Model(name="test_resnet", image_size=32, eval_size=48)
    objective = ClipConfig(kind="clip", **towers.BESIDE_TIMM)
    tree = {
        "name": "small", "data": {"train": "shards"}, "model": model.model_dump(), "objective": objective.model_dump(),
        "optim": {"base_lr": 1e-3}, "schedule": {"steps": 1}, "batch": {"global_size": 8},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(dump(Recipe.model_validate(tree)))
    state = build_objective(model, objective).state_dict()
    given = (towers.BESIDE_TIMM["embed_dim"], towers.TEXT, "clip", Preprocessing(model.judged_size, MEAN, STD))
    save_towers(tmp_path / "encoder", state, model, *given)
    for source, fresh in ((tmp_path, False), (tmp_path, True), (tmp_path / "encoder", False)):
        assert load_towers(str(source), random_init=fresh).preprocessing.image_size == 48
        assert load_source(str(source), random_init=fresh).preprocessing.image_size == 48


@pytest.mark.parametrize("beside_timm", [False, True])
def test_fresh_towers_have_the_architecture_and_weights_of_their_seed(tmp_path: Path, beside_timm: bool) -> None:
    saved(tmp_path, "clip", beside_timm=beside_timm)
    first, again, other = (load_towers(str(tmp_path), random_init=True, seed=seed) for seed in (1, 1, 2))
    assert first.weights_sha256() == again.weights_sha256() != other.weights_sha256()
    assert first.weights_sha256() != load_towers(str(tmp_path)).weights_sha256()
    assert first.tag == "random"


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "nan"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, fault: str) -> None:
    saved(tmp_path, "clip")
    path, told = tmp_path / "open_clip_model.safetensors", tmp_path / "open_clip_config.json"
    state = load_file(path)
    name = "text.ln_final.weight"
    match fault:
        case "missing":
            del state[name]
        case "unexpected":
            state["text.other"] = torch.zeros(3)
        case "shape":
            state[name] = torch.zeros(3)
        case "nan":
            state[name] = torch.full_like(state[name], float("nan"))
    save_file(state, path)
    with pytest.raises(CheckpointError, match="sha256"):
        load_towers(str(tmp_path))
    config = json.loads(told.read_text())
    del config["file_sha256"]
    told.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"ln_final|text\.other"):
        load_towers(str(tmp_path))


def test_a_configuration_that_is_none_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "clip")
    for text in ("", "[]", "[" * 10**5):
        (tmp_path / "open_clip_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"open_clip_config\.json"):
            load_towers(str(tmp_path))


def test_an_image_tower_of_another_save_is_refused(tmp_path: Path) -> None:
    """As where a process was killed between the two."""
    saved(tmp_path / "a", "clip", beside_timm=True)
    saved(tmp_path / "b", "clip", beside_timm=True, seed=1)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "b" / name).replace(tmp_path / "a" / name)
    with pytest.raises(CheckpointError, match="of one save"):
        load_towers(str(tmp_path / "a"))


def test_open_clip_s_own_configurations_by_name(tmp_path: Path) -> None:
    """Weights of a file in CLIP's own layout, with the text tower's parts at the top; nothing is downloaded."""
    theirs = open_clip.create_model("ViT-S-32-alt")
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    found = load_towers("ViT-S-32-alt", weights=tmp_path / "w.safetensors")
    tokens = found.tokenize(["a photo of a cat"])
    with torch.no_grad():
        expected = theirs.eval().encode_text(tokens, normalize=True)
    torch.testing.assert_close(found.encode_text(tokens), expected)
    with pytest.raises(InputError, match="found none of them"):
        load_towers("ViT-S-32-alt")
    with pytest.raises(InputError, match=r"Nearest: .*ViT-B-32"):
        load_towers("ViT-B-33", random_init=True)


def named(name: str, **options: object) -> OpenClip:
    return OpenClip(library="open_clip", name=name, image_size=224, **options)


def test_what_a_configuration_of_open_clip_asks_for_is_built_or_refused() -> None:
    config = model_config(named("ViT-B-16", context_length=32))
    assert (config["text_cfg"]["context_length"], config["vision_cfg"]["image_size"]) == (32, 224)
    with pytest.raises(InputError, match="has to be downloaded"):
        model_config(named("roberta-ViT-B-32"))
    with pytest.raises(InputError, match="CoCa"):
        model_config(named("coca_ViT-B-32"))
    with pytest.raises(InputError, match=r"model\.image_size: expected 256"):
        model_config(named("ViT-B-16-SigLIP-256"))
    with pytest.raises(InputError, match=r"model\.name"):
        model_config(named("hf-hub:timm/ViT-B-16-SigLIP"))
