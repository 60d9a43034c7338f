"""How the data sets of a run are named, and in which order they are read. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from data_pipeline.settings import Group, LocalPath


class Source(Group):
    """One entry of a list of data sets to train on."""

    path: str
    weight: float = Field(1, gt=0)  # share of the samples: this over the sum of all weights, whatever the sizes
    labels: LocalPath | None = None  # a folder of soft labels (`pretrain data label`), which take the place of its own
    select: LocalPath | None = (
        None  # a file (`pretrain data select`): these of its samples only, with repeats and labels
    )
