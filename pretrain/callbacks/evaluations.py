"""What is judged while a run trains: the validation set, and kNN on the encoder. Neither touches its random state.

The linear classifier that is trained beside: online_probe.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.datasets.read import Dataset, open_dataset
from data_pipeline.loader import evaluation_batches
from data_pipeline.samples.captions import Captions
from data_pipeline.samples.views import ViewSpec
from pretrain.callbacks.online_probe import OnlineProbe
from pretrain.engine.engine import Engine
from pretrain.evals.encoder import Encoder
from pretrain.evals.knn.protocol import Knn
from pretrain.loop import Periodic
from pretrain.models.encoders import build_encoder, load_strictly
from pretrain.objectives.contract import Contrastive
from pretrain.recipe.recipe import Recipe
from pretrain.runtime.collectives import World, from_main, side_group, sum_over_ranks
from pretrain.runtime.run_folder import eval_name, folder_name
from pretrain.runtime.state import RunState


def knn_evaluators(recipe: Recipe) -> list[Knn]:
    """One for each entry of `evals`; opening its data sets checks them.

    Raises:
        InputError: of whichever is wrong.
    """
    cache = recipe.data.cache.spec()
    return [Knn(open_dataset(config.train, cache), open_dataset(config.test, cache), config) for config in recipe.evals]


class Inline:
    """Evaluations of a run, each a function that all ranks call together.

    Args:
        recipe: of the run.
        val: validation set; None: no validation.
        captions: how its captions are read, where the objective asks for tokens.
        engine: holds the objective, whose loss is validated and whose encoder is judged.
        prepare: a host batch -> the normalised batch on the device.
        world: this process among the ranks.
        out: the run's folder; reports go to `evals/`.
        alive: called with every batch that kNN takes, on rank 0, while the others wait.
        probe: which is validated with the objective; None: there is none.
    """

    def __init__(
        self,
        recipe: Recipe,
        val: Dataset | None,
        captions: Captions | None,
        engine: Engine,
        prepare: Callable[[Batch], Batch],
        world: World,
        out: Path,
        alive: Callable[[], None] = lambda: None,
        probe: OnlineProbe | None = None,
    ) -> None:
        self._recipe, self._val, self._engine, self._objective = recipe, val, engine, engine.objective
        self._captions, self._probe = captions, probe
        self._prepare, self._world, self._out, self._alive = prepare, world, out, alive
        self._group = side_group()  # rank 0 may take long, and NCCL's patience is short
        self._views = ViewSpec(**recipe.data.views.model_dump())

    def periodic(self, steps_per_epoch: float, *, judge: bool = True) -> tuple[Periodic, ...]:
        """What is due every so many steps; `judge` False leaves the recipe's `evals` to others."""

        def every(epochs: float) -> int:
            return max(1, round(epochs * steps_per_epoch))

        found = []
        if self._val is not None:
            every_steps = every(self._recipe.validation.every_epochs)
            found.append(Periodic(every_steps, partial(self._validate, self._val)))
        for index, knn in enumerate(knn_evaluators(self._recipe) if judge else ()):
            found.append(Periodic(every(self._recipe.evals[index].every_epochs), self._judge(index, knn)))
        return tuple(found)

    def _validate(self, val: Dataset, state: RunState) -> dict[str, float]:
        """Means over every sample of the validation set, once each, whatever the number of ranks."""
        world = self._world
        batch_size = max(1, min(self._recipe.batch.micro_size or 256, 256))
        if isinstance(self._objective, Contrastive):  # whose loss depends on the size
            batch_size = 256
        needs = replace(self._objective.needs, image_size=self._recipe.model.judged_size)
        if self._probe is not None:
            needs = replace(needs, num_classes=self._probe.num_classes)
        batches = evaluation_batches(
            val,
            needs,
            self._views,
            batch_size=batch_size,
            rank=world.rank,
            world_size=world.size,
            max_pixels=self._recipe.data.max_pixels,
            captions=self._captions,
        )
        sums: dict[str, Tensor] = {}
        # At ZeRO 3 each forward is a collective: ranks whose share is a batch shorter repeat their last, unweighted.
        rounds = math.ceil(math.ceil(val.num_samples / world.size) / batch_size)
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
        totals = dict(
            zip(
                names,
                sum_over_ranks(torch.stack([sums[n] for n in names]).to(self._engine.device)).tolist(),
                strict=True,
            )
        )
        return {f"val/{name}": total / totals["n"] for name, total in totals.items() if name != "n"}

    def _judge(self, index: int, knn: Knn) -> Callable[[RunState], dict[str, float]]:
        def judge(state: RunState) -> dict[str, float]:
            weights = self._engine.materialize(self._objective.encoder)
            values: dict[str, float] = {}
            if self._world.is_main:
                step = state.progress.step
                report = knn.run(self._encoder(weights, step))
                report.save(self._out / "evals" / f"{eval_name(index)}_{folder_name(step)}.json")
                values = {f"{eval_name(index)}/top1_k{self._recipe.evals[index].k}": report.value}
            return from_main(values, self._group)

        return judge

    def _encoder(self, weights: dict[str, Tensor], step: int) -> Encoder:
        """A copy apart, so that hooks, training flags and sharded weights of the training stay as they are."""
        with torch.random.fork_rng(devices=[]):
            module = build_encoder(self._recipe.model)
        load_strictly(module, weights, where=f"the encoder at step {step}")
        module.register_forward_pre_hook(lambda *_: self._alive())
        return Encoder.of_recipe(
            module.to(self._engine.device),
            self._recipe,
            tag=f"step_{step:08d}",
            run=self._out,
            description={"source": str(self._out), "kind": "run", "recipe": self._recipe.name, "step": step},
        )
