"""What is judged while a run trains: the validation set, and kNN on the encoder. Neither touches its random state.

The linear classifier that is trained beside: online_probe.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.datasets.read import Dataset, open_dataset
from data_pipeline.loader import evaluation_batches
from data_pipeline.remote.cache import CacheSpec
from data_pipeline.samples.captions import Captions
from data_pipeline.samples.views import ViewSpec
from pretrain.callbacks.callback import Periodic
from pretrain.callbacks.online_probe import OnlineProbe
from pretrain.engine.engine import Engine
from pretrain.evals.encoder import Encoder
from pretrain.evals.knn.protocol import Knn
from pretrain.recipe.recipe import InlineKnn
from pretrain.runtime.collectives import from_main, side_group, sum_over_ranks
from pretrain.runtime.run_folder import eval_name, folder_name
from pretrain.runtime.state import RunState

BATCH_SIZE = 256  # samples of a rank that are validated at once, where the recipe's micro-batches are not smaller


def knn_evaluators(configs: Sequence[InlineKnn], cache: CacheSpec) -> list[Knn]:
    """Builds one evaluator for each entry of `evals`; opening its data sets checks them.

    Raises:
        InputError: one of the data sets is wrong.
    """
    return [Knn(open_dataset(config.train, cache), open_dataset(config.test, cache), config) for config in configs]


def steps_between(every_epochs: float, steps_per_epoch: float) -> int:
    """Steps after which an evaluation is due that a recipe asks for every so many epochs."""
    return max(1, round(every_epochs * steps_per_epoch))


@dataclass(frozen=True)
class ValidationData:
    """What is validated on, and how it is read.

    Attributes:
        dataset: with a sample for each rank at least.
        image_size: of the views, pixels.
        views: geometry of evaluation views.
        micro_size: samples of one forward pass in training, as the recipe says; None: it does not say.
        max_pixels: an image of more pixels is refused before it is decoded.
        captions: how captions are read, where the objective asks for tokens.
    """

    dataset: Dataset
    image_size: int
    views: ViewSpec
    micro_size: int | None
    max_pixels: int
    captions: Captions | None


class Validation(Periodic):
    """Means of the objective's loss and metrics over every sample of the validation set, once each.

    Args:
        every_steps: steps between evaluations.
        data: the validation set.
        engine: holds the objective.
        prepare: makes the normalized batch on the device out of a host batch.
        probe: validated with the objective; None: there is none.
    """

    def __init__(
        self,
        every_steps: int,
        data: ValidationData,
        engine: Engine,
        prepare: Callable[[Batch], Batch],
        probe: OnlineProbe | None,
    ) -> None:
        super().__init__(every_steps)
        self._data, self._engine, self._prepare, self._probe = data, engine, prepare, probe
        self._batch_size = max(1, min(data.micro_size or BATCH_SIZE, BATCH_SIZE))
        if engine.objective.coupling:  # whose loss depends on the size
            self._batch_size = BATCH_SIZE

    def evaluate(self, state: RunState) -> dict[str, float]:
        """Means by name, whatever the number of ranks; every rank calls it."""
        batches = self._batches()
        sums: dict[str, Tensor] = {}
        # At ZeRO 3 each forward is a collective: ranks whose share is a batch shorter repeat their last, unweighted.
        rounds = math.ceil(math.ceil(self._data.dataset.num_samples / self._engine.world.size) / self._batch_size)
        batch: Batch | None = None
        for _ in range(rounds):
            following = next(batches, None)
            batch = self._prepare(following) if following is not None else batch
            assert batch is not None  # preflight saw to a sample for each rank
            weight = len(batch) if following is not None else 0
            output = self._engine.evaluate(batch, state.progress)
            probed = {} if self._probe is None else self._probe.measure(batch)
            for name, value in {"loss": output.loss, **output.metrics, **probed, "n": torch.ones(())}.items():
                term = value.detach().double().cpu() * weight
                sums[name] = sums[name] + term if name in sums else term
        names = sorted(sums)
        stacked = torch.stack([sums[name] for name in names]).to(self._engine.device)
        totals = dict(zip(names, sum_over_ranks(stacked).tolist(), strict=True))
        return {f"val/{name}": total / totals["n"] for name, total in totals.items() if name != "n"}

    def _batches(self) -> Iterator[Batch]:
        needs: BatchSpec = replace(self._engine.objective.needs, image_size=self._data.image_size)
        if self._probe is not None:
            needs = replace(needs, num_classes=self._probe.num_classes)
        return evaluation_batches(
            self._data.dataset,
            needs,
            self._data.views,
            batch_size=self._batch_size,
            rank=self._engine.world.rank,
            world_size=self._engine.world.size,
            max_pixels=self._data.max_pixels,
            captions=self._data.captions,
        )


class KnnEvaluation(Periodic):
    """kNN on the features of the encoder, by rank 0, while the others wait.

    Args:
        every_steps: steps between evaluations.
        index: of the entry among the recipe's `evals`.
        knn: the evaluator of that entry.
        engine: holds the objective whose encoder is judged.
        build: makes a module with the encoder's tensors.
        describe: (module, step) -> the encoder with what belongs to it.
        out: the run's folder; reports go to `evals/`.
        alive: called with every batch.
    """

    def __init__(
        self,
        every_steps: int,
        index: int,
        knn: Knn,
        engine: Engine,
        build: Callable[[], nn.Module],
        describe: Callable[[nn.Module, int], Encoder],
        out: Path,
        alive: Callable[[], None],
    ) -> None:
        super().__init__(every_steps)
        self._name, self._knn, self._engine = eval_name(index), knn, engine
        self._build, self._describe, self._out, self._alive = build, describe, out, alive
        self._group = side_group()  # rank 0 may take long, and NCCL's patience is short

    def evaluate(self, state: RunState) -> dict[str, float]:
        """The accuracy by name, on every rank; every rank calls it."""
        step = state.progress.step
        module = self._engine.whole_copy(
            self._engine.objective.encoder, self._build, where=f"the encoder at step {step}"
        )
        values: dict[str, float] = {}
        if module is not None:
            module.register_forward_pre_hook(lambda *_: self._alive())
            report = self._knn.run(self._describe(module, step))
            report.save(self._out / "evals" / f"{self._name}_{folder_name(step)}.json")
            values = {f"{self._name}/top1_k{self._knn.config.k}": report.value}
        return from_main(values, self._group)
