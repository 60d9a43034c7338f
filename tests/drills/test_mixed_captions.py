"""A run over a mixture of captioned shards, stopped and gone on with: the losses are those of one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.test_mixed_captions import make_sources, run, with_data
from tests.runs import losses


def test_it_is_resumed_at_another_number_of_ranks(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    path = with_data(tmp_path / "r.yaml", make_sources(tmp_path_factory))
    log = run(path, tmp_path / "whole", 1)
    assert "39 samples" in log
    expected = losses(tmp_path / "whole")
    assert expected[6] < expected[1]
    run(path, tmp_path / "cut", 2, max_steps=4)
    run(path, tmp_path / "cut", 1)
    found = losses(tmp_path / "cut")
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        torch.testing.assert_close(found[step], loss, rtol=1e-5, atol=0)
