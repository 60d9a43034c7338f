"""What a user names shards by: a folder, a tar, a brace pattern of tars; here, or behind a URL."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand

from data_pipeline.errors import DataError, ShardError
from data_pipeline.messages import short_list

MAX_NAMES = 10_000_000  # of a brace pattern; two more digits in it would fill the memory


def local_path(spec: str) -> Path:
    """`spec` as a path; raises DataError for URLs: some readers would run a `pipe:` as a shell command."""
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", spec):
        raise DataError(
            where=scheme[0],  # not all of it: a URL may hold a password
            expected="a local folder, file or brace pattern",
            found=f"a {scheme[0]} URL",
            fix="Copy the data to a local or mounted folder and give its path. "
            "Training, evaluation and `pretrain data verify` and `stats` also read http://, https:// and s3://.",
        )
    path = Path(spec)
    try:
        path.exists()
    except OSError as error:
        found = error.strerror or str(error)
        raise DataError(where=spec[:200], expected="a path that can be looked at", found=found) from error
    return path


def find_tars(spec: str) -> tuple[Path, list[str]]:
    """(folder, names in it) of the tars in a folder, or of a tar or a brace pattern.

    Raises:
        ShardError: there is none, or a pattern names one twice.
    """
    path = local_path(spec)
    if path.is_dir():
        root, names = path, sorted(entry.name for entry in path.glob("[!.]*.tar"))
    else:
        tars = [Path(name) for name in _expand(spec)]
        if any(tar.is_absolute() for tar in tars):
            tars = [tar.absolute() for tar in tars]
        root = Path(os.path.commonpath([tar.parent for tar in tars]))
        names = [tar.relative_to(root).as_posix() for tar in tars]
    missing = [root / name for name in names if not (root / name).is_file()]
    wrong = [name for name in names if not is_inside(name)]
    if missing or wrong or not names:
        raise ShardError(
            where=spec,
            expected="a folder of tars, a tar, or a brace pattern of tars",
            found=f"no file {missing[0]}" if missing else f"{wrong[0]}, not a tar" if wrong else "no tar",
            fix="Correct the path or pattern.",
        )
    _refuse_twice(spec, names)
    return root, names


def split_url(url: str) -> tuple[str, list[str] | None]:
    """(URL of the folder, names in it) of a URL as `load_manifest` takes it; None: all that the manifest has.

    Raises:
        DataError: not a brace pattern.
        ShardError: what the pattern names are not tars of one folder, or one of them twice.
    """
    folder, _, last = url.rpartition("/")
    if last.endswith(".json"):
        return folder, None
    if not last.endswith(".tar") and "{" not in url:
        return url, None
    tars = list(_expand(url))
    folder = posixpath.commonpath([posixpath.dirname(tar) for tar in tars]).replace(":/", "://", 1)
    names = [tar[len(folder) + 1 :] for tar in tars]
    wrong = [name for name in names if not is_inside(name)]
    together = bool(folder.partition("://")[2])
    if wrong or not together:
        raise ShardError(
            where=url,
            expected="a pattern of tars in one folder",
            found=wrong[0] if together else "several hosts or buckets",
            fix="Correct the pattern.",
        )
    _refuse_twice(url, names)
    return folder, names


def _refuse_twice(pattern: str, names: Sequence[str]) -> None:
    """Whoever names a shard twice has mistyped: its samples would be there twice, or it would be passed over."""
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        raise ShardError(
            where=pattern,
            expected="each shard once",
            found=f"{short_list(twice, 3)} named more than once",
            fix="Correct the pattern. To see samples more often in training, give sources a weight (data.train as a "
            "list).",
        )


def is_inside(name: str) -> bool:
    """Whether `name` is that of a tar in a folder or below it, and of nothing outside."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name and path.suffix == ".tar"


def _expand(pattern: str) -> Iterator[str]:
    try:
        if _largest_range(pattern) > MAX_NAMES:  # which would be held in memory before its first name came
            raise ValueError(f"more than {MAX_NAMES:,} names")
        for i, name in enumerate(braceexpand(pattern)):
            if i == MAX_NAMES:
                raise ValueError(f"more than {MAX_NAMES:,} names")
            yield name
    except (ValueError, RecursionError) as error:
        raise DataError(
            where=pattern if len(pattern) <= 200 else f"{pattern[:200]}...",
            expected="a brace pattern such as shard-{000000..000009}.tar",
            found=str(error)[:200],
        ) from error


def _largest_range(pattern: str) -> int:
    """Names that the longest `{first..last}` in the pattern stands for."""
    bounds = re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}", pattern)
    return max((abs(int(last) - int(first)) + 1 for first, last in bounds), default=0)
