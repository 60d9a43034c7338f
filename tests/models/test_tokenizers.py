"""Tokenizers: open_clip's own rows, in any process, with bounded memory and time; nothing downloaded."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import pickle
from pathlib import Path

import open_clip
import pytest
import tokenizers as hugging_face
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, default_bpe
from transformers import PreTrainedTokenizerFast

from data_pipeline.batch import TokenSpec
from data_pipeline.errors import RecipeError
from pretrain.models import tokenizers
from pretrain.models.tokenizers import SAVED, ClipTokenizer, SavedTokenizer, build_tokenizer

TEXTS = ["a red circle", "  Fish &amp; chips\n<b>now</b>", "日本語 😀", "x" * 300, "word " * 200, "é" * 5]


@pytest.fixture(scope="module")
def clip() -> ClipTokenizer:
    return build_tokenizer(TokenSpec("clip", 77))


@pytest.mark.parametrize("text", TEXTS)
def test_rows_are_those_of_open_clip(clip: ClipTokenizer, text: str) -> None:
    expected = open_clip.get_tokenizer("ViT-B-32")([text])[0]
    assert torch.equal(clip(text), expected)
    assert (clip(text).dtype, clip(text).shape) == (torch.int64, (77,))


@pytest.fixture(scope="module")
def short() -> ClipTokenizer:
    return build_tokenizer(TokenSpec("clip", 5))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), cut=st.booleans())
def test_a_row_starts_ends_and_is_filled_up(clip: ClipTokenizer, short: ClipTokenizer, text: str, cut: bool) -> None:
    row = (short if cut else clip)(text)
    end = clip.vocab_size - 1
    assert row[0] == end - 1
    assert (row == end).any()
    first_end = int((row == end).int().argmax())
    assert "<end_of_text>" in text or not row[first_end + 1 :].any()


def test_it_travels_to_processes_forked_and_spawned(clip: ClipTokenizer) -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert torch.equal(pool.apply(clip, (TEXTS[0],)), clip(TEXTS[0]))
    sent = pickle.dumps(clip)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)(TEXTS[0]), clip(TEXTS[0]))


def test_words_it_met_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "_WORDS_KEPT", 50)
    tokenizer, free = ClipTokenizer(16), ClipTokenizer(16)
    for n in range(300):
        text = "".join(chr(97 + int(digit)) for digit in str(n * 7919)) + "q end"
        assert torch.equal(tokenizer(text), free(text))
    assert len(tokenizer._bpe.cache) < 60


def test_an_endless_text_is_cut_before_it_is_looked_at(clip: ClipTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging takes time with the square of a word's length: a megabyte of letters would take hours."""
    seen: list[int] = []
    monkeypatch.setattr(clip._bpe, "clean_fn", lambda text: seen.append(len(text)) or text)
    clip("ab " * 10**6)
    assert seen == [7700]


FAR = [" " * 7_700, "\n\t" * 50_000, "&nbsp;" * 2_000, "\u3000" * 9_000]


@pytest.mark.parametrize("space", FAR)
def test_white_space_does_not_push_a_caption_out_of_sight(clip: ClipTokenizer, folder: Path, space: str) -> None:
    saved = SavedTokenizer(8, folder, "lower")
    for tokenizer in (clip, saved):
        assert torch.equal(tokenizer(f"{space}a red circle"), tokenizer("a red circle"))
        assert torch.equal(tokenizer(f"a red{space}circle"), tokenizer("a red circle"))


def test_a_local_file_of_merges_will_do(clip: ClipTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(Path(default_bpe()).read_bytes())
    local = build_tokenizer(TokenSpec(str(path), 77))
    assert (local.name, local.context_length) == (str(path), 77)
    assert torch.equal(local(TEXTS[1]), clip(TEXTS[1]))
    assert local.fingerprint == clip.fingerprint


@pytest.mark.parametrize("name", ["hf-hub:timm/ViT-B-16-SigLIP", "ViT-B-32", "nowhere.txt.gz", ""])
def test_what_would_be_downloaded_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"expected 'clip', a local file.*not downloaded"):
        build_tokenizer(TokenSpec(name, 77))


