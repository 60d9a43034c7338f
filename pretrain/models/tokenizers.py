"""Tokenizers of captions: CLIP's own, which comes with open_clip, merges of the same form in a local file, or one that
transformers saved in a folder.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from data_pipeline.batch import TokenSpec
from data_pipeline.durable import from_json
from data_pipeline.errors import RecipeError

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import Tokenizer

CLIP = "clip"
SAVED, SAVED_CONFIG = "tokenizer.json", "tokenizer_config.json"

_NUM_MERGES = 49152 - 256 - 2
_CHARACTERS_PER_TOKEN = 100  # what lies behind is cut before it is looked at: a page of text, or an attack
_WHITE_SPACE = re.compile(r"(?:\s|&nbsp;|&#160;|&#xa0;)+", re.IGNORECASE)
_WORDS_KEPT = 100_000
_CLEANINGS = ("whitespace", "lower", "canonicalize")


class ClipTokenizer:
    """Lower-cased byte pair encoding (Radford et al. 2021, sec. 2.4; Sennrich et al. 2016), as open_clip has it.

    Row: start of text, the tokens, end of text, zeros. A longer caption is cut, its last token the end of text.

    Args:
        context_length: L, at least 3.
        merges: a gzipped file of merges in CLIP's form; None: the one in open_clip's package.
    """

    def __init__(self, context_length: int, merges: Path | None = None) -> None:
        self.context_length, self._merges = context_length, merges
        self.name = CLIP if merges is None else str(merges)

    def __reduce__(self) -> tuple[Any, ...]:
        return ClipTokenizer, (self.context_length, self._merges)

    def __call__(self, text: str) -> Tensor:
        """Tokens of one caption, [L] int64."""
        if len(self._bpe.cache) > _WORDS_KEPT:  # open_clip keeps every word it ever met
            self._bpe.cache = {token: token for token in ("<start_of_text>", "<end_of_text>")}
        tokens: Tensor = self._bpe(_cut(text, self.context_length))[0]
        return tokens

    @cached_property
    def _bpe(self) -> SimpleTokenizer:
        from open_clip.tokenizer import SimpleTokenizer  # seconds, which a run without captions need not wait

        given = {} if self._merges is None else {"bpe_path": str(self._merges)}
        return SimpleTokenizer(context_length=self.context_length, **given)

    @property
    def vocab_size(self) -> int:
        return int(self._bpe.vocab_size)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the vocabulary in its order."""
        return hashlib.sha256("\n".join(self._bpe.encoder).encode()).hexdigest()


