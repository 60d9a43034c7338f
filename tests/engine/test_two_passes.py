"""A contrastive loss over micro-batches: the gradients of the whole batch, in the memory of a part."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec
from pretrain.objectives.contract import Contrastive, LossOutput, PairFeatures
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress
from tests.engine.test_engine import OPTIM, make_engine, whole_state
from tests.ranks import run_ranks

STAGES = (0, 1, 2, 3)


class ToyPair(Contrastive):
    """Images and their labels' embeddings; the loss relates every local image to every local text."""

    def __init__(self, dropout: float = 0.0, width: int = 11, depth: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.needs = BatchSpec(image_size=5, num_classes=3)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(75, width))
        for _ in range(depth):
            self.encoder.extend((nn.GELU(), nn.Linear(width, width)))
        self.dropout = nn.Dropout(dropout)
        self.text = nn.Embedding(64, width)
        self.scale = nn.Parameter(torch.ones(1))  # DeepSpeed cannot broadcast a parameter without dimensions
        self.bias = nn.Parameter(-torch.ones(1))

    def features(self, batch: Batch, progress: Progress) -> PairFeatures:
        image = nn.functional.normalize(self.dropout(self.encoder(batch.views[0])), dim=1)
        text = nn.functional.normalize(self.text(batch.labels), dim=1)
        return PairFeatures(image, text, self.scale.exp().squeeze(), self.bias.squeeze())

    def loss(self, features: PairFeatures, progress: Progress) -> LossOutput:
        assert {value.dtype for value in features} == {torch.float32}
        logits = features.logit_scale * features.image @ features.text.T + features.logit_bias
        assert logits.dtype == torch.float32  # autocast is off
        signs = 2 * torch.eye(len(logits)) - 1
        loss = -nn.functional.logsigmoid(signs * logits).sum() / len(logits)
        return LossOutput(loss, {"largest": logits.detach().max()})


def pairs(size: int) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(size, 3, 5, 5, generator=generator)
    return Batch(tuple(map(str, range(size))), (images,), labels=torch.randint(64, (size,), generator=generator))


def cut(batch: Batch, count: int) -> list[Batch]:
    size = len(batch) // count
    assert batch.labels is not None
    rows = [slice(i * size, (i + 1) * size) for i in range(count)]
    return [Batch(batch.keys[r], (batch.views[0][r],), labels=batch.labels[r]) for r in rows]


def stepped(world: World, accumulation: int, precision: str, dropout: float) -> dict[int, Any]:
    """(metrics, gradients) of one step by stage; AdamW's first moment is (1 - beta1) times the gradient."""
    found = {}
    optim = OPTIM.model_copy(update={"clip_norm": None})
    for stage in STAGES:
        engine = make_engine(
            world, stage, accumulation, objective=ToyPair(dropout), optim=optim, precision=precision, global_size=24
        )
        result = engine.step(cut(pairs(24), accumulation), Progress(0, 10, 0), 1e-2)
        moments = {n: t / (1 - 0.9) for n, t in whole_state(engine).items() if n.startswith("optim/exp_avg/")}
        found[stage] = ({name: float(value) for name, value in result.metrics.items()}, moments)
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_micro_batches_give_the_gradients_of_the_whole(precision: str, tolerance: float) -> None:
    whole, parts = (run_ranks(stepped, 1, count, precision, 0.0)[0] for count in (1, 6))
    for stage in STAGES:
        assert parts[stage][0] == pytest.approx(whole[stage][0], rel=tolerance)
        assert parts[stage][1].keys() == whole[stage][1].keys() == {f"optim/exp_avg/{n}" for n, _ in NAMES}
        for name, gradient in whole[stage][1].items():
            assert gradient.norm() > 0
            assert (parts[stage][1][name] - gradient).norm() <= tolerance * gradient.norm(), (stage, name)


NAMES = list(ToyPair().named_parameters())


def dropped(world: World) -> list[float]:
    """What the second pass saw is what the first saw: <features, gradient> of both, dropout on."""
    engine = make_engine(world, 0, 4, objective=ToyPair(0.5), global_size=24)
    objective, seen = engine.objective, []
    features = objective.features  # type: ignore[attr-defined]

    def recorded(batch: Batch, progress: Progress) -> PairFeatures:
        found = features(batch, progress)
        seen.append(found.image.detach().clone())
        return found  # type: ignore[no-any-return]

    objective.features = recorded  # type: ignore[attr-defined, method-assign]
    engine.step(cut(pairs(24), 4), Progress(2, 10, 0), 1e-2)
    first, second = seen[:4], seen[4:]
    assert not torch.equal(first[0], first[1])
    return [float((a - b).abs().max()) for a, b in zip(first, second, strict=True)]


def test_both_passes_drop_the_same() -> None:
    assert run_ranks(dropped, 1)[0] == [0.0] * 4


class Kept:
    """The most bytes that backward passes waited for at one time, parameters apart."""

    def __init__(self, module: nn.Module) -> None:
        self._own = {p.data_ptr() for p in module.parameters()}
        self._live: dict[int, int] = {}
        self.peak = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() in self._own or storage.data_ptr() in self._live:
            return tensor
        at = storage.data_ptr()
        self._live[at] = storage.nbytes()
        weakref.finalize(storage, self._live.pop, at, None)
        self.peak = max(self.peak, sum(self._live.values()))
        return tensor


def peak_of(world: World, accumulation: int) -> int:
    objective = ToyPair(width=256, depth=32)  # so that its activations outweigh the matrix of similarities
    engine = make_engine(world, 0, accumulation, objective=objective, global_size=256)
    kept = Kept(objective)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        engine.step(cut(pairs(256), accumulation), Progress(0, 10, 0), 1e-2)
    return kept.peak


def test_memory_is_that_of_a_micro_batch() -> None:
    whole, parts = (run_ranks(peak_of, 1, count)[0] for count in (1, 16))
    assert parts < whole / 8
