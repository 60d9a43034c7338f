"""Conversion: one result whatever the packing, the processes, or how often it was killed on the way."""

from __future__ import annotations

import fcntl
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.durable import durable_file
from data_pipeline.errors import DataError, RunError, SourceError
from data_pipeline.ingest.convert import Conversion, ConvertOptions, convert
from data_pipeline.shards import write
from data_pipeline.shards.load_manifest import load_manifest
from data_pipeline.shards.write import split_evenly
from tests.data_pipeline.archives import PACKINGS, as_folder, as_tar_gz, class_folders, contents, jpeg

SMALL = ConvertOptions(shard_size=5)
ROOT = Path(__file__).resolve().parents[2]


def samples(folder: Path) -> list[dict[str, Any]]:
    """As webdataset reads them."""
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(tars, shardshuffle=False))


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not name.endswith("plan.json")}


@pytest.mark.parametrize("packing", PACKINGS)
def test_bytes_and_labels_arrive_from_every_packing(tmp_path: Path, packing: str) -> None:
    files = class_folders(13)
    source = PACKINGS[packing](tmp_path / "source", files)
    done = convert(source, tmp_path / "out", SMALL)
    read = {sample["__key__"]: sample for sample in samples(tmp_path / "out")}
    assert {f"{key}.jpg": sample["jpg"] for key, sample in read.items()} == files
    for key, sample in read.items():
        assert sample["cls"] == str(["cat", "dog", "eel"].index(key.split("/")[0])).encode()
    manifest = done.manifests[tmp_path / "out"]
    assert manifest.num_samples.tolist() == [4, 4, 5]
    assert manifest.classes == ("cat", "dog", "eel")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_result_depends_on_neither_packing_nor_processes(tmp_path: Path) -> None:
    found = []
    for packing, workers in (("folder", 0), ("zip", 0), ("tar.gz", 2)):
        source = PACKINGS[packing](tmp_path / f"source-{packing}", class_folders(13))
        convert(source, tmp_path / f"out-{packing}", SMALL, workers=workers)
        found.append(shards(tmp_path / f"out-{packing}"))
    assert found[0] == found[1] == found[2]


def test_shuffle_mixes_the_classes_and_may_be_left_out(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "source", class_folders(60))
    convert(source, tmp_path / "named", ConvertOptions(shard_size=20, shuffle=False))
    keys = [sample["__key__"] for sample in samples(tmp_path / "named")]
    assert keys == sorted(keys)
    convert(source, tmp_path / "mixed", ConvertOptions(shard_size=20))
    for shard in range(3):
        index = load_manifest(str(tmp_path / "mixed")).index(shard)
        assert len(Counter(index.labels.tolist())) == 3
    convert(source, tmp_path / "other", ConvertOptions(shard_size=20, seed=1))
    mixed, other = ([s["__key__"] for s in samples(tmp_path / name)] for name in ("mixed", "other"))
    assert mixed != other
    assert sorted(mixed) == sorted(other) == keys


def test_splits_become_datasets_with_the_same_classes(tmp_path: Path) -> None:
    files = class_folders(9, top="set/train/") | {"set/test/dog/1.jpg": jpeg(50)}
    done = convert(as_tar_gz(tmp_path / "s.tar.gz", files), tmp_path / "out", ConvertOptions(split_by_folder=True))
    assert {path.name: manifest.total for path, manifest in done.manifests.items()} == {"test": 1, "train": 9}
    test = load_manifest(str(tmp_path / "out/test"))
    assert test.classes == ("cat", "dog", "eel")
    assert test.label_counts is not None
    assert test.label_counts.tolist() == [0, 1, 0]


def test_no_class_folders_no_labels(tmp_path: Path) -> None:
    done = convert(as_folder(tmp_path / "s", {"a.jpg": jpeg(0), "b.png": png(4, 4)}), tmp_path / "out", SMALL)
    manifest = done.manifests[tmp_path / "out"]
    assert manifest.fields == ("jpg", "png")
    assert manifest.classes is None
    assert manifest.label_counts is None


def png(height: int, width: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, "PNG")
    return data.getvalue()


def test_extension_is_that_of_the_content(tmp_path: Path) -> None:
    convert(as_folder(tmp_path / "s", {"a.JPEG": jpeg(0), "b.jpg": png(4, 4)}), tmp_path / "out", SMALL)
    read = {sample["__key__"]: sample for sample in samples(tmp_path / "out")}
    assert read["a"]["jpg"] == jpeg(0)
    assert read["b"]["png"] == png(4, 4)


