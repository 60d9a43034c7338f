"""Runs of CLIP and SigLIP on captioned shards: stopped and resumed, validated, exported, started from and judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import RecipeError
from pretrain.checkpoints.start import find_start
from pretrain.evals.result import EvalReport
from pretrain.evals.retrieval.protocol import Retrieval
from pretrain.evals.sources.load import load_source
from pretrain.evals.sources.towers import load_towers
from pretrain.models.encoders import build_encoder
from pretrain.objectives.kinds import build_objective
from pretrain.preflight import preflight
from pretrain.recipe.files import load_recipe
from pretrain.runtime.collectives import World
from tests.integration.test_mixed_captions import captioned
from tests.objectives import towers
from tests.runs import losses, train, write_recipe


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captioned(tmp_path_factory.mktemp("pairs"), 32)


def recipe(path: Path, shards: Path, kind: str, beside_timm: bool, **groups: Any) -> Path:
    model = (towers.TIMM if beside_timm else towers.OPEN_CLIP).model_dump(exclude_none=True, mode="json")
    objective: dict[str, Any] = {"kind": kind}
    if beside_timm:
        objective |= {"embed_dim": 8, "text": towers.TEXT.model_dump()}
    return write_recipe(
        path,
        shards,
        data={"train": str(shards), "val": str(shards), "read_streams": 2, "shuffle_window": 8, "views": {"flip": 0.0}},
        model=model,
        objective=objective,
        schedule={"steps": 6, "warmup": 0.1},
        checkpoint={"every_steps": 2},
        ema={"decay": 0.9},
        **groups,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "beside_timm"), [("clip", False), ("siglip", True)])
def test_a_run_goes_on_to_the_bit_and_its_towers_are_whole(
    tmp_path: Path, shards: Path, kind: str, beside_timm: bool
) -> None:
    evals = [{"kind": "retrieval", "test": str(shards), "every_epochs": 1.5}]
    path = recipe(tmp_path / "r.yaml", shards, kind, beside_timm, evals=evals)
    train(path, tmp_path / "whole", 2)
    train(path, tmp_path / "cut", 2, max_steps=4)
    train(path, tmp_path / "cut", 2)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    run = tmp_path / "whole"
    found, again = load_towers(str(run)), load_towers(str(tmp_path / "cut"))
    kept = load_towers(str(run / "checkpoints" / "step_00000006"))
    assert found.weights_sha256() == kept.weights_sha256() == again.weights_sha256()
    inline = EvalReport.load(run / "evals" / "retrieval_step_00000006.json")
    alone = Retrieval(open_dataset(str(shards))).run(kept)
    assert (inline.weights_sha256, inline.metrics) == (alone.weights_sha256, alone.metrics)
    assert (inline.protocol, inline.data) == (alone.protocol, alone.data)
    assert found.weights_sha256() != load_towers(str(run), random_init=True).weights_sha256()
    encoder = load_source(str(run))
    weights = found.module.encoder.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in encoder.module.state_dict().items())
    locked = recipe(tmp_path / "l.yaml", shards, kind, beside_timm, init_from=str(run / "encoder"), name="locked")
    log = train(locked, tmp_path / "locked", 1, "objective.lock_image=true", "engine.zero_stage=3", "ema=null")
    assert "left behind: nothing" in log
    assert "new, as initialized: nothing" in log
    after = load_towers(str(tmp_path / "locked")).module.state_dict()
    for name, tensor in found.module.state_dict().items():
        assert torch.equal(tensor, after[name]) == name.startswith("encoder."), name


def test_a_tower_is_not_locked_at_random(tmp_path: Path, shards: Path) -> None:
    """Weights of an image encoder alone are a start only where the other tower is trained."""
    save_file(build_encoder(towers.TIMM).state_dict(), tmp_path / "encoder.safetensors")
    path = recipe(tmp_path / "r.yaml", shards, "clip", True, init_from=str(tmp_path / "encoder.safetensors"))
    given = load_recipe(path, ["objective.lock_text=true"])
    objective = build_objective(given.model, given.objective)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    with pytest.raises(RecipeError, match=r"locks, found none for \d+ of text"):
        find_start(objective, None, World(), resume_from=None, init_from=given.init_from)
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())
    given = load_recipe(path, ["objective.lock_image=true"])
    assert find_start(
        build_objective(given.model, given.objective), None, World(), resume_from=None, init_from=given.init_from
    ).notes


def test_a_locked_tower_needs_weights_and_a_tokenizer_a_tower_that_knows_it(tmp_path: Path, shards: Path) -> None:
    path = recipe(tmp_path / "r.yaml", shards, "clip", False)
    locked = load_recipe(path, ["objective.lock_image=true"])
    with pytest.raises(RecipeError, match="init_from: expected weights for all that the objective locks"):
        preflight(locked, 1, tmp_path / "run")
    few = load_recipe(path, ["model.text.vocab_size=1000"])
    with pytest.raises(RecipeError, match="at most 1000 tokens"):
        preflight(few, 1, tmp_path / "run")
