"""Weights that are not whole are refused in every layout, with the names that differ."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.errors import CheckpointError
from pretrain.evals.sources.load import load_source
from pretrain.evals.sources.towers import load_towers
from tests.evals.layouts import ARCHITECTURE, FAULTS

# Of each layout: its weights file, and a tensor in it.
TENSORS = {
    "run/encoder": ("model.safetensors", "norm.bias"),
    "timm": ("model.safetensors", "norm.bias"),
    "weights.safetensors": ("", "norm.bias"),
    "weights.pth": ("", "norm.bias"),
    "open_clip": ("open_clip_model.safetensors", "visual.trunk.norm.bias"),
    "clip/encoder": ("open_clip_model.safetensors", "visual.ln_post.bias"),
    "hf": ("model.safetensors", "encoder.layer.3.attention.attention.key.bias"),
    "hf_clip": ("model.safetensors", "text_model.encoder.layers.1.self_attn.v_proj.bias"),
}


def break_state(state: dict[str, Tensor], name: str, fault: str) -> None:
    match fault:
        case "missing":
            del state[name]
        case "renamed":
            state["other"] = state.pop(name)
        case "shape":
            state[name] = state[name][:-1].clone()
        case "nan":
            state[name][3] = torch.nan


TOLD = {
    "missing": "1 missing: {}$",
    "renamed": "1 missing: {}; 1 unexpected: .*other",
    "shape": "1 of another shape: {}$",
    "nan": "1 not finite: {}$",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layout", TENSORS)
def test_weights_that_are_not_whole_are_refused_by_name(layouts: Path, tmp_path: Path, layout: str, fault: str) -> None:
    file, name = TENSORS[layout]
    broken = tmp_path / Path(layout).name
    if file:
        broken.mkdir()
        for path in (layouts / layout).iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        for path in broken.glob("*config.json"):  # as a tool writes it that takes no hash
            told = json.loads(path.read_text())
            told.pop("file_sha256", None)
            path.write_text(json.dumps(told))
    source = layouts / layout / file if file else layouts / layout
    state = torch.load(source)["model"] if source.suffix == ".pth" else load_file(source)
    break_state(state, name, fault)
    target = broken / file if file else broken
    torch.save({"model": state}, target) if target.suffix == ".pth" else save_file(state, target)
    ours = name.replace("visual.", "encoder.")
    with pytest.raises(CheckpointError) as error:
        load_source(str(broken), architecture=None if file else ARCHITECTURE)
    check_told(error.value, TOLD[fault].format(ours))
    if "clip" in layout and layout != "open_clip":
        with pytest.raises(CheckpointError) as error:
            load_towers(str(broken))
        check_told(error.value, TOLD[fault].format(ours))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(layouts: Path, fault: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_source(str(layouts / fault / "checkpoints" / "step_00000007"))
    found = error.value.found
    assert "norm.bias" in found
    assert {"missing": "1 missing", "renamed": "1 missing", "shape": "2 of another shape", "nan": "1 not finite"}[
        fault
    ] in found


def check_told(error: CheckpointError, pattern: str) -> None:
    assert re.search(pattern, error.found), error
