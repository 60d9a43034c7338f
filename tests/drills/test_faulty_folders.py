"""Every command over a read-only, a full and a failing folder; `make test` tries each with one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faulty_folders import FAULTS
from tests.launch.conftest import cluster, commands  # noqa: F401
from tests.launch.run_folders import Commands
from tests.launch.test_faulty_folders import CASES, assert_fault_is_told, place  # noqa: F401


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_told_in_a_sentence(
    place: Path,  # noqa: F811
    cluster: Commands,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: str,
) -> None:
    monkeypatch.chdir(place)
    assert_fault_is_told(tmp_path / "faulty", fault, name)
