"""Captions: found where they lie, one for each epoch, made tokens; what cannot be used is a bad sample."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import BatchSpec, TokenSpec
from data_pipeline.datasets.read import ShardDataset
from data_pipeline.errors import DataError, FieldError, SampleError
from data_pipeline.loader import evaluation_batches
from data_pipeline.samples.captions import CaptionReader, read_captions
from data_pipeline.samples.config import Captions
from tests.data_pipeline.tiny import evaluated, loader, photo, steps, write_shards


class Codes:
    """The code points of a text, cut or filled with zeros: reversible, so a test can tell what was read."""

    name, context_length = "codes", 12

    def __call__(self, text: str) -> Tensor:
        codes = [ord(letter) for letter in text[: self.context_length]]
        return torch.tensor(codes + [0] * (self.context_length - len(codes)))


def text_of(row: Tensor) -> str:
    return "".join(chr(code) for code in row.tolist() if code)


SPEC = BatchSpec(8, tokens=TokenSpec("codes", 12))
CAPTIONS = CaptionReader(Codes(), Captions())
FIVE = [f"words {n}" for n in range(5)]


def captioned(folder: Path, members: dict[int, dict[str, bytes]], count: int = 12) -> ShardDataset:
    rows = {i: {"jpg": photo(i), **members.get(i, {"txt": f"caption {i}".encode()})} for i in range(count)}
    return write_shards(folder, [count // 2, count - count // 2], replaced=rows)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_image_comes_with_the_tokens_of_its_own_caption(tmp_path: Path, num_workers: int) -> None:
    source = loader(captioned(tmp_path, {}), SPEC, captions=CAPTIONS, num_workers=num_workers)
    for step in steps(source, 0, 6):
        for batch in step.micro_batches:
            assert batch.tokens is not None
            assert (batch.tokens.shape, batch.tokens.dtype) == ((len(batch), 12), torch.int64)
            assert [text_of(row) for row in batch.tokens] == [f"caption {int(key)}" for key in batch.keys]


def test_without_the_need_nothing_is_read(tmp_path: Path) -> None:
    (step,) = steps(loader(captioned(tmp_path, {}), BatchSpec(8)), 0, 1)
    assert step.micro_batches[0].tokens is None


@pytest.mark.parametrize(
    ("members", "where"),
    [
        ({"txt": "\n".join(["", *FIVE, "  "]).encode()}, {"lines": True}),
        ({"json": json.dumps({"n": 1, "texts": [*FIVE, ""]}).encode()}, {"field": "json", "key": "texts"}),
    ],
)
def test_of_several_captions_each_epoch_draws_one_and_evaluation_takes_the_first(
    tmp_path: Path, members: dict[str, bytes], where: dict[str, Any]
) -> None:
    dataset = captioned(tmp_path, dict.fromkeys(range(12), members))
    captions = CaptionReader(Codes(), Captions(**where))
    seen: dict[str, Counter[str]] = {}
    for step in steps(loader(dataset, SPEC, captions=captions, global_size=12), 0, 40):
        for key, row in zip(step.micro_batches[0].keys, step.micro_batches[0].tokens, strict=True):  # type: ignore[arg-type]
            seen.setdefault(key, Counter())[text_of(row)] += 1
    total = sum(seen.values(), Counter())
    assert set(total) == set(FIVE)
    assert max(total.values()) < 2 * min(total.values())  # 96 of each expected
    assert len({tuple(sorted(counts.items())) for counts in seen.values()}) > 6  # keys draw apart
    again = steps(loader(dataset, SPEC, captions=captions, global_size=6), 24 * 12, 1)[0].micro_batches[0]
    once = captions.tokens(dataset.read(int(again.keys[0])), seed=5, epoch=24)
    assert again.tokens is not None
    assert torch.equal(again.tokens[0], once)
    views = evaluated(SPEC.image_size)
    for batch in evaluation_batches(dataset, SPEC, views, batch_size=5, max_pixels=10**6, captions=captions):
        assert batch.tokens is not None
        assert {text_of(row) for row in batch.tokens} == {FIVE[0]}


WRONG = {
    "missing": ({}, {}, "no such member"),
    "empty": ({"txt": b""}, {}, "white space alone"),
    "blank": ({"txt": b" \n\t "}, {}, "white space alone"),
    "latin-1": ({"txt": "caf\u00e9".encode("latin-1")}, {}, "in UTF-8.*can't decode byte 0xe9"),
    "utf-16": ({"txt": "words".encode("utf-16")}, {}, "can't decode byte"),
    "no json": ({"json": b"{"}, {"field": "json", "key": "a"}, "JSON with captions under 'a'"),
    "list": ({"json": b"[1]"}, {"field": "json", "key": "a"}, "no JSON object"),
    "other key": ({"json": b'{"b": "x"}'}, {"field": "json", "key": "a"}, "the keys b"),
    "number": ({"json": b'{"a": 3}'}, {"field": "json", "key": "a"}, "neither text nor a list"),
    "null": ({"json": b'{"a": null}'}, {"field": "json", "key": "a"}, "white space alone"),
    "numbers": ({"json": b'{"a": ["x", 3]}'}, {"field": "json", "key": "a"}, "neither text nor a list"),
    "half a letter": ({"json": b'{"a": "\\ud800"}'}, {"field": "json", "key": "a"}, "surrogates not allowed"),
    "deep": ({"json": b"[" * 100_000}, {"field": "json", "key": "a"}, "JSON with captions under 'a'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_caption_that_cannot_be_used_is_told(kind: str) -> None:
    members, where, said = WRONG[kind]
    with pytest.raises(SampleError, match=said) as caught:
        read_captions(members, "k", **({"field": "txt"} | where))  # type: ignore[arg-type]
    assert caught.value.where == f"k.{where.get('field', 'txt')}"


def test_a_bad_caption_is_replaced_and_reported(tmp_path: Path) -> None:
    bad = {3: {"txt": b""}, 5: {"txt": b"\xff\xfe"}, 8: {"json": b"{}"}}
    found = steps(loader(captioned(tmp_path, bad), SPEC, captions=CAPTIONS, global_size=12), 0, 2)
    for step in found:
        assert sorted(bad.key for bad in step.bad) == ["0003", "0005", "0008"]
        batch = step.micro_batches[0]
        assert batch.tokens is not None
        assert [text_of(row) for row in batch.tokens] == [f"caption {int(key)}" for key in batch.keys]


def test_data_without_captions_are_refused_before_anything_starts(tmp_path: Path) -> None:
    plain = write_shards(tmp_path, [4])
    with pytest.raises(FieldError, match=r"caption field `txt`: .*found the fields cls, jpg.*data\.captions\.field"):
        loader(plain, SPEC, captions=CAPTIONS)
    with pytest.raises(FieldError, match=r"caption field `json`"):
        evaluation_batches(
            plain, SPEC, evaluated(SPEC.image_size), batch_size=1, max_pixels=1,
            captions=CaptionReader(Codes(), Captions(field="json")),
        )  # fmt: skip


def test_another_tokenizer_than_the_objective_asks_for_is_refused(tmp_path: Path) -> None:
    dataset = captioned(tmp_path, {})
    with pytest.raises(DataError, match=r"context_length=13.* found .*context_length=12"):
        loader(dataset, replace(SPEC, tokens=TokenSpec("codes", 13)), captions=CAPTIONS)
    with pytest.raises(DataError, match="found None"):
        loader(dataset, SPEC)
