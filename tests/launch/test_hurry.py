"""A requeued job is let start in seconds, once, and by what SLURM says of it."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from launch.slurm import commands as slurm


def test_only_a_job_that_waits_for_long_is_hurried_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "slurm", lambda *words, seconds=0: said.append(words) or "")

    def in_seconds(seconds: int) -> str:
        return (datetime.now() + timedelta(seconds=seconds)).isoformat(timespec="seconds")

    waiting = {"JobId": "7", "Reason": "BeginTime", "StartTime": "Unknown"}
    slurm.hurry({"JobId": "7", "Reason": "None", "EligibleTime": in_seconds(120)})
    slurm.hurry({**waiting, "EligibleTime": "Unknown"})
    slurm.hurry({**waiting, "EligibleTime": in_seconds(5)})
    assert said == []
    slurm.hurry({**waiting, "EligibleTime": in_seconds(120)})
    assert said == [("scontrol", "update", "JobId=7", "StartTime=now+5")]
