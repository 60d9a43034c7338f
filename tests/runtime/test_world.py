"""Which rank a process is, as torchrun or srun says it; what says it in part is refused."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.errors import InputError
from pretrain.runtime.collectives import World, process_group
from pretrain.runtime.environment import choose_device
from pretrain.runtime.slurm_step import first_host, is_task_of_several, join_step, rank_variables

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MEETING = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
# The sixth of seven tasks on three nodes, as srun of SLURM 22.05 tells it.
TASK = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "2", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "MASTER_ADDR": "first",
}  # fmt: skip


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *TASK):
        monkeypatch.setenv(name, "")  # so that what a test sets itself goes with it
        monkeypatch.delenv(name)


def given(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_that_is_told_nothing_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert World.from_environment() == World()
    given(monkeypatch, WORLD_SIZE="1")
    assert World.from_environment() == World()


def test_a_rank_among_several(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", **MEETING)
    assert World.from_environment() == World(5, 8, 1, 4)


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2", **MEETING}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MEETING}, "RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2", **MEETING}, "RANK"),
    ],
)
def test_what_says_it_in_part_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], names: str
) -> None:
    given(monkeypatch, **variables)
    refused = pytest.raises(InputError, match=f"^{names} in the environment: expected")
    with refused, process_group(World.from_environment(), torch.device("cpu")):
        raise AssertionError("it joined")


def test_a_task_of_srun_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, **TASK)
    join_step()
    assert World.from_environment() == World(5, 7, 2, 3)
    assert not is_task_of_several(), "what is started from here is told by torchrun's variables"


def test_all_tasks_meet_at_one_place() -> None:
    tasks = [{**TASK, "SLURM_PROCID": str(rank)} for rank in range(7)]
    assert len({rank_variables(task)["MASTER_PORT"] for task in tasks}) == 1
    alone = {key: value for key, value in TASK.items() if key != "MASTER_ADDR"} | {"SLURM_STEP_TASKS_PER_NODE": "7"}
    assert rank_variables({**alone, "SLURM_NODEID": "0"})["MASTER_ADDR"] == "127.0.0.1"
    hosts = {"n0": "n0", "gpu[07-09,12]-ib,other": "gpu07-ib", "a,b[1-2]": "a", "n[3]": "n3", "r1n[001,4]": "r1n001"}
    assert {text: first_host(text) for text in hosts} == hosts


def test_a_batch_script_a_single_task_and_a_rank_of_ours_are_no_tasks_of_several() -> None:
    batch = {key: value for key, value in TASK.items() if not key.startswith("SLURM_STEP_")}
    assert not is_task_of_several(batch)
    assert not is_task_of_several({**TASK, "SLURM_STEP_NUM_TASKS": "1"})
    assert not is_task_of_several({**TASK, "RANK": "0"})


def test_one_gpu_that_a_task_sees_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    given(monkeypatch, **TASK)
    assert choose_device("auto", World(5, 7, 2, 3)) == torch.device("cuda", 0)
    with pytest.raises(InputError, match="expected 4 GPU"):  # ranks of one agent, whose driver is ill
        choose_device("auto", World(5, 28, 2, 4))
