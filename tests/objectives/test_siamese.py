"""BYOL and SimSiam equal their naive twins and lightly's parts; where gradients go; what the target is and does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import heads as lightly_heads
from torch import Tensor, nn

from data_pipeline.batch import Batch
from pretrain.models.heads import batch_norm_head
from pretrain.objectives.byol.config import ByolConfig
from pretrain.objectives.byol.objective import Byol
from pretrain.objectives.config import ObjectiveConfig
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.siamese import embedding_std, negative_cosine
from pretrain.objectives.simsiam.config import SimSiamConfig
from pretrain.objectives.simsiam.objective import SimSiam
from pretrain.recipe import recipe
from pretrain.runtime.state import Progress
from tests.objectives import naive, naive_siamese

START = Progress(0, 10, 0)
SHAPE = naive.Shape(2, 3, 2, class_token=False)
VIT = recipe.Model(
    name="vit_tiny_patch16_224", image_size=6, patch_size=3,
    options={"embed_dim": 8, "depth": 1, "num_heads": 2, "class_token": False, "global_pool": "avg", "fc_norm": False},
)  # fmt: skip
RESNET = recipe.Model(name="test_resnet", image_size=32)
BYOL = ByolConfig(kind="byol", hidden_width=11, out_width=5, base_decay=0.9)


def simsiam_config(layers: int = 3, **options: Any) -> SimSiamConfig:
    return SimSiamConfig(kind="simsiam", projector_layers=layers, projector_width=7, predictor_width=5, **options)


def make(config: ObjectiveConfig, model: recipe.Model = VIT, noise: float = 0.2) -> Any:
    """With every weight off its start, the target's too, so that it is another network than the online one."""
    torch.manual_seed(0)
    objective = build_objective(model, config).double()
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(torch.randn_like(p), alpha=noise)
    return objective


def make_batch(size: int = 4, pixels: int = 6, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(size, 3, pixels, pixels, generator=generator, dtype=torch.float64) for _ in range(2)]
    return Batch(tuple(map(str, range(size))), tuple(views))


CONFIGS: dict[str, ObjectiveConfig] = {
    "byol": BYOL,
    "simsiam, 2 layers": simsiam_config(2),
    "simsiam, 3 layers": simsiam_config(3),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@every_config
def test_loss_and_gradients_equal_the_naive_twin(config: ObjectiveConfig) -> None:
    objective, batch = make(config), make_batch()
    weights = naive.weights_of(objective)
    loss = objective(batch, START).loss
    loss.backward()
    if isinstance(config, SimSiamConfig):
        expected = naive_siamese.simsiam_loss(weights, *batch.views, SHAPE, config.projector_layers)
    else:
        expected = naive_siamese.byol_loss(weights, *batch.views, SHAPE)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    naive.assert_same_gradients(objective, weights)


@every_config
def test_the_order_of_the_views_does_not_matter(config: ObjectiveConfig) -> None:
    batch = make_batch()
    losses = []
    for views in (batch.views, batch.views[::-1]):
        objective = make(config)
        loss = objective(Batch(batch.keys, views), START).loss
        loss.backward()
        losses.append((loss.item(), objective.predictor[0].weight.grad))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-12)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-9, atol=1e-12)


def test_gradients_reach_the_online_network_and_never_the_target() -> None:
    objective = make(BYOL, RESNET)
    objective(make_batch(pixels=32), START).loss.backward()
    for name, p in objective.named_parameters():
        assert p.requires_grad != name.startswith("target.")
        assert (p.grad is None) == name.startswith("target."), name
    assert {name for name, _ in objective.named_parameters() if name.startswith("encoder.")}


def test_the_target_starts_as_the_online_network_and_is_another() -> None:
    torch.manual_seed(0)
    objective = build_objective(RESNET, BYOL)
    state = objective.state_dict()
    for name, value in state.items():
        if name.startswith("target."):
            online = state[name.removeprefix("target.")]
            assert torch.equal(value, online)
            assert value.data_ptr() != online.data_ptr()
    assert sum(name.startswith("target.") for name in state) == sum(
        name.startswith(("encoder.", "projector.")) for name in state
    )


def test_the_target_s_running_statistics_are_those_of_its_own_passes() -> None:
    """Of each view in turn; the online network's and the target's move apart with their weights."""
    objective, batch = make(BYOL, RESNET), make_batch(pixels=32)
    assert isinstance(objective, Byol)
    norm: Any = objective.target.projector[1]
    expected = norm.running_mean.clone()
    with torch.no_grad():
        for view in batch.views:
            rows = objective.target.projector[0](objective.target.encoder(view))
            expected = 0.9 * expected + 0.1 * rows.mean(0)
    objective = make(BYOL, RESNET)
    objective(batch, START)
    norm = objective.target.projector[1]
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-9, atol=1e-12)
    assert norm.num_batches_tracked == 2
    assert not torch.allclose(norm.running_mean, objective.projector[1].running_mean)


@pytest.mark.parametrize("step", [0, 1, 37, 99, 100, 250])
def test_the_target_s_decay_follows_half_a_cosine(step: int) -> None:
    teachers = make(BYOL).teachers(Progress(step, 100, 0))
    expected = 1 - (1 - 0.9) * (math.cos(math.pi * min(step, 100) / 100) + 1) / 2
    assert [teacher.decay for teacher in teachers] == pytest.approx([expected] * 2, abs=1e-15)
    if step == 0:
        assert teachers[0].decay == pytest.approx(0.9)


def test_pairs_of_the_target_have_the_same_parameters_by_name() -> None:
    objective = make(BYOL, RESNET)
    teachers = objective.teachers(START)
    followed = [name for teacher in teachers for name, _ in teacher.target.named_parameters()]
    assert followed == [name for teacher in teachers for name, _ in teacher.online.named_parameters()]
    assert len(followed) == len(list(objective.target.parameters()))


