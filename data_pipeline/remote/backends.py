"""The libraries that speak http(s) and s3: connections of a thread, and what their errors mean in our words."""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

_WORTH_A_RETRY = (408, 425, 429)  # of the 4xx; the others say that the request is wrong


class FailedError(Exception):
    """An attempt that failed; the reason, without anything secret."""


class RefusedError(Exception):
    """An answer that another attempt would not change."""


@lru_cache(maxsize=16)
def backend(scheme: str, timeout_seconds: float, _process: int, _thread: int) -> Any:
    """fsspec's file system of a thread: its connections survive no fork, and opening them no second thread."""
    import fsspec

    if scheme == "s3":
        config = {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds, "retries": {"max_attempts": 0}}
        s3 = fsspec.filesystem("s3", skip_instance_cache=True, config_kwargs=config, max_concurrency=1)
        s3.retries = 1  # ours are the retries
        return s3
    import aiohttp

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_same_scheme)
    timeout = aiohttp.ClientTimeout(
        total=None, connect=timeout_seconds, sock_connect=timeout_seconds, sock_read=timeout_seconds
    )
    client = {"timeout": timeout, "trace_configs": [trace], "trust_env": True}
    return fsspec.filesystem(
        scheme, skip_instance_cache=True, client_kwargs=client, headers={"Accept-Encoding": "identity"}
    )


async def _same_scheme(_session: object, _context: object, redirect: Any) -> None:
    """Raises unless a redirect stays with its scheme, or goes from http to https."""
    target = urlsplit(redirect.response.headers.get("Location", "")).scheme.lower()
    if target not in ("", "https", redirect.url.scheme):
        raise RefusedError(f"a redirect from {redirect.url.scheme}: to {target}:")


def explained(problem: Exception, timeout_seconds: float) -> Exception:
    """What went wrong in our words: a library's own would show signed URLs."""
    status = getattr(problem, "status", None)
    if isinstance(problem, FileNotFoundError):
        return RefusedError("no such file")
    if isinstance(problem, PermissionError):
        return RefusedError("no permission to read it")
    if type(problem).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return RefusedError("no credentials in the environment")
    if isinstance(status, int) and 400 <= status < 500 and status not in _WORTH_A_RETRY:
        return RefusedError(f"HTTP status {status}")
    if isinstance(status, int) and status:
        return FailedError(f"HTTP status {status}")
    if isinstance(problem, TimeoutError) or "Timeout" in type(problem).__name__:
        return FailedError(f"no answer for {timeout_seconds:g} s")
    if isinstance(problem, OSError) and problem.errno and "://" not in (problem.strerror or "://"):
        return FailedError(problem.strerror)
    if "ConnectionError" in type(problem).__name__:
        return FailedError("no connection")
    return FailedError(f"a broken answer ({type(problem).__name__})")
