"""From a protocol's config to its evaluator, by the table of protocols (config.py)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, Protocol

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.read import ShardDataset, open_dataset
from data_pipeline.errors import InputError
from data_pipeline.remote.config import CacheConfig
from data_pipeline.shards.keys import refuse_repeated_keys
from pretrain.evals.config import ProtocolConfig
from pretrain.evals.features.extract import Extraction
from pretrain.evals.result import EvalReport
from pretrain.evals.task import OpenData, Task
from pretrain.runtime.run_folder import eval_name


class AnyEvaluator(Protocol):
    """One protocol with all that was chosen of it, for one pair of data sets."""

    def run(self, judged: Any, /) -> EvalReport:
        """Judges an encoder, or two towers where that is what its config judges, on the device where they are."""


def build_evaluator(config: ProtocolConfig, extraction: Extraction, open_data: OpenData, **more: Any) -> AnyEvaluator:
    """The evaluator of a config; that its data sets can be opened and fit is checked.

    Args:
        config: of one of the table's kinds.
        extraction: how features are computed.
        open_data: opens a data set by its path.
        more: what a protocol that trains needs besides: `out`, its folder, and the `trainer`.

    Raises:
        InputError: data sets or what is chosen do not go together.
    """
    module = import_module(f"pretrain.evals.{config.kind}.protocol")  # open_clip alone takes seconds
    found: AnyEvaluator = module.build(config, extraction, partial(_open_checked, config, open_data), **more)
    return found


def _open_checked(config: ProtocolConfig, open_data: OpenData, path: str) -> Dataset:
    """A data set whose samples can be told apart by their keys, as far as features are taken of them."""
    dataset = open_data(path)
    is_test = path == config.test
    if isinstance(dataset, ShardDataset) and (is_test or not config.trains):
        limit: int | None = getattr(config, "max_test" if is_test else "max_train", None)
        refuse_repeated_keys(dataset.manifest, limit)
    return dataset


def inline_evaluators(
    configs: Sequence[ProtocolConfig],
    cached: CacheConfig,
    max_bad_samples: int = Extraction.max_bad_samples,
    open_data: OpenData | None = None,
) -> list[AnyEvaluator]:
    """An evaluator for each entry of a recipe's `evals`, which judges in between steps; its data sets are checked.

    Args:
        configs: the entries.
        cached: where data behind URLs are kept.
        max_bad_samples: of a data set that may be left out, as they cannot be used.
        open_data: opens a data set by its path; None: each time anew.

    Raises:
        InputError: a data set is wrong, or an entry trains the encoder beside the run that trains it.
    """
    for index, config in enumerate(configs):
        if config.trains:
            raise InputError(
                where=f"evals.{index}.kind",
                expected=f"a protocol that leaves the encoder as it is, as {config.kind} trains a whole encoder of its "
                "own, for which the run would wait with all its devices",
                found=config.kind,
                fix="Set evals_apart in the cluster file, or fine-tune a checkpoint: `pretrain eval finetune`.",
            )
    open_data = open_data or partial(open_dataset, cache=cached)
    extraction = Extraction(max_bad_samples=max_bad_samples)
    return [build_evaluator(config, extraction, open_data) for config in configs]


def check_evaluations(
    configs: Sequence[ProtocolConfig], cached: CacheConfig, *, apart: bool
) -> dict[str, tuple[str, ...]]:
    """Checks the entries of a recipe's `evals` and their data sets.

    Args:
        configs: the entries.
        cached: where data behind URLs are kept.
        apart: whether each evaluation is a job of its own, which may train.

    Returns:
        Fingerprints of the data sets of each entry, by the name of its curve.

    Raises:
        InputError: an entry cannot be answered.
    """
    open_once = cache(partial(open_dataset, cache=cached))
    inline_evaluators([config for config in configs if not (apart and config.trains)], cached, open_data=open_once)
    for config in configs:
        if apart and config.trains:
            train, test = map(open_once, config.datasets)
            Task(train, test)
    return {
        eval_name(index, config.kind): tuple(open_once(path).fingerprint for path in config.datasets)
        for index, config in enumerate(configs)
    }
