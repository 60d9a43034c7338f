"""Where a run's numbers and pictures go besides its own folder: TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.durable import durable_file
from data_pipeline.errors import RecipeError
from pretrain.recipe.recipe import Logging


class Sink(Protocol):
    """Takes what is logged; rank 0 only."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """`pixels` is [H, W, 3]."""

    def close(self) -> None: ...


def open_sinks(config: Logging, folder: Path, name: str, step: int) -> list[Sink]:
    """Opens the sinks that the recipe asks for; what they hold about steps after `step` no longer counts."""
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(TensorBoard(folder, step))
    if config.wandb is not None:
        sinks.append(Wandb(folder, name, config.wandb.model_dump()))
    return sinks


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
    """Event files in the run's folder."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


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
