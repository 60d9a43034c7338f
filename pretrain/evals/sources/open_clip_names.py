"""Towers out of open_clip by name: published weights (NAME:TAG), those of a file, or fresh ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from open_clip import get_pretrained_cfg
from open_clip.pretrained import download_pretrained, list_pretrained_tags_by_model

from data_pipeline.batch import TokenSpec
from data_pipeline.errors import InputError
from data_pipeline.messages import nearest
from pretrain.evals.sources.tags import note_on_tags
from pretrain.models.encoder_folders import EncoderConfig
from pretrain.models.foreign.fitting import note_on_ignored
from pretrain.models.seeded import seeded
from pretrain.models.tower_folders import open_clip_by_name
from pretrain.models.towers import TwoTowers
from pretrain.models.weights_files import read_tensors


class OpenClipSource(NamedTuple):
    module: TwoTowers
    config: EncoderConfig
    tokens: TokenSpec
    description: dict[str, object]
    notes: tuple[str, ...]


def from_open_clip(
    spec: str, *, random_init: bool, seed: int, weights: Path | None, ignore: tuple[str, ...] = ()
) -> OpenClipSource:
    """Both towers on the CPU.

    Args:
        spec: NAME or NAME:TAG. A tag has a preprocessing and an activation of its own, which hold for a file and for
            fresh weights too; without either its weights are downloaded, unless open_clip's cache has them.
        random_init: fresh weights.
        seed: of the fresh weights.
        weights: a local file, safetensors or a PyTorch file of tensors.
        ignore: patterns of its tensors that are left out where the towers do not need them.

    Raises:
        InputError: an unknown name or tag, arguments that do not go together, or weights that cannot be had.
        CheckpointError: damaged weights, or not exactly those of the towers.
    """
    name, _, tag = spec.partition(":")
    if (weights is not None and random_init) or not (weights or random_init or tag):
        raise InputError(
            where=spec,
            expected="a local file of weights, random initialization, or the tag of published weights",
            found="the first two" if random_init else "none of them",
            fix=f"Add one of them: --weights FILE, --random-init, or {name}:TAG.",
        )
    published = _published(name, tag) if tag else None
    description: dict[str, object] = {"architecture": name, "source": spec, "kind": "open_clip"}
    if random_init:
        description["init_seed"] = seed
        state, where = None, spec
    else:
        path = weights or _download(spec, published or {})
        description["weights"] = path.name if weights is None else str(weights)
        state, where = read_tensors(path), str(path)
    loaded, ignored = seeded(
        seed, lambda: open_clip_by_name(name, state, where=where, published=published, ignore=ignore)
    )
    notes = _of_other_tags(name, loaded[1]) if weights is not None and not tag else ()
    if ignored:
        description["weights_ignored"] = {"patterns": list(ignore), "names": ignored}
        notes += (note_on_ignored(ignored),)
    return OpenClipSource(*loaded, description, notes)


def _of_other_tags(name: str, config: EncoderConfig) -> tuple[str, ...]:
    """A file does not say whose preprocessing and activation it wants."""
    pixels = config.preprocessing
    taken = {
        "mean": pixels.mean,
        "std": pixels.std,
        "interpolation": pixels.interpolation,
        "resize_mode": "squash" if pixels.eval_resize == "square" else "shortest",
        "quick_gelu": bool(config.model_args.get("quick_gelu")),
    }
    used = {}
    for tag in list_pretrained_tags_by_model(name):
        own = {key: value for key, value in get_pretrained_cfg(name, tag).items() if key in taken and value is not None}
        used[tag] = {**taken, "quick_gelu": False, **own}
    return tuple(note_on_tags(f"{name}:", taken, used))


def _published(name: str, tag: str) -> dict[str, Any]:
    found: dict[str, Any] = get_pretrained_cfg(name, tag)
    if not found:
        tags = list_pretrained_tags_by_model(name)
        raise InputError(
            where=f"{name}:{tag}",
            expected=f"a tag of the weights that open_clip has for {name}",
            found=tag,
            fix=nearest(tag, tags, cutoff=0) or "Nearest: none.",
        )
    return found


def _download(spec: str, published: dict[str, Any]) -> Path:
    try:
        return Path(download_pretrained(published))
    except Exception as error:  # whatever the hub or the network raises
        home = published.get("hf_hub") or published.get("url")
        raise InputError(
            where=spec,
            expected="published weights that can be had",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            fix=f"Without a network, bring the file from {home} and name it: {spec} --weights FILE.",
        ) from error
