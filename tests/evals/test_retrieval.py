"""Retrieval equals a loop over all pairs: several captions an image, equal captions, equal vectors."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.batch import Sample
from data_pipeline.datasets.read import ShardDataset, open_dataset
from data_pipeline.datasets.selection import Subset
from data_pipeline.errors import FieldError, RunError, SampleError
from data_pipeline.shards.scan import index_shards
from pretrain.evals.features.extract import Extraction
from pretrain.evals.features.pairs import image_side
from pretrain.evals.retrieval.protocol import Retrieval, ranks_of_own
from pretrain.evals.sources.towers import load_towers
from pretrain.models.towers import Towers
from pretrain.recipe.recipe import Captions
from tests.models.test_towers import saved
from tests.shards import jpeg

TEXTS = ["a red star", "a blue cross", "two pink circles", "a green square", "a cyan diamond", "nothing at all"]
CAPTIONS = [[TEXTS[i % 5], TEXTS[(i * 3 + 1) % 6], TEXTS[i % 5]][: 1 + i % 3] for i in range(20)]
CAPTIONS[2][2] = TEXTS[5]  # which no other image has
JSON = Captions(field="json", key="captions")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("captioned")
    with webdataset.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=7, verbose=0) as writer:
        for i, captions in enumerate(CAPTIONS):
            members = {"jpg": jpeg(i, 20, 5), "txt": captions[0].encode(), "json": {"captions": captions}}
            writer.write({"__key__": f"{i:06d}", **members, "json": json.dumps({"captions": captions}).encode()})
    index_shards(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    folder = tmp_path_factory.mktemp("towers")
    saved(folder, "clip", beside_timm=True)
    return load_towers(str(folder))


def naive_rank(scores: list[float], own: set[int]) -> int:
    best = max(scores[i] for i in own)
    return sum(score >= best for i, score in enumerate(scores) if i not in own)


@given(data=st.data(), queries=st.integers(1, 7), candidates=st.integers(1, 7), chunk=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_ranks_are_those_of_a_loop(data: st.DataObject, queries: int, candidates: int, chunk: int) -> None:
    """Of small whole numbers, so that there are equals."""
    row = st.lists(st.integers(-1, 1), min_size=2, max_size=2)
    a = torch.tensor(data.draw(st.lists(row, min_size=queries, max_size=queries))).float()
    b = torch.tensor(data.draw(st.lists(row, min_size=candidates, max_size=candidates))).float()
    subsets = st.sets(st.integers(0, candidates - 1), min_size=1)
    own = data.draw(st.lists(subsets, min_size=queries, max_size=queries))
    pairs = torch.tensor([(q, c) for q, members in enumerate(own) for c in sorted(members)])
    expected = [naive_rank([float((x * y).sum()) for y in b], members) for x, members in zip(a, own, strict=True)]
    assert ranks_of_own(a, b, pairs, chunk=chunk).tolist() == expected


def test_what_is_all_the_same_finds_nothing() -> None:
    same, pairs = torch.ones(6, 4) / 2, torch.arange(6).repeat(2, 1).T
    assert ranks_of_own(same, same, pairs).tolist() == [5] * 6
    apart = torch.eye(6)
    assert ranks_of_own(apart, apart, pairs).tolist() == [0] * 6


def expected_recalls(images: Tensor, texts: Tensor, captions: list[list[str]], order: list[str]) -> dict[str, float]:
    """Every caption by every image, by the definitions."""
    scores = (images.double() @ texts.double().T).tolist()
    of_image = [naive_rank(row, {order.index(c) for c in own}) for row, own in zip(scores, captions, strict=True)]
    of_caption = [
        naive_rank([row[order.index(c)] for row in scores], {i for i, has in enumerate(captions) if c in has})
        for own in captions
        for c in own
    ]
    named = (("image_to_text", of_image), ("text_to_image", of_caption))
    return {f"{name}_r{k}": 100 * sum(r < k for r in ranks) / len(ranks) for name, ranks in named for k in (1, 5, 10)}


@pytest.mark.parametrize("several", [False, True])
def test_recalls_are_those_of_a_loop(towers: Towers, shards: str, several: bool) -> None:
    dataset = open_dataset(shards)
    captions = CAPTIONS if several else [own[:1] for own in CAPTIONS]
    report = Retrieval(dataset, JSON if several else Captions(), extraction=Extraction(batch_size=3)).run(towers)
    order = list(dict.fromkeys(c for own in captions for c in own))
    with torch.no_grad():
        texts = towers.encode_text(towers.tokenize(order))
    images = Extraction().extract(image_side(towers), dataset, num_classes=None, label="")[0].values
    expected = expected_recalls(images, texts, captions, order)
    assert {name: pytest.approx(value) for name, value in expected.items()} == dict(report.metrics)
    assert 0 < report.metrics["image_to_text_r1"] < 100
    assert report.metric == "image_to_text_r1"
    assert report.data["num_captions"] == sum(map(len, captions))
    assert report.data["num_texts"] == len(order)
    assert report.outcomes.correct.mean() == pytest.approx(report.value / 100)


@pytest.mark.parametrize("what", ["the image", "the bytes"])
def test_an_image_that_cannot_be_used_is_left_out_with_its_captions(
    towers: Towers, shards: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    dataset = open_dataset(shards)
    every = range(dataset.num_samples)
    few = Subset(dataset, np.array([i for i in every if i != 2]), None)
    expected = Retrieval(few, JSON).run(towers)
    read = ShardDataset.read

    def damaged(self: ShardDataset, i: int) -> Sample:
        if i == 2 and what == "the bytes":
            raise SampleError("a shard", "the bytes of the index", "others")
        sample = read(self, i)
        return replace(sample, fields={**sample.fields, "jpg": b"no image"}) if i == 2 else sample

    monkeypatch.setattr(ShardDataset, "read", damaged)
    report = Retrieval(dataset, JSON).run(towers)
    assert report.data["left_out"] == {"test": 1}
    assert "000002 in " in report.notes[0]
    assert report.metrics == expected.metrics
    assert report.chance == expected.chance
    assert report.outcomes.keys == expected.outcomes.keys
    assert report.data["num_texts"] == expected.data["num_texts"]


@pytest.mark.parametrize("text", [b"  ", b"\xff", None])
def test_an_image_without_a_caption_is_left_out(
    towers: Towers, shards: str, monkeypatch: pytest.MonkeyPatch, text: bytes | None
) -> None:
    dataset = open_dataset(shards)
    few = Subset(dataset, np.array([i for i in range(dataset.num_samples) if i not in (2, 9)]), None)
    expected = Retrieval(few).run(towers)
    read = ShardDataset.read

    def silent(self: ShardDataset, i: int) -> Sample:
        sample = read(self, i)
        fields = {name: data for name, data in sample.fields.items() if i not in (2, 9) or name != "txt"}
        if i == 2:
            fields |= {"jpg": b"no image"} | ({} if text is None else {"txt": text})
        return replace(sample, fields=fields)

    monkeypatch.setattr(ShardDataset, "read", silent)
    report = Retrieval(dataset).run(towers)
    assert report.data["left_out"] == {"test": 2}
    assert "2 of 20 test samples are left out" in report.notes[0]
    assert "000009 in shard-000001.tar: 000009.txt: expected a caption, found no such member" in report.notes[0]
    assert report.metrics == expected.metrics
    assert report.outcomes.keys == expected.outcomes.keys
    with pytest.raises(RunError, match=r"test set; shard-000000\.tar: 000002: .*at most 1 samples"):
        Retrieval(dataset, extraction=Extraction(max_bad_samples=1)).run(towers)


def test_the_first_samples_only(towers: Towers, shards: str) -> None:
    report = Retrieval(open_dataset(shards), max_test=7).run(towers)
    assert report.n == 7
    assert report.outcomes.keys == tuple(f"{i:06d}" for i in range(7))


def test_captions_that_are_not_there_are_told(towers: Towers, shards: str) -> None:
    with pytest.raises(FieldError, match="`text` members"):
        Retrieval(open_dataset(shards), Captions(field="text"))
    with pytest.raises(SampleError, match="captions under 'caption'"):
        Retrieval(open_dataset(shards), Captions(field="json", key="caption")).run(towers)
