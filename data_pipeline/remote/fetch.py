"""A folder behind http(s):// or s3://: its files fetched whole, each attempt bounded, and checked before use.

Any fsspec backend could serve; these two are tested. Credentials come from where their libraries look for them
(environment, ~/.aws, ~/.netrc), never from the URL, because a URL is written into recipes and messages.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import quote, urlsplit

from data_pipeline.errors import DataError, ManifestError, PretrainError, RunError, ShardError
from data_pipeline.remote.backends import FailedError, RefusedError, backend, explained
from data_pipeline.remote.cache import Cache
from data_pipeline.remote.config import CacheConfig
from data_pipeline.url_secrets import EXPECTED, FIX, FOUND, hidden, holds_secrets

T = TypeVar("T")

_thread = threading.local()
SCHEMES = ("http", "https", "s3")
_LEAST_RATE = 50_000  # bytes a second; a server that trickles is as good as dead
_LOOK_SECONDS = 0.25  # between looks at a transfer from which nothing comes
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between attempts
_LOCAL_TROUBLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EFBIG, errno.ENOMEM,
)  # fmt: skip


def remote_url(spec: str) -> str | None:
    """`spec` without a slash at its end if it is a URL that can be read from, None if it is none of these schemes.

    Raises:
        DataError: the URL names no host or bucket, or holds a password or query.
    """
    scheme, separator, rest = spec.partition("://")
    if not separator or scheme.lower() not in SCHEMES:
        return None
    host = rest.partition("/")[0]
    if holds_secrets(spec) or "@" in host or "?" in rest or "#" in rest:
        raise DataError(where=hidden(spec), expected=EXPECTED, found=FOUND, fix=FIX)
    try:
        parts = urlsplit(f"{scheme}://{host}")
        named = bool(parts.hostname) and parts.port != 0  # reading the port checks it
    except ValueError:
        named = False
    if not named or any(character.isspace() or not character.isprintable() for character in spec):
        expected = "a URL such as s3://bucket/folder or https://host/folder"
        raise DataError(where=spec, expected=expected, found="another host, or a space in it")
    return f"{scheme.lower()}://{rest}".rstrip("/")


@dataclass(frozen=True)
class Remote:
    """The files below a URL. Travels to worker processes; each makes its own connections.

    Args:
        url: of the folder, as `remote_url` gives it.
        cache_config: how its files are fetched and kept.
    """

    url: str
    cache_config: CacheConfig

    def __str__(self) -> str:
        return self.url

    def join(self, name: str) -> str:
        """URL of the file `name`."""
        return f"{self.url}/{name}"

    @property
    def cache(self) -> Cache:
        return Cache(Path(self.cache_config.folder).expanduser(), self.cache_config.max_bytes)

    def open_shard(self, name: str, num_bytes: int, sha256: str) -> BinaryIO:
        """The shard `name`, out of the cache or fetched into it, its size and hash compared.

        Raises:
            ShardError: it is not there, may not be read, or has other bytes each time.
            RunError: the server did not send it, or the cache cannot be written.
        """

        def check(path: Path) -> None:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            size = path.stat().st_size
            if (size, found) != (num_bytes, sha256):
                raise ShardError(
                    where=name,
                    expected=f"a shard of {num_bytes:,} bytes, sha256 {sha256[:12]}..., as the manifest says",
                    found=f"{size:,} bytes, sha256 {found[:12]}...",
                    fix="Upload the shard and its manifest again, both from one place.",
                )

        def fetch(path: Path) -> None:
            self.fetch(name, path, max_bytes=num_bytes, check=check, error=ShardError)

        return self.cache.open(f"{sha256}.tar", num_bytes, fetch, check)

    def distrust_shard(self, sha256: str) -> None:
        """The shard with this hash is checked again when it is opened next."""
        self.cache.distrust(f"{sha256}.tar")

    def load_index(self, name: str, sha256: str, num_bytes: int, parse: Callable[[bytes], T]) -> T:
        """What `parse` makes of the index `name`, that of the shard with this hash and size, by way of the cache.

        Raises:
            ManifestError: it is not there, may not be read, or is damaged each time.
            RunError: as `open_shard`.
        """
        most = num_bytes + 2**20  # each member has a header of 512 bytes in the tar, and fewer in the index

        def check(path: Path) -> T:
            return parse(path.read_bytes())

        def fetch(path: Path) -> None:
            self.fetch(name, path, max_bytes=most, check=check, error=ManifestError)

        with self.cache.open(key := f"{sha256}.idx", 0, fetch, check) as file, suppress(ManifestError):
            return parse(file.read())
        self.cache.distrust(key)  # it was changed in place, with its size
        with self.cache.open(key, 0, fetch, check) as file:
            return parse(file.read())

    def fetch(self, name: str, path: Path, *, max_bytes: int, check: Callable[[Path], T], error: type[DataError]) -> T:
        """Fetch the file `name` to `path`, as often as `cache_config.retries` allows; returns what `check` makes of it.

        Args:
            max_bytes: more are not taken.
            check: of the file at `path`; a DataError counts as a failed attempt, as an error page may be sent
                in place of the file.
            error: raised where the file is not there or may not be read.
        """
        started = time.monotonic()
        for attempt in range(self.cache_config.retries + 1):
            if attempt:
                pause = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
                _stop_of_thread().wait(pause * random.SystemRandom().uniform(0.5, 1.5))  # not the training's generators
            try:
                self._transfer(name, path, max_bytes)
                return check(path)
            except RefusedError as refused:
                raise error(
                    where=self.join(name),
                    expected="a file that can be fetched",
                    found=str(refused),
                    fix="Correct the URL, or give credentials in the environment. Beside the shards there must be "
                    "their manifest.json and indexes (`pretrain data index`, before they are uploaded).",
                ) from None
            except FailedError as failed:
                last: PretrainError = RunError(
                    where=self.join(name),
                    expected="the file to be sent",
                    found=str(failed),
                    fix="See that the server is up and can be reached from here, and start again. "
                    "How long it is waited for: data.cache.retries and data.cache.timeout_seconds.",
                )
            except DataError as wrong:
                last = type(wrong)(self.join(name), wrong.expected, wrong.found, wrong.fix)
        last.found += f" (the last of {self.cache_config.retries + 1} attempts in {time.monotonic() - started:.0f} s)"
        raise type(last)(last.where, last.expected, last.found, last.fix)

    def _transfer(self, name: str, path: Path, max_bytes: int) -> None:
        """One attempt.

        Raises:
            RefusedError: trying again would not help.
            FailedError: it might.
        """
        import fsspec.asyn

        scheme, _, rest = self.join(name).partition("://")
        # Our names hold no escapes; what a URL cannot hold as it is, such as a space, has to be one.
        target = rest if scheme == "s3" else f"{scheme}://{quote(rest, safe='/:[]')}"
        stop = _stop_of_thread()
        if stop.is_set():
            raise RefusedError("nobody who waits for it")

        received = 0

        def check_bounds(size: int | None = None, value: int | None = None, **_: object) -> None:
            nonlocal received
            received = received if value is None else value
            if max(size or 0, received) > max_bytes:
                raise FailedError(f"more than the {max_bytes:,} bytes that were expected")
            if stop.is_set():
                raise RefusedError("nobody who waits for it")
            seconds = time.monotonic() - started
            if seconds > self.cache_config.timeout_seconds + received / _LEAST_RATE:
                raise FailedError(f"{received:,} bytes in {seconds:.0f} s")

        async def get() -> None:
            """The transfer, its bounds checked as bytes come and also while none do, such as in the middle of a header
            that is sent letter by letter, which no time limit of the libraries ends.
            """
            callback = fsspec.Callback(hooks={"bounds": check_bounds})
            transfer = asyncio.ensure_future(files._get_file(target, str(path), callback=callback))
            try:
                while not transfer.done():
                    await asyncio.wait({transfer}, timeout=_LOOK_SECONDS)
                    if not transfer.done():
                        check_bounds()
                await transfer
            finally:
                transfer.cancel()
                await asyncio.wait({transfer}, timeout=_LOOK_SECONDS)  # it writes to the file no more

        files = backend(scheme, self.cache_config.timeout_seconds, os.getpid(), threading.get_ident())
        started = time.monotonic()  # the first to come here imports a library, which may take longer than a file
        try:
            fsspec.asyn.sync(files.loop, get)
        except (FailedError, RefusedError):
            raise
        except Exception as problem:  # each backend has a tree of its own
            if isinstance(problem, OSError) and (problem.errno in _LOCAL_TROUBLE or problem.filename == str(path)):
                raise
            raise explained(problem, self.cache_config.timeout_seconds) from None


def stop_thread_with(stop: threading.Event) -> None:
    """From now on, what the calling thread fetches is given up as soon as `stop` is set."""
    _thread.stop = stop


def _stop_of_thread() -> threading.Event:
    stop: threading.Event = getattr(_thread, "stop", None) or threading.Event()
    return stop
