"""What became of each picture: of those that a command met, took or named, that each is there exactly once."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath

from tests.drills.field import Fate, Kind, Picture


def account(
    pictures: Mapping[str, Picture], kinds: Mapping[str, Kind], found: dict[tuple[Fate, ...], list[str]]
) -> None:
    """Every picture was met exactly once, and as its kind should be.

    Args:
        pictures: all that were written, by name.
        kinds: theirs.
        found: names that were met, by the fates that should lead there.
    """
    expected = {fates: {n for n, p in pictures.items() if kinds[p.kind].fate in fates} for fates in found}
    for fates, names in found.items():
        strange, missing = set(names) - expected[fates], expected[fates] - set(names)
        assert (strange, missing) == (set(), set()), fates
        assert len(names) == len(expected[fates]), f"named twice: {fates}"
    assert sum(map(len, found.values())) == len(pictures)


def without(names: Iterable[str], others: Collection[str]) -> list[str]:
    return [name for name in names if name not in others]


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Members of the samples in shards, by key, as webdataset divides their names."""
    members: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                parent, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                sample = members.setdefault(f"{parent}/{stem}".lstrip("/"), {})
                assert extension not in sample
                sample[extension] = file.read()
    return members


def image(sample: Mapping[str, bytes]) -> bytes:
    (data,) = (data for name, data in sample.items() if name not in ("cls", "txt", "json"))
    return data


def named(pictures: Mapping[str, Picture], kinds: Mapping[str, Kind], folder: Path) -> dict[str, dict[str, bytes]]:
    """The samples in shards by the names of the pictures whose bytes they have."""
    names = {p.data: name for name, p in pictures.items() if kinds[p.kind].fate is not Fate.REFUSED}
    found = samples(folder)
    by_name = {names[image(sample)]: sample for sample in found.values()}
    assert len(by_name) == len(found)
    return by_name


def key(name: str) -> str:
    """Of a picture in shards: webdataset's keys end at a dot."""
    path = PurePosixPath(name)
    return f"{path.parent}/{path.stem.replace('.', '_')}"


def lines(text: str, pattern: str) -> list[str]:
    """What the pattern's group found, line by line."""
    return [match[1] for match in map(re.compile(pattern).match, text.splitlines()) if match]
