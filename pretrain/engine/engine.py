"""DeepSpeed behind a handful of methods: one optimizer step, evaluation, whole weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from pretrain.engine import deepspeed_library
from pretrain.engine.computation import channels_last, choose_computation
from pretrain.engine.deepspeed_config import deepspeed_config
from pretrain.engine.partitions import Partitions
from pretrain.engine.training_state import TrainingState
from pretrain.engine.two_passes import loss_and_gradients, poisoned
from pretrain.models.batch_norm import synchronise_batch_norms
from pretrain.models.strict_loading import load_strictly
from pretrain.objectives.contract import Contrastive, LossOutput, Objective, PairFeatures
from pretrain.optim.averages import follow
from pretrain.optim.config import Ema, OptimConfig
from pretrain.optim.optimizers import CONSTANT_LR, build_optimizer
from pretrain.recipe.recipe import EngineConfig
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress
from pretrain.runtime.stopwatch import Stopwatch

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        metrics: `loss` and the objective's own, local means over this rank's micro-batches, fp32 scalars.
        grad_norm: L2 norm of the averaged gradient before clipping, over all parameters and ranks.
        applied: False where a loss or gradient was not finite; then no rank changed anything.
        rates: learning rates of the groups, before any layer decay: `lr`, and `undecayed_lr` where modules keep the
            peak after the warmup.
    """

    metrics: dict[str, Tensor]
    grad_norm: float
    applied: bool
    rates: dict[str, float]


