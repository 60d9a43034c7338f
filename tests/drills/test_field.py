"""README's commands on other people's files: what became of each picture is asked of every command, and must add up.

A thousand pictures in class folders, two folders of tars and a table over the same pictures; see field.py. A picture is
taken whole, refused by name, or found to be half where it is decoded: then training puts another in its place, and an
evaluation leaves it out.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from data_pipeline.durable import read_lines
from data_pipeline.samples.decode import decode_image
from data_pipeline.shards.load_manifest import load_manifest
from pretrain.evals.result import EvalReport
from tests.commands import Done, pretrain
from tests.drills import field
from tests.drills.accounts import account, image, key, lines, named, samples, without
from tests.drills.field import CLASSES, FOLDER, STRANGERS, TARS, Fate, Kind, Photographs, Picture
from tests.objectives import towers
from tests.runs import write_recipe
from tests.test_readme import readme_commands

USABLE, UNUSABLE = (Fate.TAKEN,), (Fate.HALF, Fate.REFUSED)
UNPAIRED = (*UNUSABLE, Fate.SILENT)  # of no use where captions are learned
SMALL = 80  # pixels, fewer than any side has
GONE = "eft/gone.jpg"  # in the table alone


@dataclass(frozen=True)
class Place:
    """The folder in which the commands are given, and what was written there, by the names that messages have.

    Attributes:
        photos: of the class folders, by path.
        downloads: of the tars whose keys start again, by `TAR/KEY`.
        laion: of the tars whose keys do not, likewise.
        rows: of the table, by the number of the line that each ends on.
    """

    folder: Path
    photographs: Photographs
    photos: dict[str, Picture]
    downloads: dict[str, Picture]
    laion: dict[str, Picture]
    rows: dict[str, Picture]

    def __call__(self, command: str, *more: object, status: int = 0) -> Done:
        """`pretrain COMMAND MORE` to its end; without worker processes where none are asked for: each begins anew."""
        words = [*command.split(), *more]
        if command.startswith(("data convert", "data index", "data verify")) and "--workers" not in words:
            words += ["--workers", 1]
        return pretrain(*words, status=status, folder=self.folder)

    def readme(self, command: str, *more: object, status: int = 0) -> Done:
        """Likewise, of a command that stands there."""
        assert f"pretrain {command}" in readme_commands()
        return self(command, *more, status=status)


@pytest.fixture(scope="module")
def place(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("field")
    photographs = Photographs(shared_data / "photos.tar")
    photos, tars = field.drawn(photographs, FOLDER, 0), field.drawn(photographs, TARS, 1000)
    field.write_folder(folder / "photos", photos)
    downloads = field.write_tars(folder / "downloads", tars[::2], start_again=True)
    laion = field.write_tars(folder / "laion", tars[1::2], start_again=False)
    rows = write_table(folder / "captions.csv", photos[::4])
    assert (len(photos), len(downloads) + len(laion), len(rows)) == (1000, 240, 250)
    return Place(folder, photographs, {picture.name: picture for picture in photos}, downloads, laion, rows)


def write_table(path: Path, pictures: Iterable[Picture]) -> dict[str, Picture]:
    """A .csv with tabs, as spreadsheets export it: values of two lines, and two rows that lack what they promise."""
    rows, line = {}, 1
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["image", "caption"])
        for picture in pictures:
            text = field.caption(picture.number)
            writer.writerow([picture.name, text])
            line += 1 + text.count("\n")
            rows[str(line)] = picture
        writer.writerow([GONE, "a ghost"])
        writer.writerow([next(iter(rows.values())).name, " "])
    return rows


def check_pixels(place: Place, kind: Kind, picture: Picture, data: bytes, small: bool = False) -> None:
    """What is decoded is what was drawn."""
    shown = kind.shown(place.photographs.cut_out(picture.number))
    found = decode_image(data, max_pixels=100_000, where=picture.name)
    if small:
        assert min(found.shape[:2]) == SMALL
        shown = np.asarray(Image.fromarray(shown).resize(found.shape[1::-1], Image.Resampling.BICUBIC))
    assert found.shape == shown.shape, picture.name
    assert np.abs(found.astype(int) - shown).mean() <= max(kind.loss, 12 if small else 0), picture.name


LEFT_OUT = r"left out: (.*?): expected "


@pytest.fixture(scope="module")
def converted(place: Place) -> Done:
    """`data/photos`, and what was said; before it, the two refusals that a user meets."""
    convert = "data convert photos data/photos --shard-size 250"
    assert "found none in zebra" in place(convert, status=2).stderr
    (place.folder / "photos/zebra").rmdir()
    num_refused = sum(kind.count for kind in FOLDER.values() if kind.fate is Fate.REFUSED)
    assert f"found {num_refused} that cannot: " in place(convert, status=2).stderr
    assert not (place.folder / "data/photos/manifest.json").exists()
    return place(convert, "--skip-bad", "--workers", 2)


def test_a_folder_is_converted_and_every_file_accounted_for(place: Place, converted: Done) -> None:
    taken = named(place.photos, FOLDER, place.folder / "data/photos")
    refused = lines(converted.stdout, LEFT_OUT)
    account(place.photos, FOLDER, {(Fate.TAKEN, Fate.HALF): list(taken), (Fate.REFUSED,): refused})
    assert f"left out {len(refused)} bad images\n" in converted.stdout
    assert f"passed over, being no images: {len(STRANGERS)} files (2 hidden, " in converted.stdout
    manifest = load_manifest(str(place.folder / "data/photos"))
    assert manifest.classes == CLASSES
    assert manifest.total == len(taken)
    for name, sample in taken.items():
        assert CLASSES[int(sample["cls"])] == place.photos[name].label
        if FOLDER[place.photos[name].kind].fate is Fate.TAKEN:
            check_pixels(place, FOLDER[place.photos[name].kind], place.photos[name], image(sample))
    assert set(samples(place.folder / "data/photos")) == {key(name) for name in taken}


def test_verify_names_the_halves_and_stats_pass_them_over(place: Place, converted: Done) -> None:
    names = {key(name): name for name, picture in place.photos.items() if FOLDER[picture.kind].fate is not Fate.REFUSED}
    done = place("data verify data/photos", status=2)
    faults = [names[k] for k in lines(done.stdout, r"shard-\d+\.tar, (.*): \.\w+: expected a whole image")]
    assert len(done.stdout.splitlines()) == len(faults)
    account(
        place.photos, FOLDER,
        {(Fate.HALF,): faults, (Fate.TAKEN,): without(names.values(), faults),
         (Fate.REFUSED,): lines(converted.stdout, LEFT_OUT)},
    )  # fmt: skip
    assert f"found {len(faults)} (listed above). The shards are whole" in done.stderr
    told = place("data stats data/photos").stdout
    passed = lines(told, r"not on the contact sheet: (.*?)\.\w+: expected")
    assert {names[k] for k in passed} <= set(faults)
    assert int(lines(told, r"pixels, of (\d+) images")[0]) + len(passed) == 80
    counts = {label: sum(names[k].startswith(f"{label}/") for k in names) for label in CLASSES}
    assert lines(told, r" +\d+ (.*?) +#*$") == [f"{label:<15}{count:>10}" for label, count in counts.items()]


def test_made_smaller_no_half_gets_through(place: Place, converted: Done) -> None:
    done = place(f"data convert photos data/small --skip-bad --short-side {SMALL}")
    found = samples(place.folder / "data/small")
    names = {key(name): name for name, p in place.photos.items() if FOLDER[p.kind].fate is Fate.TAKEN}
    account(place.photos, FOLDER, {USABLE: [names[k] for k in found], UNUSABLE: lines(done.stdout, LEFT_OUT)})
    for k, sample in found.items():
        picture = place.photos[names[k]]
        assert CLASSES[int(sample["cls"])] == picture.label
        check_pixels(place, FOLDER[picture.kind], picture, sample["jpg"], small=True)
    assert place("data verify data/small").stdout.startswith(f"data/small: sound; {len(names)} samples")


def test_tars_are_converted_and_every_sample_accounted_for(place: Place) -> None:
    again = place.readme("data convert downloads data/again --skip-bad")
    laion = place("data convert laion data/laion --skip-bad --caption-field json:caption")
    for done, pictures, out in ((again, place.downloads, "again"), (laion, place.laion, "laion")):
        taken = named(pictures, TARS, place.folder / "data" / out)
        left_out = lines(done.stdout, r"left out: (\d+\.tar: \d+)\.\w+: expected ")
        refused = [name.replace(": ", "/") for name in left_out]
        account(pictures, TARS, {(Fate.TAKEN, Fate.HALF): list(taken), (Fate.REFUSED, Fate.SILENT): refused})
        for name, sample in taken.items():
            text = field.caption(pictures[name].number)
            assert sample["txt"].decode() == (text if out == "again" else " ".join(text.split()))
            if TARS[pictures[name].kind].fate is Fate.TAKEN:
                check_pixels(place, TARS[pictures[name].kind], pictures[name], image(sample))


def test_a_table_is_converted_and_every_row_accounted_for(place: Place) -> None:
    convert = "data convert captions.csv data/captions --root photos"
    refused = re.search(r"found (\d+) that cannot: captions\.csv, line ", place.readme(convert, status=2).stderr)
    done = place(convert, "--skip-bad")
    taken = named(place.rows, FOLDER, place.folder / "data/captions")
    left_out = lines(done.stdout, r"left out: captions\.csv, line (\d+)")
    assert refused is not None
    assert int(refused[1]) == len(left_out)
    end = max(map(int, place.rows))
    further = {str(end + 1), str(end + 2)}
    assert f"line {end + 1} ({GONE}): expected a readable file, found No such file" in done.stdout
    assert f"line {end + 2}: expected text in UTF-8 in column caption, found ' '" in done.stdout
    account(
        place.rows, FOLDER,
        {(Fate.TAKEN, Fate.HALF): list(taken), (Fate.REFUSED,): [n for n in left_out if n not in further]},
    )  # fmt: skip
    for line, sample in taken.items():
        text = field.caption(place.rows[line].number)
        assert sample["txt"].decode() == (" ".join(text.split()) if "\n" in text else text)


def log_and_metrics(run: Path) -> tuple[str, dict[str, float]]:
    values: dict[str, float] = {}
    for line in read_lines(run / "metrics.jsonl"):
        values |= line
    return (run / "log-rank0.txt").read_text(), values


def test_training_replaces_the_halves_and_evaluations_leave_them_out(place: Place, converted: Done) -> None:
    stands = {key(name): name for name, p in place.photos.items() if FOLDER[p.kind].fate is not Fate.REFUSED}
    recipe = write_recipe(
        place.folder / "mae.yaml", "",
        data={"train": "data/photos", "val": "photos", "views": {"scale": [0.4, 1.0]}},
        schedule={"samples": len(stands), "warmup": 0.1}, batch={"global_size": 32},
        checkpoint={"every_steps": 100}, validation={"every_epochs": 1},
        evals=[{"kind": "knn", "train": "data/photos", "test": "photos", "k": 3, "every_epochs": 1}],
    )  # fmt: skip
    assert len(stands) % 32 == 0
    place("doctor", recipe)
    place("train", recipe, "--nproc", 2, "--out", "runs/mae")
    log, values = log_and_metrics(place.folder / "runs/mae")
    half = [stands[k] for k in lines(log, r"bad sample (.*) in shard-\d+\.tar: ")]
    instead = {stands[k] for k in lines(log, r"bad sample .* In its place: (.*)")}
    refused = lines(converted.stdout, LEFT_OUT)
    account(
        place.photos, FOLDER,
        {(Fate.HALF,): half, (Fate.TAKEN,): without(stands.values(), half), (Fate.REFUSED,): refused},
    )  # fmt: skip
    assert instead.isdisjoint(half)
    assert (values["bad_samples"], values["samples_seen"]) == (len(half), len(stands))
    left_out = lines(log, r"validation leaves .* in (.*) of data\.val out: ")
    assert values["val/left_out"] == len(left_out)
    assert values["knn/left_out"] == len(left_out) + len(half)
    account(place.photos, FOLDER, {USABLE: without(place.photos, left_out), UNUSABLE: left_out})
    (inline,) = (place.folder / "runs/mae/evals").glob("knn*.json")
    check_outcomes(place, EvalReport.load(inline), len(half))
    place("eval knn runs/mae --train data/photos --test photos --nproc 2 --out knn.json")
    check_outcomes(place, EvalReport.load(place.folder / "knn.json"), len(half))


def check_outcomes(place: Place, report: EvalReport, num_half: int) -> None:
    """Each whole picture was judged once, by its own class; of the rest the report says how many they were."""
    names = {str(PurePosixPath(name).with_suffix("")): name for name in place.photos}
    judged = [names[k] for k in report.outcomes.keys]
    counted = report.data["left_out"]
    assert counted == {"train": num_half, "test": len(place.photos) - len(judged)}
    account(place.photos, FOLDER, {USABLE: judged, UNUSABLE: without(place.photos, judged)})
    assert [CLASSES[label] for label in report.outcomes.labels] == [place.photos[name].label for name in judged]


def test_captions_are_learned_from_tars_as_they_lie(place: Place) -> None:
    said = place("data index downloads").stdout
    assert "keys come again in several shards" in said
    assert "keys come again" not in place("data index laion").stdout
    for name, pictures in (("downloads", place.downloads), ("laion", place.laion)):
        found = lines(place("data verify", name, status=2).stdout, r"(\d+\.tar, \d+): \.jpg: expected ")
        faults = [fault.replace(", ", "/") for fault in found]
        account(pictures, TARS, {UNUSABLE: faults, (Fate.TAKEN, Fate.SILENT): without(pictures, faults)})
    recipe = write_recipe(
        place.folder / "clip.yaml", "",
        data={"train": "downloads", "val": "laion", "views": {"flip": 0.0}, "read_streams": 2},
        model=towers.OPEN_CLIP.model_dump(exclude_none=True, mode="json"), objective={"kind": "clip"},
        schedule={"samples": len(place.downloads), "warmup": 0.1}, batch={"global_size": 24},
        validation={"every_epochs": 1},
    )  # fmt: skip
    assert len(place.downloads) % 24 == 0
    place("train", recipe, "--nproc", 2, "--out", "runs/clip")
    log, values = log_and_metrics(place.folder / "runs/clip")
    bad = lines(log, r"bad sample (\S+) in ")
    account(place.downloads, TARS, {UNPAIRED: bad, USABLE: without(place.downloads, bad)})
    assert values["bad_samples"] == len(bad)
    place("eval retrieval runs/clip --test laion --out retrieval.json")
    report = EvalReport.load(place.folder / "retrieval.json")
    names = {name.partition("/")[2]: name for name in place.laion}
    judged = [names[k] for k in report.outcomes.keys]
    rest = without(place.laion, judged)
    account(place.laion, TARS, {USABLE: judged, UNPAIRED: rest})
    assert report.data["left_out"] == {"test": len(rest)} == {"test": values["val/left_out"]}
    place("eval zeroshot runs/clip --test photos --out zeroshot.json")
    report = EvalReport.load(place.folder / "zeroshot.json")
    assert report.data["left_out"]["test"] + report.n == len(place.photos)
