"""A sum of objectives is the sum of their losses over one encoder, which has one name and one start."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec, MaskSpec
from data_pipeline.errors import InputError, RecipeError
from pretrain.objectives.byol.config import ByolConfig
from pretrain.objectives.config import ObjectiveConfig
from pretrain.objectives.contract import LossOutput, Objective, Teacher
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.mae.config import MaeConfig
from pretrain.objectives.masked import find_painter
from pretrain.objectives.simmim.config import SimmimConfig
from pretrain.objectives.simmim.objective import Simmim
from pretrain.objectives.sum.config import SumConfig, Term
from pretrain.objectives.sum.objective import Sum, joint_needs
from pretrain.objectives.supervised.config import SupervisedConfig
from pretrain.recipe import recipe
from pretrain.runtime.state import Progress
from tests.objectives import naive
from tests.recipe.recipes import changed, load

START = Progress(0, 1, 0)
VIT = recipe.Model(
    name="vit_tiny_patch16_224",
    image_size=8,
    patch_size=2,
    options={"embed_dim": 8, "depth": 1, "num_heads": 2, "global_pool": "avg", "fc_norm": False, "class_token": False},
)
SUPERVISED = SupervisedConfig(kind="supervised", num_classes=4, label_smoothing=0.1)
SIMMIM = SimmimConfig(kind="simmim", mask_patch=4)
MAE = MaeConfig(kind="mae", decoder_width=8, decoder_depth=1, decoder_heads=2)
BYOL = ByolConfig(kind="byol", hidden_width=8, out_width=4)


def make(*terms: ObjectiveConfig, weights: tuple[float, ...] = (1.0, 1.0), model: recipe.Model = VIT) -> Sum:
    torch.manual_seed(0)
    weighted = tuple(Term(weight=w, objective=term) for w, term in zip(weights, terms, strict=True))
    objective = build_objective(model, SumConfig(kind="sum", terms=weighted))
    assert isinstance(objective, Sum)
    return objective


def make_batch(needs: BatchSpec, size: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(1)
    assert needs.mask is not None
    return Batch(
        keys=tuple(map(str, range(size))),
        views=tuple(torch.randn(size, 3, 8, 8, generator=generator) for _ in range(needs.num_views)),
        labels=torch.randint(4, (size,), generator=generator),
        masks=torch.rand(size, needs.mask.num_patches, generator=generator).argsort(1) < needs.mask.num_hidden,
    )


def of_term(weights: naive.Weights, name: str) -> naive.Weights:
    """The same leaves, under the names that the term alone would give them."""
    return {key.removeprefix(f"terms.{name}."): value for key, value in weights.items()}


def test_loss_and_gradients_equal_the_naive_twins_weighted() -> None:
    objective = make(SUPERVISED, SIMMIM, weights=(0.7, 2.5)).double()
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    batch = make_batch(objective.needs)
    batch = Batch(batch.keys, (batch.views[0].double(),), batch.labels, masks=batch.masks)
    weights = naive.weights_of(objective)
    shape = naive.Shape(4, 2, 2, class_token=False)

    output = objective(batch, START)
    output.loss.backward()
    assert batch.labels is not None
    assert batch.masks is not None
    targets = torch.eye(4, dtype=torch.float64)[batch.labels]
    images = batch.views[0]
    classified = naive.classifier_loss(of_term(weights, "supervised"), images, targets, [1.0, 1.0], 0.1, shape)
    painted = naive.simmim_loss(of_term(weights, "simmim"), images, batch.masks, shape, 4)
    expected = 0.7 * classified + 2.5 * painted
    expected.backward()  # type: ignore[no-untyped-call]

    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert output.metrics["supervised/loss"].item() == pytest.approx(classified.item(), rel=1e-12)
    assert output.metrics["simmim/loss"].item() == pytest.approx(painted.item(), rel=1e-12)
    assert "supervised/top1" in output.metrics
    naive.assert_same_gradients(objective, weights)


@pytest.mark.parametrize("terms", [(SUPERVISED, SIMMIM), (BYOL, MAE), (SUPERVISED, MAE)], ids=["simmim", "byol", "mae"])
def test_every_tensor_has_one_name_and_the_encoder_its_own(terms: tuple[ObjectiveConfig, ...]) -> None:
    objective = make(*terms)
    names = [name for name, _ in objective.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(p) for p in objective.parameters()})
    encoder = {f"encoder.{name}" for name in objective.encoder.state_dict()}
    assert {name for name in objective.state_dict() if name.startswith("encoder.")} == encoder
    assert all(name.startswith(("encoder.", *(f"terms.{t.kind}." for t in terms))) for name in objective.state_dict())
    assert all(term.encoder is objective.encoder for term in objective.terms.values())


def test_the_last_term_that_initialises_the_encoder_has_its_way_and_teachers_start_from_it() -> None:
    objective = make(BYOL, MAE)
    alone = build_objective(VIT, MAE)
    assert torch.equal(objective.encoder.pos_embed, alone.encoder.pos_embed), "sine and cosine, as MAE has them"
    teachers = objective.teachers(Progress(5, 10, 0))
    assert teachers == objective.terms["byol"].teachers(Progress(5, 10, 0))  # type: ignore[operator]
    assert len(teachers) == 2
    for target, online, _ in teachers:
        assert all(torch.equal(a, b) for a, b in zip(target.parameters(), online.parameters(), strict=True))
    assert teachers[0].online is objective.encoder
    assert objective.needs.num_views == 2
    objective(make_batch(objective.needs, 4), START).loss.backward()
    assert all(p.grad is None for p in teachers[0].target.parameters())


class Following(Objective):
    """With a teacher that follows at a rate of its own."""

    coupling = "pairs of samples"

    def __init__(self, encoder: nn.Module, image_size: int, config: MaeConfig | SimmimConfig) -> None:
        super().__init__()
        self.needs = BatchSpec(image_size)
        self.encoder, self.teacher, self.decay = encoder, copy.deepcopy(encoder), config.mask_ratio

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        loss: Tensor = self.encoder(batch.views[0]).square().mean()
        return LossOutput(loss)

    def teachers(self, progress: Progress) -> list[Teacher]:
        return [Teacher(self.teacher, self.encoder, self.decay)]

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        return [(p, -9.0, 9.0) for p in self.encoder.parameters()]


def test_what_terms_declare_is_declared_by_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each teacher follows at its own rate."""
    monkeypatch.setattr("pretrain.objectives.sum.objective.build_on", Following)
    terms = (MAE.model_copy(update={"mask_ratio": 0.9}), SIMMIM.model_copy(update={"mask_ratio": 0.5}))
    objective = make(*terms, model=VIT)
    assert [teacher.decay for teacher in objective.teachers(START)] == [0.9, 0.5]
    assert objective.coupling == "pairs of samples"
    assert len(objective.bounds()) == 2 * len(list(objective.encoder.parameters()))
    monkeypatch.undo()
    assert make(SUPERVISED, SIMMIM).coupling == ""