class SavedTokenizer:
    """A folder's `tokenizer.json`, with `tokenizer_config.json` beside it, used as open_clip's HFTokenizer uses it.

    Row: the tokens with what the tokenizer puts around them, cut and filled up to L as it says. It is JSON, read by the
    tokenizers library: nothing in it is run.

    Args:
        context_length: L.
        folder: as transformers' `save_pretrained` writes it.
        clean: what is done to a text before: white space alone, lower case too, or punctuation taken out as well.
    """

    def __init__(self, context_length: int, folder: Path, clean: str) -> None:
        self.context_length, self._folder, self._clean = context_length, folder, clean
        self.name = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return SavedTokenizer, (self.context_length, self._folder, self._clean)

    def __call__(self, text: str) -> Tensor:
        """Tokens of one caption, [L] int64."""
        from open_clip.tokenizer import get_clean_fn

        cleaned = get_clean_fn(self._clean)(_cut(text, self.context_length))
        return torch.tensor(self._read.encode(cleaned).ids)

    @cached_property
    def _read(self) -> Tokenizer:
        from tokenizers import Tokenizer

        read = Tokenizer.from_file(str(self._folder / SAVED))
        config = self._folder / SAVED_CONFIG
        told = from_json(config.read_bytes()) if config.is_file() else {}
        pad = told.get("pad_token") or (read.padding or {}).get("pad_token")
        pad = pad["content"] if isinstance(pad, dict) else pad
        if pad is None or (pad_id := read.token_to_id(pad)) is None:
            raise ValueError(f"no pad_token in {SAVED_CONFIG}")
        read.enable_truncation(self.context_length, direction=told.get("truncation_side", "right"))
        read.enable_padding(
            length=self.context_length, pad_id=pad_id, pad_token=pad, direction=told.get("padding_side", "right")
        )
        return read

    @property
    def vocab_size(self) -> int:
        return int(self._read.get_vocab_size())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the whole tokenizer, its cleaning and padding with it."""
        return hashlib.sha256(f"{self._clean} {self._read.to_str()}".encode()).hexdigest()


def _cut(text: str, context_length: int) -> str:
    """What tokens are made of: the beginning of a longer text, whose white space does not count: it is cleaned away."""
    most = _CHARACTERS_PER_TOKEN * context_length
    return text if len(text) <= most else _WHITE_SPACE.sub(" ", text).lstrip()[:most]


def build_tokenizer(spec: TokenSpec) -> ClipTokenizer | SavedTokenizer:
    """The tokenizer that an objective asks for; nothing is ever downloaded.

    Raises:
        RecipeError: neither "clip" nor local files of a tokenizer; too short a context; or more tokens than the model
            has.
    """
    if spec.context_length < 3:
        problem = f"context_length: expected at least 3 (start, a token, end), found {spec.context_length}."
        raise RecipeError("tokenizer", [problem])
    if spec.tokenizer == CLIP:
        return _ready(ClipTokenizer(spec.context_length), spec)
    path = Path(spec.tokenizer)
    if (path / SAVED).is_file():
        return _ready(_saved(path, spec), spec)
    if found := _not_merges(path):
        problem = (
            f"expected {CLIP!r}, a local file of merges in CLIP's form (bpe_*.txt.gz), or a folder with {SAVED}, found "
            f"{found} at {spec.tokenizer}. Tokenizers from a hub are not downloaded: fetch its files, and name their "
            "folder (objective.tokenizer; --tokenizer)."
        )
        raise RecipeError("tokenizer", [problem])
    return _ready(ClipTokenizer(spec.context_length, path), spec)


def _saved(folder: Path, spec: TokenSpec) -> SavedTokenizer:
    if spec.clean not in _CLEANINGS:
        problem = f"tokenizer_kwargs of the text tower: expected clean alone, found {spec.clean}."
        raise RecipeError("tokenizer", [problem])
    tokenizer = SavedTokenizer(spec.context_length, folder, spec.clean)
    try:
        tokenizer("")
    except ImportError:
        problem = f"{folder / SAVED}: expected the tokenizers library, found none. Run pip install tokenizers."
        raise RecipeError("tokenizer", [problem]) from None
    except Exception as error:  # the library's errors have no class of their own
        problem = (
            f"{folder / SAVED}: expected a tokenizer as transformers saves it, found {type(error).__name__}: {error}."
        )
        raise RecipeError("tokenizer", [problem]) from error
    return tokenizer


T = TypeVar("T", ClipTokenizer, SavedTokenizer)


def _ready(tokenizer: T, spec: TokenSpec) -> T:
    """Read now, so that loader processes, which are forked, share what it read."""
    tokenizer("")
    if spec.vocab_size is not None and tokenizer.vocab_size > spec.vocab_size:
        problem = (
            f"objective.tokenizer: expected one of at most {spec.vocab_size} tokens, which the text tower knows, found "
            f"{tokenizer.name} with {tokenizer.vocab_size}. To train the tower with this one, set its vocab_size "
            f"(model.vocab_size, or of text) to {tokenizer.vocab_size}."
        )
        raise RecipeError("tokenizer", [problem])
    return tokenizer


def _not_merges(path: Path) -> str:
    """What the file is instead of merges; empty if it is what it should be."""
    if not path.is_file():
        return "no file"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : _NUM_MERGES + 1]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        return f"no gzipped text ({error})"
    if len(lines) < _NUM_MERGES or any(len(line.split()) != 2 for line in lines):
        return f"a file without {_NUM_MERGES} merges"
    return ""
