"""A teacher's soft labels for shards: its probabilities for every image, in a folder beside them.

The teacher sees evaluation views and no noise, with the averages of its weights where its run keeps them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.datasets.read import ShardDataset
from data_pipeline.datasets.soft_labels import (
    UNREADABLE,
    Described,
    ShardLabels,
    SoftLabels,
    crc32_of,
    file_name,
    read_file,
    write_labels_file,
)
from data_pipeline.durable import claimed, durable_file, from_json, has_other_files
from data_pipeline.errors import CheckpointError, DataError, InputError, RunError
from data_pipeline.loader import batches_of
from data_pipeline.progress import track
from data_pipeline.samples.preprocessing import Preprocessing
from data_pipeline.shards.manifest import PLAN_NAME
from pretrain.augment.augment import normalize
from pretrain.checkpoints.checkpoint import module_state
from pretrain.evals.features.extract import full_precision, untouched
from pretrain.evals.sources.load import run_of_checkpoint
from pretrain.evals.sources.trained import TrainedRun
from pretrain.models.folders import weights_sha256
from pretrain.models.seeded import seeded
from pretrain.models.strict_loading import load_strictly
from pretrain.monitoring.budgets import too_many_left_out
from pretrain.objectives.contract import Classifier, Objective
from pretrain.objectives.kinds import build_objective
from pretrain.recipe.recipe import Data
from pretrain.runtime.run_folder import newest_checkpoint


@dataclass(frozen=True)
class Teacher:
    """A classifier and the preprocessing that belongs to it.

    Attributes:
        model: from normalized images [B, 3, S, S] to logits [B, K], through its encoder and its head.
        run: that trained it.
        checkpoint: where its weights come from.
        num_classes: K.
        classes: their names; None: its run does not know them.
    """

    model: Objective
    run: TrainedRun
    checkpoint: Path
    num_classes: int
    classes: tuple[str, ...] | None = None

    def describe(self) -> dict[str, Any]:
        """What decides its labels."""
        return {
            "run": self.run.name,
            "checkpoint": self.checkpoint.name,
            "weights_sha256": weights_sha256(self.model),
            # Labels go by this description, which never said how images are resized: there is one way.
            **{key: value for key, value in self.preprocessing.described().items() if key != "resize"},
        }

    @property
    def preprocessing(self) -> Preprocessing:
        """How the images become what the classifier was trained to be judged on."""
        return self.run.data.preprocessing(self.run.model.judged_size)


def load_teacher(source: str) -> Teacher:
    """The whole classifier of a supervised run, on the CPU, in evaluation mode.

    Args:
        source: the run's folder, for its newest checkpoint, or a checkpoint in it.

    Raises:
        CheckpointError: no such thing there, or it is torn, damaged, or not exactly of its recipe.
        InputError: the run is none of a classifier.
    """
    checkpoint = _find_checkpoint(Path(source))
    run = run_of_checkpoint(checkpoint)
    if (problem := run.objective.labeling_problem()) is not None:
        expected, found = problem
        fix = "Fine-tune its encoder first: a supervised recipe with init_from."
        raise InputError(where=f"--teacher {source}", expected=expected, found=found, fix=fix)
    model = seeded(0, lambda: build_objective(run.model, run.objective))
    assert isinstance(model, Classifier)
    load_strictly(model, module_state(checkpoint), where=str(checkpoint))
    return Teacher(model.eval(), run, checkpoint, model.num_classes, run.class_names(model.num_classes))


def _find_checkpoint(path: Path) -> Path:
    if not (path / "recipe.yaml").is_file():
        return path  # a checkpoint, or nothing: what reads it says so
    if (newest := newest_checkpoint(path)) is None:
        raise CheckpointError(
            where=str(path), expected="a run with a complete checkpoint", found="none", fix="Train it first."
        )
    return newest


@dataclass(frozen=True)
class Labelling:
    """How labels are computed and kept.

    Attributes:
        top_k: the k largest probabilities of each image; None: all.
        precision: of the forward pass; bf16 is autocast. Probabilities are fp32, kept as fp16.
        batch_size: images of one forward pass; a batch never holds images of two shards.
        num_workers: loader processes; 0: in this one.
        device: where the teacher computes.
    """

    top_k: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 256
    num_workers: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)


def label(dataset: ShardDataset, teacher: Teacher, out: Path, how: Labelling) -> SoftLabels:
    """Writes the labels of every sample into `out`, or what is still missing there.

    A shard that is done is known by the hash that its file carries. With one batch size, device and number of threads,
    what was stopped and gone on with has the bytes of what was not. An image that cannot be used has the label of all
    classes alike, which no training reads, as it cannot use the image either; it is named and counted.

    Raises:
        DataError: `out` holds something else.
        InputError: `top_k` exceeds the teacher's classes.
        RunError: another process is at work there, the teacher says something that is not finite, or more images
            cannot be used than the budget of the teacher's recipe, data.max_bad_samples.
    """
    if how.top_k is not None and how.top_k > teacher.num_classes:
        raise InputError(
            where="--top-k", expected=f"at most the {teacher.num_classes} classes of the teacher", found=str(how.top_k)
        )
    plan = _plan(dataset, teacher, how)
    _check_out(out, plan)
    with claimed(out / PLAN_NAME, plan, "these labels"):
        seal = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        shards = range(len(dataset.shard_sizes))
        missing = [shard for shard in shards if _finished(out, shard, dataset, seal) is None]
        all_left_out = [name for shard in shards if shard not in missing for name in _left_out(out, shard)]
        for shard, labels, left_out in _made(dataset, missing, teacher, how):
            all_left_out += left_out
            if len(all_left_out) > (budget := teacher.run.data.max_bad_samples):
                raise too_many_left_out(f"labels for {all_left_out[-1]}", len(all_left_out), budget)
            header = _header(dataset, shard, seal, labels)
            with durable_file(out / file_name(shard)) as file:
                file.write(labels.to_bytes(header | ({"left_out": left_out} if left_out else {})))
        digests = [_finished(out, shard, dataset, seal) for shard in shards]
        assert all(digests)
        described = Described(
            data_fingerprint=dataset.fingerprint,
            num_classes=teacher.num_classes,
            top_k=how.top_k,
            classes=None if teacher.classes is None else list(teacher.classes),
            teacher=plan["teacher"],
            num_samples=dataset.shard_sizes.tolist(),
            sha256=[digest for digest in digests if digest],
            left_out=[name for shard in shards for name in _left_out(out, shard)],
        )
        write_labels_file(out, described)
    return SoftLabels(out)


def _plan(dataset: ShardDataset, teacher: Teacher, how: Labelling) -> dict[str, Any]:
    """What decides the labels."""
    return {
        "data_fingerprint": dataset.fingerprint,
        "teacher": teacher.describe(),
        "num_classes": teacher.num_classes,
        "top_k": how.top_k,
        "precision": how.precision,
    }


def _made(
    dataset: ShardDataset, shards: Sequence[int], teacher: Teacher, how: Labelling
) -> Iterator[tuple[int, ShardLabels, list[str]]]:
    """(number, labels, samples that are left out) of each of the shards."""
    sizes = dataset.shard_sizes.tolist()
    starts = (np.cumsum(dataset.shard_sizes) - dataset.shard_sizes).tolist()
    pieces = [
        range(first, min(first + how.batch_size, starts[shard] + sizes[shard]))
        for shard in shards
        for first in range(starts[shard], starts[shard] + sizes[shard], how.batch_size)
    ]
    spec, max_pixels = BatchSpec(image_size=teacher.preprocessing.image_size), teacher.run.data.max_pixels
    batches = batches_of(
        dataset, spec, teacher.preprocessing, pieces, num_workers=how.num_workers, max_pixels=max_pixels
    )
    model = teacher.model.to(how.device)
    with untouched(model), full_precision():
        tracked = track(batches, label=f"labelling {len(shards)} shards", total=len(pieces))
        for shard in shards:
            yield shard, *_of_shard(model, tracked, sizes[shard], teacher, how)


def _left_out(out: Path, shard: int) -> list[str]:
    """The samples that the file of a shard says were left out."""
    return list(read_file(out / file_name(shard))[1].get("left_out", []))


def _of_shard(
    model: Objective, batches: Iterator[Batch], size: int, teacher: Teacher, how: Labelling
) -> tuple[ShardLabels, list[str]]:
    """The labels of the next `size` samples, and those that are left out."""
    left_out: list[str] = []
    width = how.top_k or teacher.num_classes
    values: NDArray[np.float16] = np.empty((size, width), np.float16)
    classes = None if how.top_k is None else np.empty((size, width), np.int32)
    keys: NDArray[np.uint32] = np.empty(size, np.uint32)
    done = 0
    while done < size:
        batch = next(batches)
        rows = slice(done, done + len(batch))
        probabilities = _probabilities(model, batch, teacher.run.data, how)
        probabilities[[one.row for one in batch.left_out]] = 1 / teacher.num_classes
        left_out += [f"{one.key} in {one.file}: {one.reason}" for one in batch.left_out]
        if classes is not None:
            # Sorted whole and stably: topk takes any of equal values.
            probabilities, columns = probabilities.sort(dim=1, descending=True, stable=True)
            classes[rows] = columns[:, :width].numpy()
        values[rows] = probabilities[:, :width].half().numpy()
        keys[rows] = crc32_of(batch.keys)
        done += len(batch)
    return ShardLabels(values, classes, keys), left_out


def _probabilities(model: Objective, batch: Batch, data: Data, how: Labelling) -> Tensor:
    """[B, K] fp32 on the CPU."""
    images = normalize(batch.to(how.device), data.mean, data.std).views[0]
    with torch.autocast(how.device.type, torch.bfloat16, enabled=how.precision == "bf16"):
        assert isinstance(model, Classifier)
        logits = model.classify(images)
    probabilities = logits.float().softmax(1).cpu()
    if broken := (~probabilities.isfinite().all(1)).nonzero().flatten().tolist():
        raise RunError(
            where=batch.keys[broken[0]],
            expected="finite logits of the teacher",
            found=f"others, for {len(broken)} of {len(batch)} images",
            fix="Check that its training did not diverge, or label in fp32.",
        )
    return probabilities


def _finished(out: Path, shard: int, dataset: ShardDataset, seal: str) -> str | None:
    """SHA-256 of the file of a shard that is done; None: it has to be made."""
    path = out / file_name(shard)
    try:
        labels, header, digest = read_file(path)
    except UNREADABLE:
        return None
    whole = len(labels.values) == dataset.shard_sizes[shard]
    header.pop("left_out", None)
    return digest if whole and header == _header(dataset, shard, seal, labels) else None


def _header(dataset: ShardDataset, shard: int, seal: str, labels: ShardLabels) -> dict[str, str]:
    """What makes a file that of this shard and plan, and shows that it is whole."""
    return {"plan": seal, "shard": dataset.manifest.sha256[shard], "sha256": labels.sha256()}


def _check_out(out: Path, plan: dict[str, Any]) -> None:
    """Raises DataError unless `out` is new, empty, or of the same plan."""
    strange = out.exists() and (not out.is_dir() or has_other_files(out))  # first: another may write its plan just now
    try:
        found = from_json((out / PLAN_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if strange:
            raise DataError(
                where=str(out), expected="a new or empty folder, or labels to go on with", found="other files",
                fix="Give another folder.",
            ) from None  # fmt: skip
        return
    except ValueError as error:
        raise DataError(where=str(out / PLAN_NAME), expected="the plan of labels", found=str(error)) from error
    if found != plan:
        names = [name for name in plan if not isinstance(found, dict) or found.get(name) != plan[name]]
        expected, fix = f"labels made with this {', '.join(names)}", "Give another folder, or remove this one."
        raise DataError(where=str(out), expected=expected, found="others there", fix=fix)
