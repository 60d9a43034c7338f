"""Chains: checked as a whole first, passed over where done, gone on with where killed, refused where changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.durable import append_line
from data_pipeline.errors import InputError, RecipeError, RunError
from launch import cli
from launch.chains import check as chain_check
from launch.chains import run as chain_module
from launch.chains.config import load_chain
from launch.chains.folder import ChainFolder
from launch.commands.chain import evaluation_commands
from pretrain.runtime.failure import note_failure
from pretrain.runtime.signals import STOPPED
from tests.runs import losses, train, write_recipe
from tests.shards import write_shards

CHAINS = Path(__file__).resolve().parents[2] / "configs" / "chains"
SUPERVISED = {"kind": "supervised", "num_classes": 3}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", 60)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run_chain(path: Path, out: Path, num_ranks: int) -> int:
    return chain_module.run_chain(path, out, num_ranks, evaluation_commands)


def tree_of(folder: Path, shards: Path, **changes: Any) -> dict[str, Any]:
    """A teacher on few labels, its labels, a student on those; and its recipe beside."""
    write_recipe(folder / "r.yaml", shards, objective=SUPERVISED, schedule={"steps": 4})
    data = [
        {"path": str(shards), "select": "${few}"},
        {"path": str(shards), "labels": "${labels}", "select": "${chosen}", "weight": 2},
    ]
    stages: dict[str, dict[str, Any]] = {
        "few": {"select": {"source": str(shards), "per_class": 5}},
        "teacher": {"train": "r.yaml", "set": {"data.train": [data[0]]}},
        "labels": {"label": {"shards": str(shards), "teacher": "${teacher}", "top_k": 2}},
        "chosen": {"select": {"source": "${labels}", "threshold": 0.1, "per_class": 20, "without": "${few}"}},
        "student": {"train": "r.yaml", "set": {"data.train": data, "data.shuffle_window": 8}},
    }
    for name, change in changes.items():
        stages[name] = change
    return {"name": "tiny", "stages": [{"name": name, **stage} for name, stage in stages.items()]}


def write_chain(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "chain.yaml"
    path.write_text(json.dumps(tree))  # which is YAML, and writes an equal value twice
    return path


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is given a command; stages run in forks of this process, which start in a second."""
    names: list[str] = []

    def run(words: list[str]) -> int:
        if words[0] == "train":
            out = Path(words[words.index("--out") + 1])
            names.append(out.name)
            overrides = [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
            train(Path(words[1]), out, int(words[words.index("--nproc") + 1]), *overrides)
            return 0
        names.append(Path(words[3]).stem)
        monkeypatch.setattr(sys, "argv", ["pretrain", *words])
        try:
            return cli.main()
        except SystemExit as end:
            return int(end.code or 0)

    monkeypatch.setattr(chain_module, "run_command", run)
    return names


def test_stages_follow_one_another_once(
    tmp_path: Path, shards: Path, out: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_chain(tmp_path, tree_of(tmp_path, shards))
    assert run_chain(path, out, 1) == 0
    assert ran == ["few", "teacher", "labels", "chosen", "student"]
    assert sorted(losses(out / "student")) == [1, 2, 3, 4]
    append_line(out / "student" / "metrics.jsonl", {"step": 4, "val/loss": 1.5, "val/top1": 0.25})
    ran.clear()
    assert run_chain(path, out, 2) == 0, "with another number of processes too"
    assert "student: val/loss 1.5000, val/top1 25.00%" in capsys.readouterr().out
    assert ran == []
    (out / "chosen.select").unlink()
    with pytest.raises(InputError, match=r"chosen\.select"):
        run_chain(path, out, 1)
    (out / "chain" / "chosen.json").unlink()
    assert run_chain(path, out, 1) == 0
    assert ran == ["chosen"], "it is made again as it was, and what was made of it holds"


def test_a_stage_that_failed_or_was_stopped_ends_the_chain_with_its_words(
    tmp_path: Path, shards: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: list[str]) -> int:
        folder = Path(words[words.index("--out") + 1])
        folder.mkdir(parents=True)
        note_failure(folder, "too many samples are bad.")
        return 1

    path = write_chain(tmp_path, {**tree_of(tmp_path, shards), "stages": [{"name": "teacher", "train": "r.yaml"}]})
    monkeypatch.setattr(chain_module, "run_command", fail)
    with pytest.raises(RunError, match=r"found exit status 1 \(too many samples are bad\)"):
        run_chain(path, out, 1)
    monkeypatch.setattr(chain_module, "run_command", lambda words: STOPPED)
    assert run_chain(path, out, 1) == STOPPED, "and no stage after it is begun"


def test_a_stage_whose_inputs_changed_is_refused(tmp_path: Path, shards: Path, out: Path, ran: list[str]) -> None:
    tree = tree_of(tmp_path, shards)
    run_chain(write_chain(tmp_path, tree), out, 1)
    ran.clear()

    def refused(match: str, change: Callable[[dict[str, Any]], None]) -> None:
        other = json.loads(json.dumps(tree))
        change(other)
        with pytest.raises(InputError, match=match):
            run_chain(write_chain(tmp_path, other), out, 1)
        assert ran == []

    refused("stage few", lambda t: t["stages"][0]["select"].update(per_class=6))
    refused("stage teacher.*optim.base_lr", lambda t: t["stages"][1]["set"].update({"optim.base_lr": 0.5}))
    refused("stage chosen", lambda t: t["stages"][3]["select"].update(threshold=0.2))
    refused("stage student", lambda t: t["stages"][4]["set"]["data.train"][1].update(weight=3))
    # Another result of an earlier stage: all that was made of it is refused.
    labels, record = out / "labels" / "labels.json", out / "chain" / "labels.json"
    labels.write_text(labels.read_text() + " ")
    with pytest.raises(InputError, match=r"labels: expected what stage labels left"):
        run_chain(write_chain(tmp_path, tree), out, 1)
    left = hashlib.sha256(labels.read_bytes()).hexdigest()
    record.write_text(json.dumps(json.loads(record.read_text()) | {"left": left}))
    with pytest.raises(InputError, match=r"stage chosen.*stages\.labels"):
        run_chain(write_chain(tmp_path, tree), out, 1)
    assert ran == []
    # Speed is not a result.
    faster = json.loads(json.dumps(tree))
    faster["stages"][4]["set"]["engine.zero_stage"] = 0
    shutil.rmtree(out)
    run_chain(write_chain(tmp_path, tree), out, 1)
    ran.clear()
    assert run_chain(write_chain(tmp_path, faster), out, 1) == 0
    assert ran == []


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("student", {"train": "nowhere.yaml"}, "nowhere.yaml"),
        ("student", {"train": "r.yaml", "set": {"optim.bse_lr": 1.0}}, "optim.base_lr"),
        ("student", {"train": "r.yaml", "set": {"model.name": "vit_tony"}}, "vit_tony"),
        ("student", {"train": "r.yaml", "set": {"data.train": "nowhere"}}, "nowhere"),
        ("student", {"train": "r.yaml", "set": {"init_from": "${later}"}}, "later"),
        ("student", {"train": "r.yaml", "label": {"shards": "a", "teacher": "b"}}, "one of train, label"),
        ("few", {"select": {"source": "${student}", "per_class": 5}}, "earlier stage"),
        ("few", {"select": {"source": "nowhere", "per_class": 5}}, "nowhere"),
        ("chosen", {"select": {"source": "${labels}", "per_class": 5}}, "--threshold"),
        ("labels", {"label": {"shards": "nowhere", "teacher": "${teacher}"}}, "nowhere"),
        ("labels", {"label": {"shards": "SHARDS", "teacher": "${few}"}}, "label.teacher"),
        ("labels", {"label": {"shards": "SHARDS", "teacher": "${teacher}", "topk": 3}}, "stages.2.label.top_k"),
        (
            "judge",
            {
                "evaluate": {
                    "protocol": "knn",
                    "encoder": "x",
                    "train": "SHARDS",
                    "test": "SHARDS",
                    "options": {"cache": "s3://bucket"},
                }
            },
            "--cache: expected a path of this machine",
        ),
        (
            "judge",
            {
                "evaluate": {
                    "protocol": "knn",
                    "encoder": "x",
                    "train": "SHARDS",
                    "test": "SHARDS",
                    "options": {"batch-size": "many"},
                }
            },
            "what `pretrain eval knn` takes",
        ),
        ("judge", {"evaluate": {"protocol": "kn", "encoder": "x", "train": "SHARDS", "test": "SHARDS"}}, "knn"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_any_stage_is_told_before_the_first(
    tmp_path: Path, shards: Path, out: Path, ran: list[str], name: str, change: dict[str, Any], message: str
) -> None:
    change = json.loads(json.dumps(change).replace("SHARDS", str(shards)))
    path = write_chain(tmp_path, tree_of(tmp_path, shards, **{name: change}))
    with pytest.raises(RecipeError) as error:
        run_chain(path, out, 1)
    assert message in str(error.value)
    assert ran == []
    assert not out.exists()


def test_all_problems_at_once(tmp_path: Path, shards: Path) -> None:
    tree = tree_of(tmp_path, shards, few={"select": {"source": "nowhere", "per_class": 5}})
    tree["stages"][4]["train"] = "neither.yaml"
    with pytest.raises(RecipeError, match="2 problems"):
        run_chain(write_chain(tmp_path, tree), tmp_path / "out", 1)


def test_names_are_unique(tmp_path: Path, shards: Path) -> None:
    tree = tree_of(tmp_path, shards)
    tree["stages"][4]["name"] = "few"
    with pytest.raises(RecipeError, match="twice"):
        load_chain(write_chain(tmp_path, tree))


@pytest.mark.parametrize("path", sorted(CHAINS.rglob("*.yaml")), ids=lambda path: path.stem + path.parent.name)
def test_every_chain_of_the_repository_is_valid(
    path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, shards: Path
) -> None:
    """Recipes, overrides, models, references and options; the data it names are not looked at."""
    monkeypatch.setattr(chain_check, "_check_input", lambda chain, path: None)
    chain_check.check_chain(ChainFolder.open(path, out), 2, evaluation_commands)
    head = path.read_text().splitlines()
    assert all(any(line.startswith(f"# {word}:") for line in head) for word in ("Paper", "Expected", "Cost", "Command"))
    assert f"pretrain chain configs/chains/{path.relative_to(CHAINS)}" in path.read_text()
