"""Encoders out of timm: an architecture by name, with published weights, those of a file, or fresh ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data_pipeline import messages
from data_pipeline.errors import CheckpointError, InputError
from data_pipeline.messages import short_list
from data_pipeline.samples.preprocessing import Preprocessing
from pretrain.evals.encoder import Encoder
from pretrain.evals.sources.tags import note_on_tags
from pretrain.models.foreign.fitting import advice, joined_chunks, note_on_ignored, without_ignored
from pretrain.models.input_size import check_every_pixel_is_seen, set_image_size
from pretrain.models.seeded import seeded
from pretrain.models.strict_loading import FIX, load_strictly
from pretrain.models.weights_files import WHOLE, Part, read_tensors

# With these timm loads what fits of published weights and leaves the rest at random, or the module is no longer one
# from RGB images to features.
_REFUSED = ("num_classes", "in_chans", "pretrained_strict")


# Options to which timm interpolates published weights.
_SIZES = ("img_size", "patch_size", "window_size")


@dataclass(frozen=True)
class Architecture:
    """A timm model as it is to be built.

    Attributes:
        name: timm's, with or without a tag of published weights.
        image_size: pixels; None: what it was made for.
        options: further arguments of its constructor (patch_size, depth, global_pool, ...).
    """

    name: str
    image_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, **arguments: Any) -> nn.Module:
        """
        Raises:
            InputError: timm has no such name (the nearest are given), or refuses the options, or they are refused here.
        """
        if not timm.is_model(self.name):
            raise InputError(
                where="--model", expected="the name of a timm model", found=self.name, fix=nearest(self.name)
            )
        for option in _REFUSED:
            if option in self.options:
                raise InputError(
                    where=f"--option {option}",
                    expected="none, as an encoder is judged without a classifier, on RGB images, with whole weights",
                    found=str(self.options[option]),
                    fix="Leave it out.",
                )
        if self.image_size is not None and timm.models.get_pretrained_cfg_value(self.name, "fixed_input_size"):
            arguments["img_size"] = self.image_size
        try:
            module: nn.Module = timm.create_model(self.name, **self.options, **arguments)
        except Exception as error:  # whatever a constructor, the hub or the network raises
            wanted = "published weights that can be had and fit" if arguments.get("pretrained") else "options it takes"
            raise InputError(where=self.name, expected=wanted, found=f"{type(error).__name__}: {error}") from error
        return module


def from_timm(architecture: Architecture, *, random_init: bool, seed: int) -> Encoder:
    """Published weights, downloaded by timm unless its cache has them; or fresh ones.

    Raises:
        InputError: there are none, they cannot be had, or do not fit the options.
    """
    description: dict[str, object] = {"source": architecture.name, "kind": "timm"}
    if random_init:
        return _fresh(architecture, seed, description)
    # With its own classifier timm loads strictly; told to leave the classifier out, it would not.
    module = architecture.build(pretrained=True)
    module.reset_classifier(0)  # type: ignore[operator]
    with torch.device("meta"):  # all but the sizes as asked, so that only what timm resizes has another shape
        kept = {key: value for key, value in architecture.options.items() if key not in _SIZES}
        published = Architecture(architecture.name, None, kept).build()
    if resized := _resized(module, published):
        description["resized_positions"] = resized
    if (grid := _positions(module)) != (own := _positions(published)):
        description["position_embedding"] = {"from": own, "to": grid, "how": "as timm resizes it when it loads"}
    return _encoder(module, architecture, "encoder", description)


def from_file(path: Path, architecture: Architecture, *, random_init: bool, seed: int, part: Part = WHOLE) -> Encoder:
    """The weights of a file, all of them but a classifier's; or fresh ones.

    They are of the architecture's image size; or of a ViT's own, and their position embedding is interpolated.

    Raises:
        InputError: the architecture cannot be built.
        CheckpointError: no file of tensors, or not exactly those of the architecture.
    """
    description: dict[str, object] = {"source": str(path), "kind": "weights file"}
    if random_init:
        return _fresh(architecture, seed, description)
    module = seeded(seed, lambda: architecture.build(num_classes=0))
    own = module.state_dict()
    whole = read_tensors(path, part.key)
    named = {name.removeprefix(part.prefix): t for name, t in whole.items() if name.startswith(part.prefix)}
    num_left_out = len(whole) - len(named)
    joined = joined_chunks(named, own)
    heads = _config(module).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    left_out = sorted(name for name in joined if name.rpartition(".")[0] in heads)
    known = [*own, *left_out]
    fix = advice(whole, own, heads, part.prefix) or FIX
    if not named:
        raise CheckpointError(
            where=str(path), expected=f"names that begin with {part.prefix!r}",
            found=f"others, such as {short_list(list(whole), 3)}", fix=fix,
        )  # fmt: skip
    state, ignored = without_ignored(joined, known, part.ignore, option="--weights-ignore", where=str(path))
    if part != WHOLE:
        description["weights_part"] = {"key": part.key, "prefix": part.prefix, "left_out": num_left_out}
    if part.ignore:
        description["weights_ignored"] = {"patterns": list(part.ignore), "names": ignored}
    if joined.keys() != named.keys():
        description["block_chunks"] = "joined: blocks.CHUNK.N of the file is blocks.N"
    if moved := _made_for_own_size(module, architecture, state):
        module = moved
    load_strictly(module, {name: state[name] for name in state if name not in left_out}, where=str(path), fix=fix)
    description["classifier_left_out"] = left_out
    if moved and (told := set_image_size(module, _config(module)["input_size"][-1], architecture.image_size or 0)):
        description["position_embedding"] = told
    encoder = _encoder(module, architecture, "encoder", description)
    notes = _of_other_tags(architecture.name, _config(module))
    if ignored:
        notes += (note_on_ignored(ignored),)
    if num_left_out:
        notes += (f"of the weights file {num_left_out} tensors do not begin with {part.prefix}: left out",)
    return replace(encoder, notes=notes)


def _of_other_tags(name: str, taken: Mapping[str, Any]) -> tuple[str, ...]:
    """A file does not say whose preprocessing it wants: that of the name's first tag is a guess."""
    if "." in name:
        return ()
    tags = [tagged.partition(".")[2] for tagged in timm.list_models(f"{name}.*", pretrained=True)]
    published = {tag: timm.get_pretrained_cfg(f"{name}.{tag}").to_dict() for tag in tags}
    keys = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
    used = {tag: {key: own.get(key) for key in keys} for tag, own in published.items()}
    return tuple(note_on_tags(f"{name}.", {key: taken.get(key) for key in keys}, used))


