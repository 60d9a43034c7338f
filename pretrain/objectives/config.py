"""What a recipe says of an objective: the base of every kind's group, and the one table of kinds. Imports no torch.

A new objective is a folder here, with its `config.py` and its `objective.py`, and a line in `KINDS`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, ClassVar

from pydantic import Field

from pretrain.models.config import TextTower
from pretrain.recipe.base import Group

# Each kind, which is also its folder's name: the name of its class in `objective.py`, which its group's in `config.py`
# ends with "Config". Their order is the order in messages.
KINDS = {
    "supervised": "Supervised",
    "mae": "Mae",
    "simmim": "Simmim",
    "byol": "Byol",
    "simsiam": "SimSiam",
    "sum": "Sum",
    "clip": "Clip",
    "siglip": "Siglip",
    "simclr": "SimClr",
}


class ObjectiveConfig(Group):
    """An objective's group of a recipe. Beside the keys of its own, what other rooms need to know of its kind.

    Attributes:
        kind: its name in the table; a literal in each subclass.
        builds_encoder: whether the objective builds its encoder itself, as one with two towers does; else it is given
            one of timm's, and can be a term of a sum.
    """

    builds_encoder: ClassVar[bool] = False

    kind: str

    def labeling_problem(self) -> tuple[str, str] | None:
        """What is expected of a teacher that labels images and what is found instead; None: a run of it is one.

        The objective of such a run is a `Classifier` (contract.py).
        """
        return "a run with objective.kind supervised, which has a head to label with", self.kind


class ImageTextConfig(ObjectiveConfig):
    """Images against their captions, by two towers. With model.library open_clip both are the model's own.

    Attributes:
        has_bias: whether the logits have a learned bias, which the exported towers then hold.
    """

    builds_encoder: ClassVar[bool] = True
    has_bias: ClassVar[bool] = False

    embed_dim: int | None = Field(None, ge=1)  # with model.library timm, and so is text
    text: TextTower | None = None
    tokenizer: str = "clip"  # CLIP's own, a file of merges in its form, or a folder with tokenizer.json
    # LiT: a tower keeps the weights it starts with; a number leaves so many of its last groups of layers unlocked.
    lock_image: bool | Annotated[int, Field(ge=1)] = False
    lock_text: bool | Annotated[int, Field(ge=1)] = False


def config_class(kind: str) -> type[ObjectiveConfig]:
    """The group of a recipe that belongs to a kind of the table."""
    found: type[ObjectiveConfig] = getattr(import_module(f"pretrain.objectives.{kind}.config"), f"{KINDS[kind]}Config")
    return found


def config_classes() -> list[type[ObjectiveConfig]]:
    """Those of all kinds, in the order of the table."""
    return [config_class(kind) for kind in KINDS]
