"""A stage of a chain as a job; `python -m launch.chains.stage_job RUN STATUS` says what becomes of one that ended.

It is a job like any other, except that a stage which is done is passed over, and that the chain keeps what is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data_pipeline.errors import PretrainError
from launch.chains.config import Stage
from launch.chains.folder import ChainFolder
from launch.jobs.after_job import Next, run_program
from launch.jobs.folder import JobFolder
from launch.jobs.job import SubmittedJob


class StageJob(SubmittedJob):
    """A stage as submitit calls it on each node."""

    after_module = "launch.chains.stage_job"

    def was_done(self, folder: JobFolder) -> bool:
        """Returns whether the stage is done; otherwise writes down that it has begun.

        Raises:
            InputError: the stage was begun with other settings or inputs.
        """
        chain, stage = _open(folder)
        return chain.is_done(stage)


def stage_record(chain: ChainFolder, stage: Stage) -> Mapping[str, str]:
    """Returns what the job's record says about the stage of a frozen chain."""
    return {"file": str(chain.out / "chain" / "chain.yaml"), "out": str(chain.out), "stage": stage.name}


def keep_stage(folder: JobFolder) -> Next:
    """Writes down that a stage is done. It is not until then, so that the job fails where that fails."""
    try:
        chain, stage = _open(folder)
        chain.keep(stage)
    except (PretrainError, OSError) as error:
        return Next("stop", f"it ended well, which could not be written down: {error}")
    return Next("done")


def _open(folder: JobFolder) -> tuple[ChainFolder, Stage]:
    record = folder.submitted()["chain"]
    chain = ChainFolder.open(Path(record["file"]), Path(record["out"]))
    return chain, chain.stage(record["stage"])


if __name__ == "__main__":
    run_program(keep_stage)