def test_needs_are_joined_and_conflicts_named() -> None:
    first = BatchSpec(8, num_classes=3)
    second = BatchSpec(8, num_views=2, mask=MaskSpec(4, 3))
    assert joint_needs({"a": first, "b": second}) == BatchSpec(8, num_views=2, num_classes=3, mask=MaskSpec(4, 3))
    with pytest.raises(InputError, match=r"objective\.terms: .*same num_classes.*3 for a, 4 for b"):
        joint_needs({"a": first, "b": BatchSpec(8, num_classes=4)})
    with pytest.raises(InputError, match=r"same mask.*MaskSpec\(num_patches=16, num_hidden=12\) for mae"):
        make(MAE, SIMMIM)


def test_it_paints_where_a_term_does() -> None:
    assert isinstance(find_painter(make(SUPERVISED, SIMMIM)), Simmim)
    assert find_painter(build_objective(VIT, SUPERVISED)) is None


@pytest.mark.parametrize(
    ("terms", "told"),
    [
        ([{"objective": {"kind": "mae"}}], "objective.terms: expected a list of at least 2"),
        (
            [{"objective": {"kind": "mae"}}, {"objective": {"kind": "sum", "terms": []}}],
            "objective.terms.1.objective.kind: expected one of",
        ),
        ([{"objective": {"kind": "mae"}}, {"weight": 2, "objective": {"kind": "mae"}}], "terms of different kinds"),
        ([{"weight": 0, "objective": {"kind": "mae"}}, {"objective": {"kind": "simmim"}}], "terms.0.weight: expected"),
    ],
    ids=["one", "nested", "twice", "weightless"],
)
def test_sums_that_are_none_are_refused(tmp_path: Path, terms: list[object], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, changed("objective", {"kind": "sum", "terms": terms}))
    assert told in str(caught.value)