def test_the_predictor_of_simsiam_keeps_its_learning_rate_where_asked() -> None:
    fixed, decayed = make(simsiam_config()), make(simsiam_config(fixed_predictor_lr=False))
    assert isinstance(fixed, SimSiam)
    assert fixed.constant_lr_modules() == [fixed.predictor]
    assert decayed.constant_lr_modules() == []
    assert make(BYOL).constant_lr_modules() == []


@every_config
def test_embedding_std_tells_spread_from_collapse(config: ObjectiveConfig) -> None:
    objective = make(config)
    batch = make_batch(64)
    spread = objective(batch, START).metrics["embedding_std"]
    with torch.no_grad():
        for p in objective.encoder.parameters():
            p.zero_()  # every image has the same features
    objective.eval()  # in training mode batch norm would divide rounding by rounding
    assert objective(batch, START).metrics["embedding_std"] < 1e-6
    assert spread > 0.3


def test_embedding_std_of_known_embeddings() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(4096, 32, generator=generator)
    assert embedding_std(even, across_ranks=False).item() == pytest.approx(1, abs=0.01)
    assert embedding_std(even * torch.rand(4096, 1, generator=generator), across_ranks=False).item() == pytest.approx(
        1, abs=0.01
    )
    assert embedding_std(torch.ones(8, 3), across_ranks=False).item() == 0
    assert embedding_std(even[:1], across_ranks=False).item() == 0
    half = embedding_std(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), across_ranks=False)
    assert half.item() == pytest.approx((1 + 0) / 2 * 2**0.5)


def test_negative_cosine_refuses_rows_that_do_not_pair() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        negative_cosine(torch.zeros(2, 3), torch.zeros(3, 2))


class Lightly(nn.Module):
    """The same objective out of lightly's heads and loss, on the same encoder."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.encoder = objective.encoder
        if isinstance(objective, Byol):
            width = objective.encoder.head_hidden_size
            self.projector = filled(lightly_heads.BYOLProjectionHead(width, 11, 5), objective.projector)
            self.predictor = filled(lightly_heads.BYOLPredictionHead(5, 11, 5), objective.predictor)
            self.target = filled(lightly_heads.BYOLProjectionHead(width, 11, 5), objective.target.projector)
        else:
            assert isinstance(objective, SimSiam)
            width = objective.encoder.head_hidden_size
            self.projector = filled(lightly_heads.SimSiamProjectionHead(width, 7, 7), objective.projector)
            self.predictor = filled(lightly_heads.SimSiamPredictionHead(7, 5, 7), objective.predictor)

    def forward(self, batch: Batch, target_encoder: nn.Module | None) -> Tensor:
        """lightly's sum, which is half of BYOL's without its constant."""
        criterion, losses = NegativeCosineSimilarity(), []
        for shown, predicted in (batch.views, batch.views[::-1]):
            prediction = self.predictor(self.projector(self.encoder(shown)))
            if target_encoder is None:
                target = self.projector(self.encoder(predicted))
            else:
                target = self.target(target_encoder(predicted))
            losses.append(criterion(prediction, target.detach()))
        return (losses[0] + losses[1]) / 2


def filled(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    """lightly's head with our weights; a bias that ours has not is zero."""
    theirs = theirs.double()
    state = {f"layers.{name}": value for name, value in ours.state_dict().items()}
    own = theirs.state_dict()
    extra = own.keys() - state.keys()
    assert state.keys() <= own.keys()
    assert all(name.endswith("bias") for name in extra)
    theirs.load_state_dict({**state, **{name: torch.zeros_like(own[name]) for name in extra}})
    return theirs


@pytest.mark.parametrize("kind", ["byol", "simsiam, 3 layers"])
def test_loss_and_gradients_equal_lightly_s(kind: str) -> None:
    """A second oracle: its loss and its heads, with our weights; on a ResNet, whose batch norm sees view by view."""
    objective, batch = make(CONFIGS[kind], RESNET), make_batch(pixels=32)
    theirs = Lightly(make(CONFIGS[kind], RESNET))
    target = objective.target.encoder if isinstance(objective, Byol) else None
    loss = objective(batch, START).loss
    loss.backward()
    expected = theirs(batch, target)
    if isinstance(objective, Byol):
        expected = 4 + 4 * expected
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = dict(theirs.encoder.named_parameters())
    assert gradients
    for name, p in objective.encoder.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name].grad, rtol=1e-9, atol=1e-11, msg=name)


def test_published_widths_are_lightly_s() -> None:
    """By the shapes of lightly's defaults, which are the papers'."""
    byol, simsiam = ByolConfig(kind="byol"), SimSiamConfig(kind="simsiam")
    pairs = [
        (lightly_heads.BYOLProjectionHead(), [2048, byol.hidden_width, byol.out_width], "linear"),
        (lightly_heads.BYOLPredictionHead(), [byol.out_width, byol.hidden_width, byol.out_width], "linear"),
        (
            lightly_heads.SimSiamProjectionHead(),
            [2048, *[simsiam.projector_width] * simsiam.projector_layers],
            "normed",
        ),
        (
            lightly_heads.SimSiamPredictionHead(),
            [simsiam.projector_width, simsiam.predictor_width, simsiam.projector_width],
            "biased",
        ),
    ]
    for theirs, widths, last in pairs:
        ours = batch_norm_head(widths, last=last)  # type: ignore[arg-type]
        shapes = {f"layers.{name}": value.shape for name, value in ours.state_dict().items()}
        expected = {name: value.shape for name, value in theirs.state_dict().items()}
        if last == "linear":
            del expected["layers.3.bias"]  # the authors' code has none
        assert shapes == expected