def test_short_side_makes_larger_images_small_and_leaves_others(tmp_path: Path) -> None:
    files = {"wide.jpg": jpeg(0, 40, 81), "tall.png": png(90, 30), "small.jpg": jpeg(2, 20, 99)}
    convert(as_folder(tmp_path / "s", files), tmp_path / "out", ConvertOptions(short_side=20))
    read = {sample["__key__"]: sample["jpg"] for sample in samples(tmp_path / "out")}
    sizes = {key: Image.open(io.BytesIO(data)).size for key, data in read.items()}
    assert sizes == {"wide": (40, 20), "tall": (20, 60), "small": (99, 20)}
    assert read["small"] == files["small.jpg"]


def test_bad_images_are_told_all_at_once_and_may_be_skipped(tmp_path: Path) -> None:
    bad = {"cat/x.jpg": b"no image", "dog/y.png": b"", "eel/z.jpg": png(60, 60)}
    source = as_folder(tmp_path / "s", class_folders(12) | bad)
    options = ConvertOptions(shard_size=3, max_pixels=3000)
    with pytest.raises(SourceError, match=r"3 that cannot") as caught:
        convert(source, tmp_path / "out", options)
    assert all(name in str(caught.value) for name in bad)
    assert "60 x 60" in str(caught.value)
    assert not (tmp_path / "out/manifest.json").exists()
    done = convert(source, tmp_path / "out", options, skip_bad=True)  # goes on with the same folder
    assert [error.where for error in done.bad] != []
    assert done.manifests[tmp_path / "out"].total == 12
    convert(source, tmp_path / "fresh", options, skip_bad=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_refusal_that_keeps_no_sample_leaves_the_folder_to_other_options(tmp_path: Path, skip_bad: bool) -> None:
    bad = {"cat/x.jpg": b"no image"}
    source = as_folder(tmp_path / "s", bad if skip_bad else class_folders(3) | bad)
    with pytest.raises(SourceError, match="1 that cannot"):
        convert(source, tmp_path / "out", SMALL, skip_bad=skip_bad)
    assert not (tmp_path / "out").exists()
    as_folder(source, class_folders(3))
    other = ConvertOptions(shard_size=5, short_side=8)
    assert convert(source, tmp_path / "out", other, skip_bad=True).manifests[tmp_path / "out"].total == 3


def test_skipped_images_do_not_pass_as_whole_later(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "s", class_folders(6) | {"cat/x.jpg": b"no image"})
    convert(source, tmp_path / "out", SMALL, skip_bad=True)
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(SourceError, match="1 that cannot"):
        convert(source, tmp_path / "out", SMALL)


@pytest.mark.parametrize("finished", [True, False])
def test_folder_of_another_plan_is_refused_and_not_changed(tmp_path: Path, finished: bool) -> None:
    source = as_folder(tmp_path / "s", class_folders(12))
    out = tmp_path / "out"
    convert(source, out, SMALL)
    if not finished:
        (out / "manifest.json").unlink()
        (out / "shard-000001.idx").unlink()
    before = contents(out)
    with pytest.raises(DataError, match=r"shard_size = 4, found one with shard_size = 5"):
        convert(source, out, ConvertOptions(shard_size=4))
    with pytest.raises(DataError, match=r"source = "):
        convert(as_folder(tmp_path / "t", class_folders(11)), out, SMALL)
    assert contents(out) == before


def test_folder_with_other_files_is_refused_and_not_changed(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "s", class_folders(3))
    out = as_folder(tmp_path / "out", {"thesis.tex": b"years of work"})
    with pytest.raises(DataError, match="other files"):
        convert(source, out, SMALL)
    with pytest.raises(DataError, match="a file"):
        convert(source, out / "thesis.tex", SMALL)
    assert contents(out) == {"thesis.tex": b"years of work"}


def test_finished_dataset_is_left_as_it_is(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "s", class_folders(12))
    convert(source, tmp_path / "out", SMALL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert convert(source, tmp_path / "out", SMALL).manifests[tmp_path / "out"].total == 12
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


class Killed(BaseException):
    pass


def test_stopped_at_any_write_it_looks_unfinished_and_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = as_folder(tmp_path / "s", class_folders(12))
    convert(source, tmp_path / "whole", SMALL)
    whole = contents(tmp_path / "whole")
    replace, link = os.replace, os.link
    for stop in range(len(whole)):
        out = tmp_path / f"stopped-{stop}"
        left = stop

        def name_until(name: Callable[..., None], a: Any, b: Any) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            name(a, b)

        monkeypatch.setattr("os.replace", partial(name_until, replace))
        monkeypatch.setattr("os.link", partial(name_until, link))
        with pytest.raises(Killed):
            convert(source, out, SMALL)
        monkeypatch.setattr("os.replace", replace)
        monkeypatch.setattr("os.link", link)
        assert len(contents(out)) == stop
        with pytest.raises(DataError):
            load_manifest(str(out))
        convert(source, out, SMALL)
        assert contents(out) == whole


def test_what_a_kill_left_half_written_is_cleared(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "s", class_folders(12))
    out = tmp_path / "out"
    convert(source, out, SMALL)
    whole = contents(out)
    (out / "manifest.json").unlink()
    (out / ".shard-000001.tar.4711.tmp").write_bytes(b"half a sh")
    convert(source, out, SMALL)
    assert contents(out) == whole


def test_durable_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for old, new in ((None, b"first"), (b"first", b"second")):
        with durable_file(path) as file:
            file.write(new)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == old
        assert path.read_bytes() == new
    with pytest.raises(Killed):
        _stop_while_writing(path)
    assert contents(tmp_path) == {"file": b"second"}


def _stop_while_writing(path: Path) -> None:
    with durable_file(path) as file:
        file.write(b"third")
        raise Killed


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"x" + data[1:], lambda data: b""])
@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.idx"])
def test_damaged_shard_is_made_again(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    source = as_folder(tmp_path / "s", class_folders(12))
    out = tmp_path / "out"
    convert(source, out, SMALL)
    whole = contents(out)
    (out / "manifest.json").unlink()
    (out / name).write_bytes(damage((out / name).read_bytes()))
    convert(source, out, SMALL)
    assert contents(out) == whole


CONVERT = """
import sys
from pathlib import Path
from data_pipeline.ingest.convert import ConvertOptions, convert
if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions(shard_size=5), workers=2)
"""


def test_killed_with_its_workers_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = as_tar_gz(tmp_path / "s.tar.gz", class_folders(1500))
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(CONVERT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script), str(source), str(out)], env=environment)
    deadline = time.monotonic() + 60
    while not list(out.glob("*.idx")) and time.monotonic() < deadline:
        time.sleep(0.002)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(is_alive(pid) for pid in workers)
    assert list(out.glob("*.idx"))
    with pytest.raises(DataError, match="unfinished"):
        load_manifest(str(out))
    options = ConvertOptions(shard_size=5)
    resumed = convert(source, out, options)
    convert(source, tmp_path / "whole", options)
    assert contents(out) == contents(tmp_path / "whole")
    assert resumed.manifests[out].total == 1500


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_two_processes_cannot_make_one_dataset(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "s", class_folders(12))
    out = tmp_path / "out"
    convert(source, out, SMALL)
    (out / "manifest.json").unlink()
    with (out / "plan.json").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another at work"):
            convert(source, out, SMALL)
    convert(source, out, SMALL)