@pytest.mark.parametrize(
    "data",
    [b"", b"plain text", gzip.compress(b"a b\n" * 10), gzip.compress(b"\xff" * 99)],
    ids=["empty", "text", "other lines", "no text"],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "merges.txt.gz").write_bytes(data)
    with pytest.raises(RecipeError, match=r"found (no gzipped text|a file without 48894 merges)"):
        build_tokenizer(TokenSpec(str(tmp_path / "merges.txt.gz"), 77))


def test_too_short_a_context_is_refused() -> None:
    with pytest.raises(RecipeError, match="context_length: expected at least 3"):
        build_tokenizer(TokenSpec("clip", 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def save_tokenizer(folder: Path) -> Path:
    """A small one of SigLIP's kind, as transformers saves it: pieces of words, an end that fills rows up as well."""
    made = hugging_face.Tokenizer(hugging_face.models.Unigram())
    made.pre_tokenizer = hugging_face.pre_tokenizers.Metaspace()
    trainer = hugging_face.trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    made.train_from_iterator([*TEXTS, "A Red_circle, beside a Blue: square! fish and chips"] * 3, trainer)
    made.post_processor = hugging_face.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
@pytest.mark.parametrize("length", [4, 64])
def test_a_folders_rows_are_those_of_open_clip(folder: Path, clean: str, length: int) -> None:
    theirs = HFTokenizer(str(folder), context_length=length, clean=clean)
    ours = build_tokenizer(TokenSpec(str(folder), length, 60, clean))
    for text in [*TEXTS, "A Red_circle, beside  a Blue: square!", ""]:
        row = ours(text)
        assert (row.dtype, row.shape) == (torch.int64, (length,))
        assert torch.equal(row, theirs([text])[0]), text
    sent = pickle.loads(pickle.dumps(ours))
    assert torch.equal(sent(TEXTS[0]), ours(TEXTS[0]))
    assert len(pickle.dumps(ours)) < 1000


def test_a_folders_fingerprint_follows_all_that_decides_its_rows(folder: Path, tmp_path: Path) -> None:
    made = {SavedTokenizer(length, folder, clean).fingerprint for length in (8, 9) for clean in ("lower", "whitespace")}
    assert len(made) == 4
    assert SavedTokenizer(8, folder, "lower").fingerprint in made


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ({SAVED: "{"}, r"expected a tokenizer as transformers saves it"),
        ({SAVED: '{"model": {"type": "Pickle"}}'}, r"expected a tokenizer as transformers saves it"),
        ({"tokenizer_config.json": "{}"}, r"no pad_token"),
        ({"tokenizer_config.json": "[" * 10**5}, r"more than 100 deep"),
        ({"tokenizer_config.json": '{"pad_token": "<nowhere>"}'}, r"no pad_token"),
    ],
)
def test_a_folder_of_something_else_is_refused(folder: Path, tmp_path: Path, harm: dict[str, str], told: str) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, text in harm.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=told):
        build_tokenizer(TokenSpec(str(tmp_path), 8))


def test_a_folder_that_the_tower_was_not_made_for_is_refused(folder: Path) -> None:
    size = len(json.loads((folder / SAVED).read_bytes())["model"]["vocab"])
    assert build_tokenizer(TokenSpec(str(folder), 8, size)).vocab_size == size
    with pytest.raises(RecipeError, match=rf"at most {size - 1} tokens.* with {size}"):
        build_tokenizer(TokenSpec(str(folder), 8, size - 1))
    with pytest.raises(RecipeError, match=r"tokenizer_kwargs of the text tower: .*found strip_sep_token"):
        build_tokenizer(TokenSpec(str(folder), 8, size, "strip_sep_token"))


def test_an_endless_text_for_a_folder_is_cut_before_it_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("open_clip.tokenizer.get_clean_fn", lambda _: lambda text: seen.append(len(text)) or text)
    SavedTokenizer(8, folder, "lower")("ab " * 10**6)
    assert seen == [800]
