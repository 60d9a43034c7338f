"""What is judged while a run trains: the validation set, and the encoder by protocols. Its random state is untouched.

The linear classifier that is trained beside: online_probe.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec, LeftOut
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loader import evaluation_batches
from data_pipeline.samples.captions import CaptionReader
from data_pipeline.samples.preprocessing import Preprocessing
from pretrain.callbacks.callback import Periodic
from pretrain.callbacks.online_probe import OnlineProbe
from pretrain.engine.engine import Engine
from pretrain.evals.config import ProtocolConfig
from pretrain.evals.protocols import AnyEvaluator
from pretrain.evals.sources.copies import build_copy, judged_copy
from pretrain.evals.sources.trained import TrainedRun
from pretrain.monitoring.budgets import too_many_left_out
from pretrain.monitoring.log import MetricLog
from pretrain.recipe.recipe import Data
from pretrain.runtime.agreement import agree
from pretrain.runtime.collectives import from_main, gather_objects, side_group, sum_over_ranks
from pretrain.runtime.run_folder import eval_name, folder_name
from pretrain.runtime.state import RunState

BATCH_SIZE = 256  # samples of a rank that are validated at once, where the recipe's micro-batches are not smaller


def steps_between(every_epochs: float, steps_per_epoch: float) -> int:
    """Steps after which an evaluation is due that a recipe asks for every so many epochs."""
    return max(1, round(every_epochs * steps_per_epoch))


@dataclass(frozen=True)
class ValidationData:
    """What is validated on, and how it is read.

    Attributes:
        dataset: with a sample for each rank at least.
        data: the recipe's group: how images are read, and how many may be left out.
        image_size: of evaluation views, pixels.
        micro_size: samples of one forward pass in training, as the recipe says; None: it does not say.
        captions: how captions are read, where the objective asks for tokens.
    """

    dataset: Dataset
    data: Data
    image_size: int
    micro_size: int | None
    captions: CaptionReader | None

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become evaluation views."""
        return self.data.preprocessing(self.image_size)


