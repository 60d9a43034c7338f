"""`pretrain data label` and `select`: a teacher's labels beside shards, and which samples to take by them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import InputError
from launch.chains.choice import check_choice
from launch.commands.eval_options import BatchSize, Device, DeviceOption, Precision, PrecisionOption, Workers

if TYPE_CHECKING:
    import numpy as np

    from data_pipeline.datasets.selection import Selection
    from data_pipeline.order.order import Integers

LABEL_EXAMPLES = (
    "pretrain data label data/unlabeled labels/round1 --teacher runs/teacher",
    "pretrain data label data/web labels/web --teacher runs/teacher --top-k 10 --precision bf16 --num-workers 8",
)
SELECT_EXAMPLES = (
    "pretrain data select labels/round1 labels/round1.select --threshold 0.3 --per-class 130000",
    "pretrain data select labels/web labels/web.select --top-k 16000",
    "pretrain data select data/cifar10/train data/labeled.select --per-class 400 --seed 0",
    "pretrain data select labels/rest labels/rest.select --threshold 0.5 --without data/labeled.select",
)


def label(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="A folder of shards, a pattern of tars, or a URL.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the labels; new, or one to go on with.")],
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="RUN", help="A supervised run, or a checkpoint in it: encoder and head.")
    ],
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Keep the k largest probabilities of an image [all].")
    ] = None,
    device: DeviceOption = Device.auto,
    batch_size: BatchSize = 256,
    num_workers: Workers = 0,
    precision: PrecisionOption = Precision.fp32,
) -> None:
    """Writes a teacher's soft labels for every image, a file for each shard. No image is written again.

    A number takes 2 bytes: of 1,000 classes an image takes 2 kB, or 64 bytes with --top-k 10. Train on them with
    `data.train: [{path: SHARDS, labels: OUT}]`. Interrupted, it goes on when it is given again.
    """
    from data_pipeline.datasets.read import open_dataset
    from data_pipeline.datasets.selection import shards_in
    from launch.commands.eval_options import checked_device
    from pretrain.evals.pseudo_label import Labelling, load_teacher
    from pretrain.evals.pseudo_label import label as write_labels

    dataset = shards_in(open_dataset(shards))
    how = Labelling(top_k, precision.value, batch_size, num_workers, checked_device(device))
    labels = write_labels(dataset, load_teacher(teacher), out, how)
    for name in labels.described.left_out:
        print(f"left out, as it cannot be used: {name}")
    kept = f"{labels.described.top_k} of " if labels.described.top_k else ""
    num_bytes = sum(path.stat().st_size for path in out.iterdir())
    print(
        f"{out}: {labels.num_samples:,} samples, {kept}{labels.num_classes:,} classes, "
        f"{len(labels.ends):,} files, {num_bytes / 1e6:,.1f} MB"
    )
    if labels.classes is None:
        print("the teacher's run does not name its classes: these labels mean the same to others by number alone")


def select(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder of soft labels; or shards, to choose by true labels.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, such as labels.select.")],
    threshold: Annotated[
        float | None, typer.Option("--threshold", min=0, max=1, help="Predictions of more than this probability.")
    ] = None,
    per_class: Annotated[
        int | None,
        typer.Option("--per-class", min=1, help="As many of each class: the most confident, or duplicates."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="The K images of each class that the teacher ranks highest.")
    ] = None,
    per_image: Annotated[
        int, typer.Option("--per-image", min=1, help="With --top-k: most probable classes that an image is ranked in.")
    ] = 10,
    without: Annotated[
        Path | None, typer.Option("--without", metavar="FILE", help="Leave out what this selection has.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice by true labels.")] = 0,
) -> None:
    """Chooses samples to train on, in a small file; `data.train: [{path: SHARDS, labels: FOLDER, select: OUT}]`.

    --threshold, --per-class: Noisy Student's filter and balance (1911.04252); samples keep their soft labels, so that
    `labels` stays beside `select`. --top-k: billion-scale semi-supervised learning (1905.00546); each listed image is
    labeled with the class that it is listed under. On shards, --per-class draws a small labeled set at random.
    """
    from data_pipeline.datasets.soft_labels import FILE_NAME

    if (Path(source) / FILE_NAME).is_file():
        selection = _by_labels(source, threshold, per_class, top_k, per_image, without)
    else:
        selection = _by_truth(source, threshold, per_class, top_k, without, seed)
    selection.save(out)
    print(f"{out}: {_told(selection)}")


def _by_labels(
    source: str,
    threshold: float | None,
    per_class: int | None,
    top_k: int | None,
    per_image: int,
    without: Path | None,
) -> Selection:
    from data_pipeline.datasets.choose import confident, ranked
    from data_pipeline.datasets.soft_labels import open_labels

    check_choice(source, True, threshold, per_class, top_k)
    labels = open_labels(source)
    left_out = None if without is None else _indices(without, labels.described.data_fingerprint)
    if top_k is not None:
        return ranked(labels, top_k=top_k, per_sample=per_image, without=left_out)
    assert threshold is not None
    return confident(labels, threshold=threshold, per_class=per_class, without=left_out)


def _by_truth(
    source: str, threshold: float | None, per_class: int | None, top_k: int | None, without: Path | None, seed: int
) -> Selection:
    from data_pipeline.datasets.choose import labeled
    from data_pipeline.datasets.read import open_dataset
    from data_pipeline.datasets.selection import shards_in

    check_choice(source, False, threshold, per_class, top_k)
    assert per_class is not None
    dataset = shards_in(open_dataset(source))
    left_out = None if without is None else _indices(without, dataset.fingerprint)
    return labeled(dataset, per_class=per_class, seed=seed, without=left_out)


def _indices(path: Path, fingerprint: str) -> Integers:
    from data_pipeline.datasets.selection import Selection

    selection, _ = Selection.load(path)
    if selection.data_fingerprint != fingerprint:
        raise InputError(
            where="--without",
            expected=f"a selection of the same data (fingerprint {fingerprint[:12]}...)",
            found=f"{path}: one of other data (fingerprint {selection.data_fingerprint[:12]}...)",
        )
    return selection.indices


def _told(selection: Selection) -> str:
    import numpy as np

    different = len(np.unique(selection.indices))
    parts = [f"{len(selection):,} entries, {different:,} different samples of {selection.num_classes:,} classes"]
    if selection.labels is not None:
        counts = np.bincount(selection.labels, minlength=selection.num_classes)
        parts.append(_range(counts))
    return "; ".join(parts)


def _range(counts: np.ndarray) -> str:
    return f"{counts.min():,} to {counts.max():,} of a class"