def _convert_when_all_are_there(source: Path, out: Path, ready: Any, said: Any) -> None:
    ready.wait(300)
    try:
        convert(source, out, SMALL)
    except RunError as error:
        said.put(str(error))
    else:
        said.put("made")


def test_of_ten_processes_at_once_one_makes_a_dataset_and_it_is_whole(tmp_path: Path) -> None:
    """The others are told so, or find it made."""
    source = as_folder(tmp_path / "s", class_folders(12))
    convert(source, tmp_path / "alone", SMALL)
    context = multiprocessing.get_context("fork")
    ready, said = context.Barrier(10), context.Queue()
    arguments = (source, tmp_path / "out", ready, said)
    processes = [context.Process(target=_convert_when_all_are_there, args=arguments) for _ in range(10)]
    for process in processes:
        process.start()
    answers = [said.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert "made" in answers
    assert all(answer == "made" or "another at work" in answer for answer in answers), answers
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_folder_that_another_begins_meanwhile_is_no_folder_with_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, read_plan = as_folder(tmp_path / "s", class_folders(12)), tmp_path / "out", write._read_plan

    def and_then_another_begins(folder: Path) -> Any:
        found = read_plan(folder)
        monkeypatch.setattr(write, "_read_plan", read_plan)
        convert(source, out, SMALL)
        return found

    out.mkdir()
    monkeypatch.setattr(write, "_read_plan", and_then_another_begins)
    convert(source, out, SMALL)
    assert load_manifest(str(out)).total == 12


def test_photographs_keep_their_bytes(shared_data: Path, tmp_path: Path) -> None:
    done: Conversion = convert(shared_data / "photos.tar", tmp_path / "out", ConvertOptions(shard_size=20))
    manifest = done.manifests[tmp_path / "out"]
    assert (manifest.total, manifest.fields) == (64, ("jpg",))
    assert manifest.num_samples.tolist() == [16] * 4


@pytest.mark.parametrize(("count", "size"), [(1, 5), (5, 5), (6, 5), (11, 5), (1000, 7)])
def test_split_evenly(count: int, size: int) -> None:
    pieces = split_evenly(range(count), size)
    assert [i for piece in pieces for i in piece] == list(range(count))
    lengths = [len(piece) for piece in pieces]
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1
    assert len(pieces) == int(np.ceil(count / size))


def test_converting_does_not_load_torch() -> None:
    """Its processes are spawned, each of which would load it anew: seconds, and hundreds of megabytes."""
    command = "import sys, data_pipeline.ingest.convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=False).returncode == 0