class Validation(Periodic):
    """Means of the objective's loss and metrics over every sample of the validation set, once each.

    Args:
        every_steps: steps between evaluations.
        data: the validation set.
        engine: holds the objective.
        prepare: makes the normalized batch on the device out of a host batch.
        probe: validated with the objective; None: there is none.
        say: receives a sentence for the log, on rank 0, about each sample that is left out.
    """

    def __init__(
        self,
        every_steps: int,
        data: ValidationData,
        engine: Engine,
        prepare: Callable[[Batch], Batch],
        probe: OnlineProbe | None,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(every_steps)
        self._data, self._engine, self._prepare, self._probe, self._say = data, engine, prepare, probe, say
        self._said: set[tuple[str, str]] = set()  # samples that were left out before, by file and key
        self._batch_size = max(1, min(data.micro_size or BATCH_SIZE, BATCH_SIZE))
        if engine.objective.coupling:  # whose loss depends on the size
            self._batch_size = BATCH_SIZE

    def evaluate(self, state: RunState) -> dict[str, float]:
        """Means by name, whatever the number of ranks; every rank calls it.

        Samples that cannot be used are left out, named in the log and counted as `val/left_out`.

        Raises:
            RunError: they are more than data.max_bad_samples.
        """
        batches = self._batches()
        sums: dict[str, Tensor] = {}
        # At ZeRO 3 each forward is a collective: ranks whose share is a batch shorter repeat their last, unweighted.
        rounds = math.ceil(math.ceil(self._data.dataset.num_samples / self._engine.world.size) / self._batch_size)
        batch: Batch | None = None
        left_out: list[LeftOut] = []
        for _ in range(rounds):
            following = next(batches, None)
            weight = 0
            if following is not None:
                kept = following.kept()
                left_out += following.left_out
                weight = len(kept)
                batch = self._prepare(kept if weight else replace(following, left_out=()))  # all blank: for no weight
            assert batch is not None  # preflight saw to a sample for each rank
            output = self._engine.evaluate(batch, state.progress)
            probed = {} if self._probe is None else self._probe.measure(batch)
            for name, value in {"loss": output.loss, **output.metrics, **probed, "n": torch.ones(())}.items():
                term = value.detach().double().cpu() * weight
                sums[name] = sums[name] + term if name in sums else term
        names = sorted(sums)
        stacked = torch.stack([sums[name] for name in names]).to(self._engine.device)
        totals = dict(zip(names, sum_over_ranks(stacked).tolist(), strict=True))
        num_left_out = self._count(left_out)
        if not totals["n"]:
            raise too_many_left_out("data.val", num_left_out, None)
        means = {f"val/{name}": total / totals["n"] for name, total in totals.items() if name != "n"}
        return means | ({"val/left_out": float(num_left_out)} if num_left_out else {})

    def _count(self, left_out: Sequence[LeftOut]) -> int:
        """Those of all ranks; each is named in the log once."""
        found = [one for rank in gather_objects(list(left_out)) for one in rank]
        for one in found:
            if (one.file, one.key) not in self._said:
                self._said.add((one.file, one.key))
                self._say(f"validation leaves {one.key} in {one.file} of data.val out: {one.reason}")
        budget = self._data.data.max_bad_samples
        if len(found) > budget:
            raise too_many_left_out("data.val", len(found), budget)
        return len(found)

    def _batches(self) -> Iterator[Batch]:
        needs: BatchSpec = replace(self._engine.objective.needs, image_size=self._data.preprocessing.image_size)
        if self._probe is not None:
            needs = replace(needs, num_classes=self._probe.num_classes)
        return evaluation_batches(
            self._data.dataset,
            needs,
            self._data.preprocessing,
            batch_size=self._batch_size,
            rank=self._engine.world.rank,
            world_size=self._engine.world.size,
            max_pixels=self._data.data.max_pixels,
            captions=self._data.captions,
        )


class ProtocolEvaluation(Periodic):
    """An entry of the recipe's `evals`, on a copy of what it judges, by rank 0, while the others wait.

    Args:
        every_steps: steps between evaluations.
        index: of the entry among the recipe's `evals`.
        config: the entry.
        evaluator: made of it.
        engine: holds the objective, whose encoder or whose two towers are judged.
        run: as it is described in reports, which go to `evals/` in its folder.
        alive: called with every batch.
        log: keeps the reports, and receives on rank 0 a sentence about samples that are left out.
    """

    def __init__(
        self,
        every_steps: int,
        index: int,
        config: ProtocolConfig,
        evaluator: AnyEvaluator,
        engine: Engine,
        run: TrainedRun,
        alive: Callable[[], None],
        log: MetricLog,
    ) -> None:
        super().__init__(every_steps)
        self._log = log
        self._name, self._judges, self._evaluator = eval_name(index, config.kind), config.judges, evaluator
        self._engine, self._run, self._alive = engine, run, alive
        self._group = side_group()  # rank 0 may take long, and NCCL's patience is short

    def evaluate(self, state: RunState) -> dict[str, float]:
        """The reported value by name, on every rank; every rank calls it, and raises what rank 0 does."""
        step, objective = state.progress.step, self._engine.objective
        module = self._engine.whole_copy(
            objective.encoder if self._judges == "encoder" else objective,
            partial(build_copy, self._run, self._judges),
            where=f"the {self._judges} at step {step}",
        )
        values = agree(lambda: self._judge(module, step) if module is not None else {}, self._group)
        return from_main(values, self._group)

    def _judge(self, module: nn.Module, step: int) -> dict[str, float]:
        for part in (module, *module.children()):  # of two towers each is called by itself
            part.register_forward_pre_hook(lambda *_: self._alive())
        judged = judged_copy(self._run, self._judges, module, tag=folder_name(step), description={"step": step})
        report = self._evaluator.run(judged)
        path = self._run.folder / "evals" / f"{self._name}_{folder_name(step)}.json"
        self._log.keep(str(path), lambda: report.save(path))
        values = {f"{self._name}/{report.metric}": report.value}
        if isinstance(left_out := report.data.get("left_out"), dict):
            values[f"{self._name}/left_out"] = float(sum(left_out.values()))
            for note in report.notes:
                self._log.say(f"{self._name}: {note}")
        return values
