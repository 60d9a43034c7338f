"""As test_fuzz.py, of a checkpoint's files: with the hashes that `COMPLETE` keeps, and past them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoints.checkpoint import complete_checkpoints, digests, module_state, read_state
from tests.checkpoints.test_checkpoint import train_and_save
from tests.drills.test_fuzz import FUZZ, Tries, bounded_memory, mutated
from tests.ranks import run_ranks

__all__ = ["bounded_memory"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(train_and_save, 1, folder, 1, 1)
    (path,) = complete_checkpoints(folder)
    return path


def test_checkpoints(sound: Path) -> None:
    contents = {path.name: path.read_bytes() for path in sound.iterdir()}
    headers = {name: content[:2000] for name, content in contents.items()}
    assert {"COMPLETE", "state.json"} <= contents.keys()
    tries = Tries()

    @settings(FUZZ, max_examples=300)
    @given(st.sampled_from(sorted(contents)), st.data())
    def try_one(name: str, data: st.DataObject) -> None:
        path = sound / name
        path.write_bytes(data.draw(mutated(headers[name])) + contents[name][2000:])
        try:
            tries(lambda: complete_checkpoints(sound.parent))
            tries(lambda: read_state(sound))
            tries(lambda: digests(sound))
            tries(lambda: module_state(sound, "param/"))
            tries(lambda: module_state(sound, "param/", verified=True))
        finally:
            path.write_bytes(contents[name])

    try_one()
    assert tries.say_something, tries