def _made_for_own_size(module: nn.Module, architecture: Architecture, state: Mapping[str, Tensor]) -> nn.Module | None:
    """The ViT at timm's size for the name, where the weights have its positions and not those of the size asked for."""
    if architecture.image_size is None or not isinstance(module, VisionTransformer):
        return None
    positions = state.get("pos_embed")
    if positions is None or module.pos_embed is None or positions.shape == module.pos_embed.shape:
        return None
    own = seeded(0, lambda: replace(architecture, image_size=None).build(num_classes=0))
    return own if own.pos_embed.shape == positions.shape else None


def nearest(name: str) -> str:
    """A sentence with timm's names that are most like `name`; empty where none is like it."""
    return messages.nearest(name, timm.list_models(), kind="timm models", cutoff=0.6)


def checked(preprocessing: Preprocessing, *, where: str) -> Preprocessing:
    """The same preprocessing, if evaluation views can be made so.

    Raises:
        InputError: an interpolation that evaluation views do not have.
    """
    if preprocessing.interpolation not in ("bilinear", "bicubic"):
        found = str(preprocessing.interpolation)
        raise InputError(where=where, expected="bilinear or bicubic interpolation", found=found)
    return preprocessing


def _fresh(architecture: Architecture, seed: int, description: Mapping[str, object]) -> Encoder:
    module = seeded(seed, lambda: architecture.build(num_classes=0))
    return _encoder(module, architecture, "random", {**description, "init_seed": seed})


def _encoder(module: nn.Module, architecture: Architecture, tag: str, description: Mapping[str, object]) -> Encoder:
    """With the preprocessing that timm has for the name; raises InputError where the size asked for is not all seen."""
    config = _config(module)
    if architecture.image_size is not None:
        check_every_pixel_is_seen(module, architecture.image_size)
    mode = config.get("crop_mode", "center")
    if mode not in ("center", "squash"):
        raise InputError(
            where=architecture.name, expected="a model for centre crops or squashed images", found=f"crop_mode {mode}"
        )
    preprocessing = Preprocessing(
        image_size=architecture.image_size or config["input_size"][-1],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        eval_crop=config["crop_pct"],
        eval_resize="square" if mode == "squash" else "shorter",
    )
    return Encoder(
        module,
        checked(preprocessing, where=architecture.name),
        tag=tag,
        description={"architecture": architecture.name, "options": dict(architecture.options), **description},
    )


def _positions(module: nn.Module) -> list[int] | None:
    """The grid of the position embedding; None: it has none, or nothing of a grid."""
    grid: tuple[int, int] | None = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    return list(grid) if grid is not None and getattr(module, "pos_embed", None) is not None else None


def _resized(module: nn.Module, published: nn.Module) -> dict[str, object]:
    """The shapes of what holds positions, absolute or relative, where they are not those of the published weights."""
    own, now = published.state_dict(), module.state_dict()
    return {
        name: {"from": list(own[name].shape), "to": list(now[name].shape)}
        for name in sorted(own.keys() & now.keys())
        if ("relative_position" in name or name.endswith("pos_embed")) and own[name].shape != now[name].shape
    }


def _config(module: nn.Module) -> dict[str, Any]:
    config: dict[str, Any] = module.pretrained_cfg  # type: ignore[assignment]
    return config
