"""What becomes of a job, from what its nodes left and what SLURM says of it."""

from __future__ import annotations

from typing import Any

import pytest

from launch.after_job import Ending, decide, ending, is_cancelled, is_queued
from pretrain.demand import HUNG, STOPPED

NODES = ["n0", "n1"]


def of(*statuses: int | None, joined: int = 2, srun: int = 1) -> Ending:
    """Of nodes with these statuses; None: it left no report."""
    pairs = zip(NODES, statuses, strict=True)
    reports = {node: {"status": status, "why": ""} for node, status in pairs if status is not None}
    return ending(reports, set(NODES[:joined]), NODES, srun)


@pytest.mark.parametrize(
    ("statuses", "status", "said"),
    [
        ((0, 0), 0, "done"),
        ((STOPPED, STOPPED), STOPPED, "asked to stop"),
        ((0, STOPPED), STOPPED, "asked to stop"),
        ((STOPPED, 1), 1, "the run failed (n1)"),  # n0 was asked to stop because of it
        ((1, 137), 137, "a rank was killed by signal 9 (n1)"),  # whose peers failed of it
        ((1, HUNG), HUNG, "no progress (n1)"),
        ((137, HUNG), HUNG, "no progress (n1)"),
        ((HUNG, None), HUNG, "no progress (n0)"),
        ((2, 1), 2, "wrong input"),
        ((1, None), 1, "n1 was lost"),
        ((0, None), 1, "n1 was lost"),
    ],
)
def test_what_failed_by_itself_is_named(statuses: tuple[int | None, ...], status: int, said: str) -> None:
    end = of(*statuses)
    assert end.status == status
    assert said in end.why


def test_a_node_that_was_never_there_does_not_see_the_folder_unless_it_was_ended_first() -> None:
    assert of(1, None, joined=1, srun=1) == Ending(2, "n1 did not see the run's folder, or could not start Python")
    assert of(STOPPED, None, joined=1, srun=143).status == 1


def then(status: int, **given: Any) -> str:
    known = {"restart": 0, "max_requeues": 3, "cancelled": False, "queued": False, "step": 20, "step_before": 10}
    found = decide(Ending(status, "it ended"), **{**known, **given})
    assert found.event in ("done", "cancel") or "it ended" in found.why
    return found.event


@pytest.mark.parametrize("status", [1, STOPPED, HUNG, 137])
def test_it_is_queued_again_as_long_as_it_gets_further_and_may(status: int) -> None:
    assert then(status) == "requeue"
    assert then(status, restart=3) == "stop"
    assert then(status, step=10) == "stop"
    assert then(status, cancelled=True) == "cancel"
    assert then(status, queued=True, step=10) == "requeue"  # nobody's fault, and done already
    assert then(status, queued=True, cancelled=True) == "cancel"


@pytest.mark.parametrize(
    ("status", "event"), [(STOPPED, "requeue"), (1, "stop"), (137, "stop"), (2, "stop"), (0, "done")]
)
def test_a_command_that_goes_on_is_queued_again_where_it_was_asked_to_stop(status: int, event: str) -> None:
    assert then(status, command=["data", "label", "shards"], step=0, step_before=0) == event
    assert then(STOPPED, command=["eval", "finetune", "--out"], step=0, step_before=0) == "requeue"
    assert then(STOPPED, command=["data", "label"], restart=3) == "stop"
    assert then(STOPPED, command=["data", "label"], cancelled=True) == "cancel"
    assert then(STOPPED, command=["eval", "knn"]) == "stop", "it would begin again, and come no further"
    assert then(STOPPED, command=["eval", "knn"], queued=True) == "requeue"


def test_done_and_wrong_input_are_never_queued_again() -> None:
    assert then(0, step=10, cancelled=True) == "done"
    assert then(2) == "stop"


def test_what_slurm_says_of_a_job_that_it_ends() -> None:
    """As SLURM 22.05 said it, seen in the teardown of a batch script after each of these."""
    requeued = {"JobState": "COMPLETING", "Reason": "None", "Restarts": "1"}
    cancelled = {"JobState": "COMPLETING", "Reason": "None", "Restarts": "0"}
    timed_out = {"JobState": "COMPLETING", "Reason": "TimeLimit", "Restarts": "0"}
    signalled = {"JobState": "RUNNING", "Reason": "None", "Restarts": "0"}
    assert [is_queued(fields, 0) for fields in (requeued, cancelled, timed_out, signalled)] == [
        True,
        False,
        False,
        False,
    ]
    assert [is_cancelled(fields, 0) for fields in (requeued, cancelled, timed_out, signalled)] == [
        False, True, False, False,
    ]  # fmt: skip
