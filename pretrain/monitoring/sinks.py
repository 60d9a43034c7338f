"""Where a run's numbers and pictures go besides its own folder: TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import io
import os
import platform
import secrets
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.durable import durable_file
from data_pipeline.errors import RecipeError, RunError
from pretrain.monitoring.outlets import AppendedFile
from pretrain.recipe.recipe import Logging


class Sink(Protocol):
    """Takes what is logged; rank 0 only."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """`pixels` is [H, W, 3]."""

    def close(self) -> None: ...


def open_sinks(config: Logging, folder: Path, name: str, step: int) -> dict[str, Sink]:
    """Opens the sinks that the recipe asks for, by name; what they hold about steps after `step` no longer counts.

    Raises:
        RunError: Weights & Biases takes no run, and this one is at its start; a run that goes on does so without.
    """
    sinks: dict[str, Sink] = {}
    if config.tensorboard:
        sinks["TensorBoard"] = TensorBoard(folder, step)
    if config.wandb is not None:
        try:
            sinks["wandb"] = Wandb(folder, name, config.wandb.model_dump())
        except Exception as error:  # whatever it raises
            if not step:
                raise RunError(
                    where="logging.wandb", expected="that Weights & Biases takes this run",
                    found=f"{type(error).__name__}: {error}",
                    fix="Log in with `wandb login`, or set logging.wandb.mode=offline, or logging.wandb=null.",
                ) from error  # fmt: skip
            sinks["wandb"] = _Absent(error)
    return sinks


class _Absent:
    """In place of a sink that could not be opened; all that it is given is lost, and its guard says so."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        raise self._error

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        raise self._error

    def close(self) -> None: ...


def refuse_missing_wandb(config: Logging, name: str) -> None:
    """Checks that Weights & Biases is installed where the recipe called `name` asks for it.

    Raises:
        RecipeError: it is not.
    """
    if config.wandb is None:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder `wandb`, as its runs leave behind, is no package
        problem = (
            "logging.wandb: expected the package wandb, found none. Install it with `pip install wandb`, "
            "or set logging.wandb=null."
        )
        raise RecipeError(name, [problem])


class TensorBoard:
    """Event files in the run's folder, written at once and by whole events.

    torch's SummaryWriter hands them to a thread, which ends for good with the first write that fails.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._summary: Any = summary
        self._make_event: Any = Event
        self._writer: Any = RecordWriter
        start = SessionLog(status=SessionLog.START)

        def head() -> bytes:
            return self._record(file_version="brain.Event:2") + self._record(step=step + 1, session_log=start)

        name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}.{secrets.token_hex(2)}"
        self._file = AppendedFile(folder / "tensorboard" / name, head)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.scalar(name, value) for name, value in values.items()]
        self._file.write(b"".join(self._record(step=step, summary=scalar) for scalar in scalars))

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        self._file.write(self._record(step=step, summary=self._summary.image(name, pixels, dataformats="HWC")))

    def close(self) -> None:
        self._file.close()

    def _record(self, **content: object) -> bytes:
        buffer = io.BytesIO()
        self._writer(buffer).write(self._make_event(wall_time=time.time(), **content).SerializeToString())
        return buffer.getvalue()


class Wandb:
    """One run there for one run here, however often it is started again: its id lies in the run's folder.

    Its key comes from the environment or its own login, and is written nowhere by us; nor does it look at the
    machine's console, code or environment.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        id_path = folder / "wandb-id.txt"
        if not id_path.is_file():
            with durable_file(id_path) as file:
                file.write(uuid.uuid4().hex[:16].encode())
        self._run = wandb.init(
            project=config["project"],
            entity=config["entity"],
            mode=config["mode"],
            name=name,
            id=id_path.read_text(),
            resume="allow",
            dir=str(folder),
            settings=wandb.Settings(
                console="off", disable_code=True, disable_git=True, x_disable_meta=True, x_disable_stats=True,
                save_code=False, silent=True,
            ),
        )  # fmt: skip
        # Steps that are taken again after a kill are logged again, which its own step counter would drop.
        self._run.define_metric("*", step_metric="step")
        self._picture = wandb.Image

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        self._run.log({"step": step, name: self._picture(pixels)})

    def close(self) -> None:
        self._run.finish()
