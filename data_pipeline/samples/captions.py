"""The captions of a sample, the one that an epoch sees, and its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from data_pipeline.durable import from_json
from data_pipeline.errors import SampleError
from data_pipeline.order import keyed
from data_pipeline.samples.config import Captions

if TYPE_CHECKING:  # converting reads captions too, in processes that should start at once
    from torch import Tensor

    from data_pipeline.batch import Sample


class Tokenizer(Protocol):
    """Text -> [L] int64. A pure function of the text; it travels to loader processes, forked or spawned.

    Cleaning (HTML entities, white space, case) and truncation to L are its own.
    """

    @property
    def name(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    def __call__(self, text: str) -> Tensor: ...


@dataclass(frozen=True)
class CaptionReader:
    """Reads a sample's captions and makes tokens of one.

    Attributes:
        tokenizer: text -> tokens.
        captions: where they are.
    """

    tokenizer: Tokenizer
    captions: Captions

    def tokens(self, sample: Sample, *, seed: int, epoch: int | None) -> Tensor:
        """Tokens [L] of the sample's caption; of several, one chosen by (seed, epoch, key).

        Args:
            epoch: None: as it is evaluated, with its first caption.

        Raises:
            SampleError: it has no caption that can be used.
        """
        captions = self.captions
        found = read_captions(sample.fields, sample.key, captions.field, captions.key, lines=captions.lines)
        if epoch is None or len(found) == 1:
            return self.tokenizer(found[0])
        chance = next(keyed.uniforms("caption", seed, epoch, 0, sample.key))
        return self.tokenizer(found[int(chance * len(found))])


def read_captions(
    members: Mapping[str, bytes], name: str, field: str, key: str | None = None, *, lines: bool = False
) -> list[str]:
    """Every caption of a sample that is more than white space, at least one.

    Args:
        members: of the sample.
        name: of the sample, for messages.
        field, key, lines: as in `Captions`.

    Raises:
        SampleError: the member is missing, is not UTF-8 or not JSON, or holds no caption.
    """
    where = f"{name}.{field}"
    data = members.get(field)
    if data is None:
        raise SampleError(where=where, expected="a caption", found="no such member")
    try:
        text = data.decode()
        found = _entry(text, key) if key is not None else text.splitlines() if lines else [text]
        for caption in found:
            caption.encode()  # JSON can escape half a character, which no tokenizer could take
    except ValueError as error:
        expected = "a caption in UTF-8" if key is None else f"JSON with captions under {key!r}"
        raise SampleError(where=where, expected=expected, found=str(error)) from error
    found = [caption for caption in found if caption.strip()]
    if not found:
        raise SampleError(where=where, expected="a caption", found="nothing, or white space alone")
    return found


def one_a_line(captions: Sequence[str]) -> str:
    """Captions as the text that `lines: true` reads back: as many as there are, whatever line breaks they hold.

    One alone that has none is left as it is.
    """
    if len(captions) > 1 or len(captions[0].splitlines()) > 1:
        captions = [" ".join(caption.split()) for caption in captions]
    return "\n".join(captions)


def _entry(text: str, key: str) -> list[str]:
    record = from_json(text)
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f"the keys {', '.join(record) or '(none)'}" if isinstance(record, dict) else "no JSON object")
    value = record[key]
    captions = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("neither text nor a list of texts")
    return captions
