"""Multinomial logistic regression to its optimum: L-BFGS in fp64 on the penalized loss, as scikit-learn has it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.progress import track
from pretrain.evals.classifiers.probes import Probes, statistics

TOLERANCE = 1e-8
MAX_ITERATIONS = 5000
HISTORY = 10
ROUND = 50  # iterations of a call, between which progress is told
VALUES_PER_CHUNK = 2**26  # of features and logits in fp64, bounds their memory
HELD_BYTES = 2**30  # what is fitted on is held on the CPU up to so much; on a GPU, up to half of what is free


@dataclass(frozen=True)
class Optimum:
    """Where the search for each C ended.

    Attributes:
        inverse_penalties: C.
        probes: a classifier for each C, in their order.
        loss: C * (sum of the cross entropies) + |weights|^2 / 2, divided by C * N: what was minimised.
        gradient: largest absolute entry of its gradient, by C.
        iterations: by C.
        tolerance: the gradient that was asked for.
        floor: the gradient below which the loss in fp64 tells no point from another, by C.
    """

    inverse_penalties: tuple[float, ...]
    probes: Probes
    loss: tuple[float, ...]
    gradient: tuple[float, ...]
    iterations: tuple[int, ...]
    tolerance: float
    floor: tuple[float, ...]

    def notes(self) -> tuple[str, ...]:
        """Where the search ended before the gradient was as small as was asked for, or as rounding lets it become."""
        ended = zip(self.inverse_penalties, self.gradient, self.floor, self.iterations, strict=True)
        return tuple(
            f"for C = {c:g} the search ended after {iterations} iterations at a gradient of {gradient:.1e}"
            for c, gradient, floor, iterations in ended
            if not gradient <= max(self.tolerance, floor)
        )


class Objective:
    """The penalized loss of features that are standardized by the mean and deviation of what is fitted on.

    Args:
        values: [N, D]; may be mapped into memory.
        labels: [N] int64, in [0, K).
        rows: the samples to fit on; None: all.
        num_classes: K.
        device: to compute on.
    """

    def __init__(
        self, values: Tensor, labels: Tensor, *, rows: Tensor | None, num_classes: int, device: torch.device
    ) -> None:
        rows = None if rows is None else rows.sort().values  # as they lie in a mapped file
        self.num = len(labels) if rows is None else len(rows)
        self.mean, self.std = statistics(values, rows)
        self.num_classes, self.device = num_classes, device
        self.chunk = max(1, VALUES_PER_CHUNK // (values.shape[1] + 2 * num_classes))
        # Each of hundreds of evaluations goes through all of it.
        if self.num * values.shape[1] * values.element_size() <= _room(device):
            values, labels = (part if rows is None else part[rows] for part in (values, labels))
            values, labels, rows = values.to(device), labels.to(device), None
        self.values, self.labels, self.rows = values, labels, rows
        self._mean, self._std = self.mean.to(device, torch.float64), self.std.to(device, torch.float64)

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_classes, self.values.shape[1] + 1

    def loss_and_gradient(self, theta: Tensor, inverse_penalty: float) -> tuple[Tensor, Tensor]:
        """Computes the loss of theta [K, D + 1] fp64: weights and, in the last column, biases, which are not penalized.

        Mean cross entropy plus |weights|^2 / (2 C N), and its gradient, [K, D + 1].
        """
        weight, bias = theta[:, :-1], theta[:, -1]
        strength = 1 / (inverse_penalty * self.num)
        loss = strength * weight.square().sum() / 2
        gradient = torch.cat([strength * weight, torch.zeros_like(bias[:, None])], dim=1)
        for values, labels in self._parts():
            x = (values.to(self.device).double() - self._mean) / self._std
            y = labels.to(self.device)[:, None]
            log_likely = torch.addmm(bias, x, weight.T).log_softmax(dim=1)
            loss = loss - log_likely.gather(1, y).sum() / self.num
            residual = log_likely.exp_().scatter_add_(1, y, torch.full_like(y, -1, dtype=torch.float64))
            residual /= self.num
            gradient[:, :-1].addmm_(residual.T, x)
            gradient[:, -1] += residual.sum(dim=0)
        return loss, gradient

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.rows is None:
            yield from zip(*(torch.split(part, self.chunk) for part in (self.values, self.labels)), strict=True)
        else:
            yield from ((self.values[some], self.labels[some]) for some in torch.split(self.rows, self.chunk))


def _room(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else HELD_BYTES


def fit_logistic(
    values: Tensor,
    labels: Tensor,
    inverse_penalties: Sequence[float],
    *,
    rows: Tensor | None = None,
    num_classes: int,
    device: torch.device,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    label: str,
) -> Optimum:
    """The optimum for each C (scikit-learn's: the inverse of the penalty on the sum of the losses).

    One after the other from the strongest penalty on, each from where the last one ended. Nothing is random.

    Args:
        values: features, [N, D]; may be mapped into memory.
        labels: [N] int64, in [0, K).
        inverse_penalties: C, each above 0.
        rows: the samples to fit on, by whose mean and deviation features are standardized; None: all.
        num_classes: K.
        device: to compute on, in fp64.
        tolerance: where the search ends: largest absolute entry of the gradient of the mean loss.
        max_iterations: or after so many for one C.
        label: of the progress line.
    """
    objective = Objective(values, labels, rows=rows, num_classes=num_classes, device=device)
    theta = torch.zeros(objective.shape, dtype=torch.float64, device=device)
    found: dict[float, tuple[Tensor, float, float, int]] = {}
    for c in sorted(set(inverse_penalties)):
        theta, *reached = _minimise(objective, theta, c, tolerance, max_iterations, f"{label}, C = {c:g}")
        found[c] = (theta, *reached)  # type: ignore[assignment]
    thetas, losses, gradients, iterations = zip(*(found[c] for c in inverse_penalties), strict=True)
    stacked = torch.stack(thetas).to(values.dtype)
    moments = (objective.mean.to(device), objective.std.to(device))
    probes = Probes(*moments, stacked[:, :, :-1].contiguous(), stacked[:, :, -1].contiguous())
    floor = tuple(_floor(loss, c, objective.num) for loss, c in zip(losses, inverse_penalties, strict=True))
    return Optimum(tuple(inverse_penalties), probes, losses, gradients, iterations, tolerance, floor)


def _floor(loss: float, inverse_penalty: float, num: int) -> float:
    """The gradient g of a weight at which moving it can lower the loss by no more than its last digit.

    The penalty curves the loss along each weight by at least h = 1 / (C N), so that moving it lowers the loss by at
    most g^2 / (2 h). Where that is under the loss's rounding, the line search, which compares losses, finds no step
    that improves; the order in which a CPU adds decides how far below this it ends.
    """
    return math.sqrt(2 * torch.finfo(torch.float64).eps * loss / (inverse_penalty * num))


def _minimise(
    objective: Objective, start: Tensor, inverse_penalty: float, tolerance: float, max_iterations: int, label: str
) -> tuple[Tensor, float, float, int]:
    """theta at the optimum, the loss and the gradient's largest entry there, and iterations taken."""
    theta = start.clone().requires_grad_()
    num = objective.num
    # Ends where the gradient says so, or where fp64 has no more to give.
    search = torch.optim.LBFGS(
        [theta],
        max_eval=2 * ROUND,
        history_size=HISTORY,
        tolerance_grad=tolerance * num,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        with torch.no_grad():
            loss, gradient = objective.loss_and_gradient(theta.detach(), inverse_penalty)
        # The sum: torch forgets curvatures below an absolute bound, which those of the mean are near the optimum.
        theta.grad = gradient.mul_(num)
        return loss * num

    def rounds() -> Iterator[float]:
        """The loss before each round."""
        before = math.inf
        while (done := search.state[theta].get("n_iter", 0)) < max_iterations:
            search.param_groups[0]["max_iter"] = min(ROUND, max_iterations - done)
            loss = float(search.step(closure))  # type: ignore[no-untyped-call]
            assert theta.grad is not None
            if not loss < before or theta.grad.abs().max() <= tolerance * num:
                return
            before = loss
            yield loss

    for _ in track(rounds(), label=label, total=None):
        pass
    loss, gradient = objective.loss_and_gradient(theta.detach(), inverse_penalty)
    return theta.detach(), loss.item(), gradient.abs().max().item(), search.state[theta]["n_iter"]
