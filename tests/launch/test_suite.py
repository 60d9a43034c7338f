"""A suite from its file to its results: what is asked for and run, and what a failure leaves of the rest."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from data_pipeline.errors import DataError, InputError, RecipeError
from launch.suites.jobs import Questions, SuiteJob
from launch.suites.run import _in_a_process, cuda_devices
from pretrain.evals.result import EvalReport
from tests.launch.suites import (
    COMMANDS,
    answered,
    cells,
    in_this_process,
    make_run,
    refused,
    run_suite,
    with_option,
    write_suite,
)  # fmt: skip

# What is asked for.


def test_a_cell_is_a_command_of_eval(tmp_path: Path, tree: dict[str, Any]) -> None:
    found = {cell.name: cell for cell in cells(tmp_path, tree)}
    assert len(found) == 6
    cell = found["random colours knn"]
    data, out = tree["datasets"]["colours"], tmp_path / "out" / "random" / "colours" / "knn.json"
    assert cell.words[:2] == ("eval", "knn")
    assert cell.words[-2:] == ("--", tree["encoders"]["first"])
    given = {
        ("--test", data["test"]), ("--train", data["train"]), ("--out", str(out)), ("--seed", "3"), ("--k", "5"),
        ("--k", "3"), ("--cache", str(tmp_path / "out" / "features")),
    }  # fmt: skip
    assert given < set(pairwise(cell.words))
    assert len(cell.words) == 2 + 2 * len(given) + len(("--random-init", "--", "source"))
    assert cell.path == out
    assert cell.arguments["k"] == [5, 3]
    assert cell.arguments["batch_size"] == 256, "also what was left to its default"
    assert not {"out", "num_workers", "nproc"} & set(cell.arguments), "no number depends on them"


def test_only_of_fine_tuning_the_number_depends_on_its_ranks(tmp_path: Path, tree: dict[str, Any]) -> None:
    for kind, depends in (("knn", False), ("finetune", True)):
        one, two = (
            cells(tmp_path, {**tree, "protocols": {"p": {"kind": kind, "nproc": nproc}}})[0] for nproc in (1, 2)
        )
        assert one.words != two.words
        assert (one.arguments != two.arguments) == depends


def test_an_option_of_several_values_at_once_is_given_them(tmp_path: Path, tree: dict[str, Any]) -> None:
    linear = {"kind": "linear", "augment": True, "crop_scale": [0.2, 1.0]}
    (cell, *_) = cells(tmp_path, {**tree, "protocols": {"linear": linear}})
    assert cell.arguments["crop_scale"] == [0.2, 1.0]


def test_a_protocol_without_a_training_set_is_given_none(tmp_path: Path, tree: dict[str, Any]) -> None:
    found = cells(
        tmp_path, {**tree, "protocols": {"zeroshot": {"kind": "zeroshot", "templates": "photo", "classes": "imagenet"}}}
    )
    assert ("--classes", "imagenet") in set(pairwise(found[0].words))
    assert not [word for word in found[0].words if word.startswith("--train")]


@pytest.mark.parametrize(
    ("group", "name", "options", "told"),
    [
        ("protocols", "knn", {"kk": 3}, "protocols.knn.kk: expected an option of `pretrain eval knn`, found kk."),
        ("protocols", "linear", {"min_stepz": 3}, "Did you mean min_steps?"),
        ("protocols", "knn", {"kind": "nkn"}, "Did you mean knn?"),
        ("protocols", "knn", {"kind": "compare"}, "protocols.knn.kind: expected a protocol"),
        ("protocols", "knn", {"k": ["many"]}, "Invalid value for '--k'"),
        ("protocols", "knn", {"k": []}, "protocols.knn.k: expected a value, or a list of one or more, found []"),
        (
            "protocols",
            "knn",
            {"limit_train": [1000, 2000]},
            "protocols.knn.limit_train: expected one value, a number or a text, found [1000, 2000]",
        ),
        ("protocols", "knn", {"limit_train": True}, "protocols.knn.limit_train: expected one value"),
        ("protocols", "linear", {"crop_scale": 0.2}, "protocols.linear.crop_scale: expected a list of 2, found 0.2"),
        ("protocols", "linear", {"augment": 1}, "protocols.linear.augment: expected true or false, found 1"),
        ("protocols", "knn", {"pooling": "most"}, "'most' is not one of"),
        ("protocols", "knn", {"out": "x.json"}, "protocols.knn.out: expected none, as the suite decides it"),
        (
            "protocols",
            "knn",
            {"seed": 4},
            "protocols.knn.seed: expected an option once, as encoders.random.seed has it",
        ),
        ("encoders", "first", {"sed": 1}, "encoders.first.sed: expected an option"),
        ("datasets", "colours", {"limit_tests": 1}, "Did you mean limit_test?"),
    ],
)
def test_options_are_those_of_the_command(
    tmp_path: Path, tree: dict[str, Any], group: str, name: str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError) as error:
        cells(tmp_path, with_option(tree, group, name, **options))
    assert told in str(error.value)


def test_a_missing_training_set_is_told_before_anything_starts(tmp_path: Path, tree: dict[str, Any]) -> None:
    changed = {**tree, "datasets": {"colours": {"test": tree["datasets"]["colours"]["test"]}}}
    with pytest.raises(RecipeError, match="--train"):
        cells(tmp_path, changed)
    gone = with_option(tree, "datasets", "colours", test="nowhere")
    with pytest.raises(DataError, match="nowhere"):
        run_suite(write_suite(tmp_path, gone), tmp_path / "out", run=refused)
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_is_not_there_is_told_before_anything_starts(tmp_path: Path, tree: dict[str, Any]) -> None:
    begun = make_run(tmp_path / "begun", 4)
    shutil.rmtree(begun / "encoder")
    for source, told in (("runs/mea_cifar10", "found none of these"), (str(begun), "found no folder encoder/")):
        changed = {**tree, "encoders": {**tree["encoders"], "wrong": source}}
        with pytest.raises(InputError, match=told):
            run_suite(write_suite(tmp_path, changed), tmp_path / "out", run=refused)
    assert not (tmp_path / "out").exists()
    fresh = {**tree, "encoders": {"fresh": {"source": str(begun), "random_init": True}}}
    assert run_suite(write_suite(tmp_path, fresh), tmp_path / "out", dry_run=True) == 0


def test_a_command_that_keeps_features_is_told_where(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = typer.Typer()

    @app.command()
    def judge(
        encoder: str,
        test: Annotated[str, typer.Option("--test")],
        out: Annotated[str, typer.Option("--out")],
        cache: Annotated[str, typer.Option("--cache")] = "",
        sure: Annotated[bool, typer.Option("--sure/--unsure")] = True,
    ) -> None: ...

    monkeypatch.setitem(COMMANDS, "knn", typer.main.get_command(app))
    asked = {"encoders": {"first": "anywhere"}, "protocols": {"new": {"kind": "knn", "sure": False}}}
    (first,) = cells(tmp_path, {**tree, **asked})
    assert ("--cache", str(tmp_path / "out" / "features")) in set(pairwise(first.words))
    assert "--unsure" in first.words
    assert first.arguments["sure"] is False
    assert "cache" not in first.arguments


# What is run.


def test_what_is_missing_is_run_and_what_is_there_is_not(
    tmp_path: Path, tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_suite(tmp_path, tree), tmp_path / "out"
    assert run_suite(path, out, dry_run=True) == 0
    assert capsys.readouterr().out.count("pretrain eval") == 6
    assert not out.exists()
    assert run_suite(path, out, devices=[], run=in_this_process) == 0
    assert "0 of 6 results are there" in capsys.readouterr().out
    report = EvalReport.load(out / "random" / "colours" / "knn.json")
    assert report.seeds == {"init": 3}
    assert run_suite(path, out, run=refused) == 0
    (out / "second" / "colours" / "linear.json").unlink()
    run: list[str] = []

    def noted(cell: SuiteJob, device: str | None, say: Callable[[str], None]) -> int:
        run.append(cell.name)
        return in_this_process(cell, device, say)

    assert run_suite(path, out, devices=[], run=noted) == 0
    assert run == ["second colours linear"]


def test_one_that_fails_leaves_the_others_alone(
    tmp_path: Path, tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = make_run(tmp_path / "broken", 4)
    whole = (broken / "encoder" / "model.safetensors").read_bytes()
    (broken / "encoder" / "model.safetensors").write_bytes(whole[:-1])
    changed = {**tree, "encoders": {"broken": str(broken), **tree["encoders"]}}
    path, out = write_suite(tmp_path, changed), tmp_path / "out"
    assert run_suite(path, out, devices=[], run=in_this_process) == 1
    told = capsys.readouterr()
    assert "broken colours knn: failed, exit status 2: error: " in told.err
    assert len(list(out.glob("*/colours/*.json"))) == 6
    assert not (out / "broken").exists()
    (broken / "encoder" / "model.safetensors").write_bytes(whole)
    assert run_suite(path, out, devices=[], run=in_this_process) == 0


def test_a_command_that_leaves_no_report_has_failed(
    tmp_path: Path, tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_suite(write_suite(tmp_path, tree), tmp_path / "out", devices=[], run=lambda *_: 0) == 1
    assert capsys.readouterr().err.count("no report that answers what was asked") == 6


def test_an_old_answer_is_gone_before_a_new_question_is_written(
    done: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tree = done
    changed = with_option(tree, "protocols", "knn", k=[3])
    assert run_suite(write_suite(folder, changed), folder / "out", devices=[], run=lambda *_: 137) == 1
    assert not (folder / "out" / "own" / "colours" / "knn.json").exists()
    assert not answered(folder, changed)


def test_no_answer_to_an_older_question_is_left_beside_a_newer_one(tmp_path: Path, tree: dict[str, Any]) -> None:
    path, out = write_suite(tmp_path, tree), tmp_path / "out"
    assert run_suite(path, out, devices=[], run=in_this_process) == 0
    write_suite(tmp_path, with_option(tree, "protocols", "knn", k=[1]))

    def interrupted(cell: SuiteJob, device: str | None, say: Callable[[str], None]) -> int:
        assert not list(out.glob("*/*/knn.json"))
        return 130

    assert run_suite(path, out, devices=[], run=interrupted) == 1
    assert len(list(out.glob("*/*/linear.json"))) == 3


def test_what_a_command_goes_on_from_is_kept_for_the_same_question_alone(
    done: tuple[Path, dict[str, Any]],
) -> None:
    folder, tree = done
    trained = folder / "out" / "own" / "colours" / "knn" / "finetune-run" / "recipe.yaml"
    trained.parent.mkdir(parents=True)
    trained.touch()
    (cell,) = cells(folder, tree)
    Questions().begin(cell)
    assert trained.exists()
    assert not cell.path.exists()
    (cell,) = cells(folder, with_option(tree, "protocols", "knn", k=[1]))
    Questions().begin(cell)
    assert not trained.exists()


def test_each_device_has_one_process_at_a_time(tmp_path: Path, tree: dict[str, Any]) -> None:
    together = threading.Barrier(2, timeout=20)  # broken, unless two run at the same time
    at_work: set[str | None] = set()
    seen: list[str | None] = []
    lock = threading.Lock()

    def run(cell: SuiteJob, device: str | None, say: Callable[[str], None]) -> int:
        with lock:
            assert device not in at_work
            at_work.add(device)
            seen.append(device)
        together.wait()
        with lock:
            at_work.remove(device)
        return 3

    assert run_suite(write_suite(tmp_path, tree), tmp_path / "out", devices=["0", "3"], run=run) == 1
    assert sorted(map(str, seen)) == ["0", "0", "0", "3", "3", "3"]


def test_devices_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert cuda_devices() == ["4", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert cuda_devices() == ["0", "1"]


def test_a_process_of_its_own_gets_its_device_and_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "launch" / "ranks").mkdir(parents=True)
    said = "os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'], sys.argv[2:]"
    rank = f"import os, signal, sys\nprint({said}, flush=True)\n"
    (tmp_path / "launch" / "__init__.py").touch()
    (tmp_path / "launch" / "ranks" / "__init__.py").touch()
    (tmp_path / "launch" / "ranks" / "rank.py").write_text(rank + "os.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr("launch.ranks.child.ROOT", tmp_path)
    heard: list[str] = []
    cell = SuiteJob("a", "b", "c", ("eval", "knn"), "encoder", {}, tmp_path, tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert _in_a_process(cell, "3", heard.append, num_processes=4) == 137
    assert heard == ["3 2 ['launch.cli', 'eval', 'knn']"]


def test_a_run_is_no_place_for_a_suite(tmp_path: Path, tree: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a folder for the suite alone"):
        run_suite(write_suite(tmp_path, tree), make_run(tmp_path / "run", 0), run=refused)