class Engine:
    """Trains an objective under ZeRO 0-3; the only place that knows there is DeepSpeed.

    Attributes:
        state: what was learned so far.

    Args:
        objective: the whole model, on the CPU, equal on all ranks; the engine moves it to `device`.
        optim: optimizer and clipping.
        config: ZeRO stage, precision, and how a step is computed.
        ema: moving average of the trained weights; None: there is none.
        world: this process among the ranks; the process group is initialized already.
        device: where this rank computes.
        micro_size: samples of a micro-batch on one rank.
        accumulation: micro-batches of a step on one rank.
        seed: of the run; dropout and drop path are keyed by (seed, step, rank, micro-batch).

    Raises:
        InputError: activations are to be checkpointed, or blocks compiled, and the objective has no blocks.
    """

    def __init__(
        self,
        objective: Objective,
        optim: OptimConfig,
        config: EngineConfig,
        *,
        world: World,
        device: torch.device,
        micro_size: int,
        accumulation: int,
        seed: int,
        ema: Ema | None = None,
    ) -> None:
        deepspeed = deepspeed_library.import_deepspeed(device)
        self.objective, self.stage, self.world, self.device, self.seed = (
            objective, config.zero_stage, world, device, seed,
        )  # fmt: skip
        self.clip_norm, self._channels_last = optim.clip_norm, config.channels_last
        self.clock = Stopwatch(device)
        deepspeed_library.time_collectives(deepspeed, self.clock)
        objective.to(device)
        if world.size > 1:
            synchronise_batch_norms(objective, device)
        choose_computation(objective, config, device)
        self._names = {p: name for name, p in objective.named_parameters()}
        shapes = {name: tuple(p.shape) for p, name in self._names.items()}  # at ZeRO 3 they will be empty
        self.optimizer = build_optimizer(objective, optim, fused=config.fused_adamw)
        self._deepspeed, *_ = deepspeed.initialize(
            model=objective,
            optimizer=self.optimizer,
            dist_init_required=False,
            config=deepspeed_config(
                config, clip_norm=optim.clip_norm, world_size=world.size, micro_size=micro_size,
                accumulation=accumulation,
            ),
        )  # fmt: skip
        if self.stage == 3:
            deepspeed_library.register_shared_parameters(deepspeed, objective)
        self._partitions = Partitions(self._deepspeed, self.optimizer, self.stage)
        self.state = TrainingState(objective, shapes, self.optimizer, self._partitions, ema)

    def step(
        self, micro_batches: Sequence[Batch], progress: Progress, lr: float, constant_lr: float | None = None
    ) -> StepResult:
        """Forward and backward of every micro-batch, then one optimizer step.

        Args:
            micro_batches: this rank's share.
            progress: before the step.
            lr: learning rate.
            constant_lr: that of modules which keep the peak after the warmup; None: `lr` as well.
        """
        self.objective.train()
        rates = self._set_lr(lr, lr if constant_lr is None else constant_lr)
        buffers = [(buffer, buffer.clone()) for buffer in self.state.buffers]
        if isinstance(self.objective, Contrastive) and len(micro_batches) > 1:
            metrics = self._in_two_passes(self.objective, micro_batches, progress)
        else:
            metrics = self._in_one_pass(micro_batches, progress)
        with self.clock.part("optimizer"):
            grad_norm, applied = self._apply()
            if applied:
                self._clamp_parameters()
                self._move_averages(progress)
            else:  # running statistics took part in a forward pass that was not finite
                for buffer, before in buffers:
                    buffer.copy_(before)
            if self.stage == 3 and self.device.type == "cuda":
                # DeepSpeed gathers weights on a stream of its own, which does not wait for what was just written.
                torch.cuda.current_stream().synchronize()
        return StepResult(metrics, grad_norm, applied, rates)

    @torch.no_grad()
    def evaluate(self, batch: Batch, progress: Progress) -> LossOutput:
        """The loss in evaluation mode. At ZeRO 3 weights are gathered on the way: every rank must call it."""
        self.objective.eval()
        output: LossOutput = self._deepspeed(self._laid_out(batch), progress)
        self.objective.train()
        return output

    @torch.no_grad()
    def represent(self, batch: Batch) -> Tensor:
        """The encoder's features of the first view in evaluation mode, [B, D] fp32, by the latest weights.

        At ZeRO 3 weights are gathered on the way, which only a pass through the whole objective sees to: for this
        one its forward is the encoder's. Every rank must call it.
        """
        encoder = self.objective.encoder
        self.objective.eval()
        self.objective.__dict__["forward"] = lambda images: encoder(images)
        try:
            features: Tensor = self._deepspeed(self._laid_out(batch).views[0])
        finally:
            del self.objective.__dict__["forward"]
            self.objective.train()
        with self._partitions.local_weights():  # what was fetched ahead for the rest of the objective is let go
            return features.float()

    def materialize(self, module: nn.Module, *, averaged: bool = True) -> dict[str, Tensor]:
        """Gathers whole fp32 weights and buffers of a submodule on the CPU of every rank; every rank must call it.

        Args:
            module: of the objective.
            averaged: the moving averages of weights and running statistics, where the recipe has them.
        """
        state = {}
        for name, value in module.state_dict(keep_vars=True).items():
            found = self._average(value) if averaged else None
            if found is None and isinstance(value, nn.Parameter) and self.stage == 3:
                with deepspeed_library.gathered(value):
                    found = value.detach().to("cpu", copy=True)
            state[name] = value.detach().to("cpu", copy=True) if found is None else found
        return state

    def whole_copy(self, module: M, build: Callable[[], M], *, where: str) -> M | None:
        """An independent copy of a submodule with whole weights, on the device of rank 0; None on the others.

        Hooks, training flags, sharded weights and the random state of the training stay as they are. Every rank must
        call it.

        Args:
            module: of the objective.
            build: makes a module with the same tensors.
            where: what an error calls the module.
        """
        weights = self.materialize(module)
        if not self.world.is_main:
            return None
        with torch.random.fork_rng(devices=[]):
            copy = build()
        load_strictly(copy, weights, where=where)
        return copy.to(self.device)

    def _average(self, value: Tensor) -> Tensor | None:
        """On the CPU: that of a trained weight, whole, or of a running statistic; None where there is none."""
        if isinstance(value, nn.Parameter):
            return self.state.whole_average(self._names[value], value) if value.requires_grad else None
        average = self.state.average_of(value)
        return None if average is None else average.detach().to("cpu", copy=True)

    def _in_one_pass(self, micro_batches: Sequence[Batch], progress: Progress) -> dict[str, Tensor]:
        """Gradients of a loss that is a mean over samples; its metrics."""
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(micro_batches):
            output = self._forward_backward(i, i == len(micro_batches) - 1, batch, progress)
            for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
                sums[name] = sums[name] + value if name in sums else value
        return {name: value / len(micro_batches) for name, value in sums.items()}

    def _in_two_passes(
        self, objective: Contrastive, micro_batches: Sequence[Batch], progress: Progress
    ) -> dict[str, Tensor]:
        """Gradients of a loss over the whole batch, in the memory of one micro-batch; its metrics."""
        parts: list[PairFeatures] = []
        with self.clock.part("forward"), torch.no_grad():
            for i, batch in enumerate(micro_batches):
                self._seed(progress.step, i)
                parts.append(self._deepspeed(self._laid_out(batch), progress, features_only=True))
            output, gradients = loss_and_gradients(objective, parts, progress)
        for i, (batch, gradient) in enumerate(zip(micro_batches, gradients, strict=True)):
            # DeepSpeed divides by the number of micro-batches, and these gradients add up.
            scaled = PairFeatures(*(g * len(micro_batches) for g in gradient))
            self._forward_backward(i, i == len(micro_batches) - 1, batch, progress, scaled)
        return {"loss": output.loss.detach(), **output.metrics}

    def _forward_backward(
        self, i: int, last: bool, batch: Batch, progress: Progress, *more: PairFeatures
    ) -> LossOutput:
        self._seed(progress.step, i)
        self._deepspeed.set_gradient_accumulation_boundary(last)
        with self.clock.part("forward"):
            output: LossOutput = self._deepspeed(self._laid_out(batch), progress, *more)
        with self.clock.part("backward"):
            self._deepspeed.backward(poisoned(output.loss))
        return output

    def _apply(self) -> tuple[float, bool]:
        """ZeRO 1-3 find a non-finite gradient themselves and skip the step; stage 0 would apply it."""
        if self.stage == 0:
            grads = [p.grad for p in self._names if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            if not torch.isfinite(norm):
                self.objective.zero_grad(set_to_none=True)
                return float(norm), False
            if self.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(list(self._names), self.clip_norm, norm)
            self._deepspeed.step()
            return float(norm), True
        self._deepspeed.step()
        applied = not self._deepspeed.optimizer.overflow
        return (float(self._deepspeed.get_global_grad_norm()) if applied else float("nan")), applied

    @torch.no_grad()
    def _clamp_parameters(self) -> None:
        """Elementwise, so that every rank clamps what it keeps, and what it computes with, without a collective."""
        for p, low, high in self.objective.bounds():
            piece = self._partitions.piece(p)
            kept = [] if piece is None else [piece.of(piece.kept)]
            for held in (*kept, self._partitions.local_weight(p), p.data):  # at ZeRO 3 p is whole, or empty
                held.clamp_(low, high)

    def _move_averages(self, progress: Progress) -> None:
        """After an applied step: the average of the weights, and the objective's momentum teachers."""
        self.state.update_averages(progress.step + 1)
        if teachers := self.objective.teachers(progress):
            with self._partitions.local_weights():
                for target, online, decay in teachers:
                    kept, weights = (
                        [self._partitions.local_weight(p) for p in module.parameters()] for module in (target, online)
                    )
                    follow(kept, weights, decay, progress.step + 1)

    def _laid_out(self, batch: Batch) -> Batch:
        return channels_last(batch) if self._channels_last else batch

    def _seed(self, step: int, micro_batch: int) -> None:
        """A micro-batch draws the same in each of two passes."""
        key = ((self.seed * 1_000_003 + step) * 65_537 + self.world.rank) * 8_191 + micro_batch
        torch.manual_seed(key % 2**63)

    def _set_lr(self, lr: float, constant_lr: float) -> dict[str, float]:
        """Gives every group its learning rate; returns those that some group takes, by the names of metrics."""
        rates = {"lr": lr}
        for group in self.optimizer.param_groups:
            is_constant = group["name"].startswith(CONSTANT_LR)
            if is_constant:
                rates["undecayed_lr"] = constant_lr  # the name that it has in all logs
            group["lr"] = (constant_lr if is_constant else lr) * group["lr_scale"]
        return rates
