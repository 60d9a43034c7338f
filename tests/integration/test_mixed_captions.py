"""A run over a mixture of captioned shards: tokens reach the objective; what is wrong is told before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec, TokenSpec
from data_pipeline.errors import FieldError, InputError, RecipeError
from data_pipeline.ingest.convert import ConvertOptions, convert
from data_pipeline.ingest.tables import Columns
from pretrain import plan, preflight
from pretrain import run as run_module
from pretrain.models.encoders import build_encoder
from pretrain.objectives.contract import LossOutput, Objective
from pretrain.recipe import recipe as recipes
from pretrain.recipe.files import load_recipe
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress
from tests.data_pipeline.archives import as_folder, jpeg
from tests.ranks import started
from tests.runs import write_recipe


class Captioned(Objective):
    """Regresses an image's features on a fixed embedding of its caption."""

    def __init__(self, model: recipes.Model, _: recipes.ObjectiveConfig) -> None:
        super().__init__()
        self.encoder = build_encoder(model)
        self.needs = BatchSpec(model.image_size, tokens=TokenSpec("clip", 12))
        self.head = nn.Linear(32, 4)

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        assert batch.tokens is not None
        ends = (batch.tokens == 49407).sum(1)
        assert batch.tokens.shape[1:] == (12,)
        assert batch.tokens.sum() == 0 or (ends == 1).all()  # the blank batch that FLOPs are counted on
        target = torch.stack([(batch.tokens * k).double().sin().mean(1) for k in (1, 2, 3, 4)], 1).float()
        predicted: Tensor = self.head(self.encoder(batch.views[0]))
        return LossOutput((predicted - target).square().mean(), {})


def _run(_: World, path: Path, out: Path, arguments: dict[str, Any]) -> None:
    plan.build_objective = run_module.build_objective = Captioned  # type: ignore[attr-defined,assignment]
    run_module.run(load_recipe(path), out, **arguments)


def run(path: Path, out: Path, nproc: int, **arguments: Any) -> str:
    with started(_run, nproc, path, out, arguments, joined=False) as ranks:
        ranks.results()
    return (out / "log-rank0.txt").read_text()


def captioned(folder: Path, count: int) -> Path:
    """Shards of as many images, made from a table."""
    as_folder(folder / "images", {f"{i}.jpg": jpeg(i, 20, 20) for i in range(count)})
    lines = [f"{i}.jpg,{chr(97 + i % 26)} number {i}" for i in range(count)]
    (folder / "table.csv").write_text("\n".join(["path,words of it", *lines]))
    columns = Columns(caption="words of it", root=folder / "images")
    convert(folder / "table.csv", folder / "shards", ConvertOptions(shard_size=10), columns=columns)
    return folder / "shards"


def make_sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Two, of 25 and 14 samples, in shares of 3 and 1."""
    paths = [captioned(tmp_path_factory.mktemp("data"), count) for count in (25, 14)]
    return [{"path": str(path), "weight": weight} for path, weight in zip(paths, (3, 1), strict=True)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    return make_sources(tmp_path_factory)


def with_data(path: Path, train: object, **more: object) -> Path:
    return write_recipe(
        path,
        "",
        data={"train": train, "read_streams": 3, "shuffle_window": 16, **more},
        schedule={"steps": 6, "warmup": 0.1},
        checkpoint={"every_steps": 3},
    )


def test_other_weights_make_another_run_and_moved_data_the_same(
    sources: list[dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "build_objective", Captioned)
    out = tmp_path / "run"
    run(with_data(tmp_path / "r.yaml", sources), out, 1, max_steps=1)
    moved = Path(str(sources[0]["path"])).rename(tmp_path / "moved")
    try:
        same = [{**sources[0], "path": str(moved), "weight": 6}, {**sources[1], "weight": 2}]
        preflight.preflight(load_recipe(with_data(tmp_path / "same.yaml", same)), 1, out)
        other = [{**sources[0], "path": str(moved), "weight": 2}, sources[1]]
        with pytest.raises(RecipeError, match=r"data\.train: expected the data \(and weights"):
            preflight.preflight(load_recipe(with_data(tmp_path / "other.yaml", other)), 1, out)
    finally:
        moved.rename(str(sources[0]["path"]))


def test_captions_that_are_not_there_are_told_before_anything_starts(
    sources: list[dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "build_objective", Captioned)

    def refused(error: type[InputError], train: object, **data: object) -> str:
        with pytest.raises(error) as caught:
            preflight.preflight(load_recipe(with_data(tmp_path / "r.yaml", train, **data)), 1, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    said = refused(FieldError, sources, captions={"field": "json", "key": "caption"})
    assert "caption field `json`: expected a caption with every image, found the fields jpg, txt" in said
    assert str(sources[0]["path"]) in said
    bare = as_folder(tmp_path / "bare", {"a.jpg": jpeg(0)})
    convert(bare, tmp_path / "bare-shards", ConvertOptions())
    said = refused(FieldError, [*sources, {"path": str(tmp_path / "bare-shards")}])
    assert said.startswith(f"{tmp_path}/bare-shards, caption field `txt`")
    said = refused(InputError, [sources[0], {"path": "nowhere"}])
    assert "nowhere" in said
