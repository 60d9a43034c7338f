"""Files that appear whole, whoever else writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.durable import durable_file


def test_of_two_writers_with_one_process_id_the_last_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in two containers that share a folder."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with durable_file(tmp_path / "file") as first:
        first.write(b"first")
        with durable_file(tmp_path / "file") as second:
            second.write(b"second")
        assert (tmp_path / "file").read_bytes() == b"second"
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
