"""What `pretrain logs` prints of a run's logs: the end, one rank, and all that comes until the run is over."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from launch.jobs import logs
from launch.jobs.logs import show_logs
from tests.gate import until
from tests.launch.run_folders import Commands, claimed, event, make_run, submit


def job_log(run: Path, name: str, *lines: str) -> None:
    with (run / "job" / "slurm" / name).open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setattr(logs, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(logs, "_ASK_SECONDS", 0.0)
    return io.StringIO()


def wait_for(text: str, out: io.StringIO) -> None:
    until(lambda: text in out.getvalue(), said=out.getvalue, seconds=20)


def in_the_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_run_without_a_job_has_what_rank_0_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", logged=20)
    capsys.readouterr()
    show_logs(run, lines=2)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 19/30")
    assert second.startswith("step 20/30")
    with pytest.raises(InputError, match="expected a log of rank 1, found only what rank 0 said"):
        show_logs(run, rank=1)


def test_the_newest_job_is_shown_and_of_its_nodes_the_first(tmp_path: Path, printed: io.StringIO) -> None:
    run = submit(make_run(tmp_path / "run", logged=2))
    job_log(run, "6_0_log.out", "of the submission before")
    job_log(run, "7_0_log.out", "first", "second")
    job_log(run, "7_0_log.err", "[rank 1] warning")
    job_log(run, "7_1_log.err", "[rank 2] third", "[rank 12] not rank 2's")
    job_log(run, "7_submission.sh", "#!/bin/bash")
    show_logs(run, out=printed)
    shown = printed.getvalue()
    assert [line for line in shown.splitlines() if "==>" not in line] == ["first", "second", "[rank 1] warning"]
    assert shown.count("==>") == 2
    for rank, expected in ((0, ["first", "second"]), (1, ["[rank 1] warning"]), (2, ["[rank 2] third"])):
        printed.seek(0)
        printed.truncate(0)
        show_logs(run, rank=rank, out=printed)
        assert [line for line in printed.getvalue().splitlines() if "==>" not in line] == expected
    with pytest.raises(InputError, match="expected a log of rank 3, found none of its lines"):
        show_logs(run, rank=3)


def test_a_job_that_has_written_nothing_yet(tmp_path: Path, commands: Commands) -> None:
    run = submit(make_run(tmp_path / "run"))
    commands.says("squeue", "7 PENDING")
    with pytest.raises(InputError, match="found none yet; job 7 is pending"):
        show_logs(run)
    with pytest.raises(InputError, match="expected the folder of a run"):
        show_logs(tmp_path)


def test_it_follows_through_requeues_until_the_run_is_done(
    tmp_path: Path, commands: Commands, printed: io.StringIO
) -> None:
    run = submit(make_run(tmp_path / "run"))
    commands.says("squeue", "7 PENDING")
    thread = in_the_background(lambda: show_logs(run, follow=True, out=printed))
    event(run, "start")
    job_log(run, "7_0_log.out", "attempt 0")
    wait_for("attempt 0\n", printed)
    with (run / "job" / "slurm" / "7_0_log.out").open("a") as file:
        file.write("half a li")
        file.flush()
        with pytest.raises(AssertionError, match="not within"):  # it is asked for every 0.02 s meanwhile
            until(lambda: "half" in printed.getvalue(), seconds=0.2)
        file.write("ne\n")
    wait_for("half a line\n", printed)
    event(run, "end", status=75)
    event(run, "requeue")
    (run / "job" / "slurm" / "7_0_log.out").write_text("attempt 1\n")  # begun anew
    event(run, "start", 1)
    wait_for("attempt 1\n", printed)
    job_log(run, "7_0_log.err", "error: rank 1 was killed")
    wait_for("error: rank 1 was killed\n", printed)
    with (run / "job" / "slurm" / "7_0_log.out").open("a") as file:
        file.write("the last word")  # without an end
    event(run, "done")
    thread.join(20)
    assert not thread.is_alive()
    lines = [line for line in printed.getvalue().splitlines() if "==>" not in line]
    assert lines == ["attempt 0", "half a line", "attempt 1", "error: rank 1 was killed", "the last word"]


def test_following_ends_with_a_job_that_slurm_ended_without_a_word(
    tmp_path: Path, commands: Commands, printed: io.StringIO
) -> None:
    run = submit(make_run(tmp_path / "run"))
    event(run, "start")
    job_log(run, "7_0_log.out", "at work")
    commands.says("squeue", "7 RUNNING")
    thread = in_the_background(lambda: show_logs(run, follow=True, out=printed))
    wait_for("at work", printed)
    commands.says("squeue", "7 OUT_OF_MEMORY")
    thread.join(20)
    assert not thread.is_alive()


def test_following_a_run_without_a_job_ends_when_it_lets_go_of_its_folder(tmp_path: Path, printed: io.StringIO) -> None:
    run = make_run(tmp_path / "run", logged=3)
    with claimed(run):
        thread = in_the_background(lambda: show_logs(run, follow=True, lines=1, out=printed))
        wait_for("step 3/30", printed)
        with (run / "log-rank0.txt").open("a") as file:
            file.write("saved\n")
        wait_for("saved", printed)
        assert thread.is_alive()
    thread.join(20)
    assert not thread.is_alive()


def test_of_a_large_log_the_end_alone_is_read(tmp_path: Path, printed: io.StringIO) -> None:
    run = submit(make_run(tmp_path / "run"))
    event(run, "done")
    with (run / "job" / "slurm" / "7_0_log.out").open("w") as file:
        file.truncate(1 << 36)
        file.seek(0, os.SEEK_END)
        file.write("cut\nwhole\n")
    show_logs(run, out=printed)
    assert "whole\n" in printed.getvalue()
    assert "cut" not in printed.getvalue()
