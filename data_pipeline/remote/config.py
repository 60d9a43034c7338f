"""How data behind URLs are fetched and kept. Imports no torch."""

from __future__ import annotations

import os

from pydantic import Field

from data_pipeline.settings import Group


class CacheConfig(Group):
    """How data behind http://, https:// or s3:// are fetched and kept on this machine; none of it changes a result."""

    folder: str = Field(default_factory=lambda: os.path.expanduser("~/.cache/pretrain"))  # a local disk
    max_gb: float = Field(50, gt=0)  # the shard used longest ago goes first; 10^9 bytes each
    timeout_seconds: float = Field(30, gt=0)  # that an answer, or its next bytes, may take
    retries: int = Field(5, ge=0, le=100)  # attempts after the first

    @property
    def max_bytes(self) -> int:
        """The bound of all files in the folder together, those being fetched included."""
        return int(self.max_gb * 1e9)


DEFAULT = CacheConfig()
