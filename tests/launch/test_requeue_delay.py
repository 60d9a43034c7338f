"""A requeued job is let start in seconds, once, and by what SLURM says of it."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from launch.slurm import commands as slurm


def test_the_delay_of_a_requeue_is_shortened_once_and_only_where_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "slurm", lambda *words, seconds=0: said.append(words) or "")

    def in_seconds(seconds: int) -> str:
        return (datetime.now() + timedelta(seconds=seconds)).isoformat(timespec="seconds")

    waiting = {"JobId": "7", "Reason": "BeginTime", "StartTime": "Unknown"}
    slurm.shorten_requeue_delay({"JobId": "7", "Reason": "None", "EligibleTime": in_seconds(120)})
    slurm.shorten_requeue_delay({**waiting, "EligibleTime": "Unknown"})
    slurm.shorten_requeue_delay({**waiting, "EligibleTime": in_seconds(5)})
    assert said == []
    slurm.shorten_requeue_delay({**waiting, "EligibleTime": in_seconds(120)})
    assert said == [("scontrol", "update", "JobId=7", "StartTime=now+5")]
