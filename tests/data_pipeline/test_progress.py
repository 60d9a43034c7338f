"""Progress passes everything on, keeps off stdout, and says nothing of what is quick."""

from __future__ import annotations

import pytest

from data_pipeline import progress
from data_pipeline.progress import track


def test_items_pass_lazily_and_quick_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    taken = []
    tracked = track((taken.append(i) or i for i in range(3)), label="work", total=3)  # type: ignore[func-returns-value]
    assert next(tracked) == 0
    assert taken == [0]
    assert list(tracked) == [1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("total", [3, None])
def test_slow_work_is_told_in_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, total: int | None
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert list(track(range(3), label="work", total=total)) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert all(line.startswith("work: ") for line in lines)
    assert lines[0].startswith("work: 1 of 3" if total else "work: 1 (")
    assert lines[-1].startswith("work: 3")
