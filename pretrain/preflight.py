"""What is checked before anything starts: whether recipe, data, ranks and the run's folder go together."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_pipeline.assemble import check
from data_pipeline.batch import BatchSpec
from data_pipeline.datasets.classes import label_notes, match_classes, taken_by_number
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.mixture import overlap_notes
from data_pipeline.datasets.read import open_dataset
from data_pipeline.datasets.remote_parts import remote_parts
from data_pipeline.datasets.training import open_training
from data_pipeline.errors import RecipeError
from data_pipeline.remote.prefetch import check_room
from data_pipeline.samples.captions import CaptionReader
from data_pipeline.samples.config import Captions
from pretrain.augment.augment import augmentations, mixing
from pretrain.callbacks.online_probe import ProbeShape, find_probe_shape, probe_bytes
from pretrain.checkpoints.start import refuse_locked_at_random
from pretrain.evals.protocols import check_evaluations
from pretrain.inputs import refuse_wrong_inputs
from pretrain.models.tokenizers import build_tokenizer
from pretrain.monitoring.sinks import refuse_missing_wandb
from pretrain.objectives.contract import Contrastive, Objective
from pretrain.plan import build_on_meta
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.resolve import Resolved, resolve
from pretrain.record import refuse_other_run
from pretrain.runtime.data_record import DataRecord, goes_by_number


@dataclass(frozen=True)
class Plan:
    """What was found to be right before anything started.

    Attributes:
        train: what is trained on.
        val: what is validated on; None: nothing.
        needs: what a training batch must hold, for the objective and the online probe.
        captions: how captions are read; None: the objective reads none.
        resolved: what follows from the recipe.
        objective: its shapes, on the meta device.
        probe: sizes of the online probe; None: there is none.
        probe_bytes: of its state; 0: there is none.
        data: what the run's folder keeps of the data.
        notes: for the run's log, a line each.
    """

    train: Dataset
    val: Dataset | None
    needs: BatchSpec
    captions: CaptionReader | None
    resolved: Resolved
    objective: Objective
    probe: ProbeShape | None
    probe_bytes: int
    data: DataRecord
    notes: tuple[str, ...]


def preflight(
    recipe: Recipe, world_size: int, out: Path, local_size: int | None = None, *, evals_apart: bool = False
) -> Plan:
    """Checks the recipe against its data, the number of ranks and the run's folder; writes nothing.

    Args:
        local_size: ranks of one machine; None: as the launcher of this process says, or all.
        evals_apart: whether the recipe's `evals` are jobs of their own.

    Raises:
        InputError: one of them is wrong.
    """
    refuse_wrong_inputs(recipe)
    data, cache, by_number = recipe.data, recipe.data.cache, goes_by_number(out)
    train_data = open_training(data.train, cache, by_number=by_number)
    resolved = resolve(recipe, world_size, train_data.num_samples)
    objective = build_on_meta(recipe.model, recipe.objective)
    needs = objective.needs
    _refuse_inexact_accumulation(recipe, objective, resolved)
    if recipe.init_from is None and recipe.resume_from is None:
        refuse_locked_at_random(objective, ())
    augmentations(recipe, needs)
    mixing(recipe, needs, resolved.micro_size)
    captions = _captions(data.captions, needs)
    check(train_data, needs, captions)
    check_room(
        remote_parts(train_data),
        read_streams=data.read_streams,
        shuffle_window=data.shuffle_window,
        world_size=world_size,
        local_size=local_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        repeats=data.repeats,
    )
    val = open_dataset(data.val, cache) if data.val else None
    if val is not None:
        if needs.num_classes is not None or recipe.online_probe is not None:
            val = match_classes(val, train_data, "data.val", "data.train", by_number=by_number)
        check(val, needs, captions)
        if val.num_samples < world_size:
            problem = f"data.val: expected a sample for each of {world_size} processes, found {val.num_samples}."
            raise RecipeError(recipe.name, [problem])
    probe, num_bytes = None, 0
    if recipe.online_probe is not None:
        probe = find_probe_shape(objective, train_data, val)
        num_bytes = probe_bytes(recipe.online_probe, probe)
        needs = replace(needs, num_classes=probe.num_classes)
    measured_on = check_evaluations(recipe.evals, cache, apart=evals_apart)
    if val is not None:
        measured_on["data.val"] = (val.fingerprint,)
    refuse_missing_wandb(recipe.logging, recipe.name)
    with_labels = needs.num_classes is not None
    classes, bare = (train_data.classes, taken_by_number(train_data, val)) if with_labels else (None, [])
    record = DataRecord(train_data.fingerprint, classes, measured_on, bool(bare))
    notes = [
        *refuse_other_run(recipe, record, resolved.total_steps, out),
        *(label_notes(train_data, val) if with_labels else ()),
        *overlap_notes(train_data),
        *_batch_notes(resolved),
    ]
    return Plan(train_data, val, needs, captions, resolved, objective, probe, num_bytes, record, tuple(notes))


def _batch_notes(resolved: Resolved) -> list[str]:
    """A sentence where a step takes samples more than once."""
    size, samples = resolved.global_size, resolved.num_samples
    if size <= samples:
        return []
    return [
        f"batch.global_size {size} is larger than the data set of {samples} samples: each step takes samples "
        f"{size / samples:.3g} times on average, and an epoch is {resolved.steps_per_epoch:.3g} of a step"
    ]


def _captions(config: Captions, needs: BatchSpec) -> CaptionReader | None:
    if needs.tokens is None:
        return None
    return CaptionReader(build_tokenizer(needs.tokens), config)


def _refuse_inexact_accumulation(recipe: Recipe, objective: Objective, resolved: Resolved) -> None:
    """Refuses an accumulation that would silently train by another algorithm."""
    if resolved.accumulation > 1 and (reason := cannot_accumulate(objective)):
        problem = (
            f"batch.micro_size: expected {resolved.local_size} or nothing, as {recipe.model.name} with "
            f"{recipe.objective.kind} has {reason}, found {resolved.micro_size}."
        )
        raise RecipeError(recipe.name, [problem])


def cannot_accumulate(objective: Objective) -> str:
    """Says what in an objective does not add up over micro-batches; empty: all of it does, or the engine sees to it."""
    if objective.coupling and not isinstance(objective, Contrastive):  # which the engine accumulates in two passes
        return objective.coupling
    objective.train()  # where a frozen part may keep its batch norm in evaluation mode
    if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training for m in objective.modules()):
        return "batch norm, whose statistics do not add up over micro-batches"
    return ""
