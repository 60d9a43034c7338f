"""Tables -> shards: every row's own image, caption and label; nothing guessed, nothing lost without a word."""

from __future__ import annotations

import csv
import gzip
import io
import os
import random
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_pipeline.errors import DataError, SourceError
from data_pipeline.ingest.convert import ConvertOptions, convert
from data_pipeline.ingest.image_normalizer import ImageNormalizer
from data_pipeline.ingest.layout import UniqueKeys
from data_pipeline.ingest.tables import Columns, _number, open_table
from data_pipeline.shards.load_manifest import load_manifest
from tests.data_pipeline.archives import as_folder, contents, jpeg
from tests.data_pipeline.test_convert import Killed, samples, shards

SMALL = ConvertOptions(shard_size=4)
Table = Sequence[dict[str, Any]]


def write_csv(path: Path, rows: Table, delimiter: str = ",") -> Path:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_tsv(path: Path, rows: Table) -> Path:
    return write_csv(path, rows, "\t")


def write_parquet(path: Path, rows: Table) -> Path:
    parquet.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=3)
    return path


WRITERS: dict[str, Callable[[Path, Table], Path]] = {
    "t.csv": write_csv,
    "t.CSV": write_csv,
    "t.csv.gz": write_csv,
    "t.tsv": write_tsv,
    "t.parquet": write_parquet,
}
CAPTIONS = [
    "plain",
    'with "quotes", commas',
    "two\nlines",
    "tab\there",
    "NA",
    "null",
    "3.50",
    "Grüße 日本",
    "=1+1",
    " x ",
]


def images(folder: Path, count: int = 10) -> Path:
    return as_folder(folder, {f"in/{i % 2}/{i:03d}.jpg": jpeg(i) for i in range(count)})


def rows(count: int = 10) -> list[dict[str, Any]]:
    return [
        {"id": i, "path": f"in/{i % 2}/{i:03d}.jpg", "caption": CAPTIONS[i % 10], "label": f"kind {i % 3}"}
        for i in range(count)
    ]


def one_line(caption: str) -> str:
    """A row has one caption, which `lines: true` must not read as two."""
    return " ".join(caption.split()) if len(caption.splitlines()) > 1 else caption


def read(folder: Path) -> dict[str, dict[str, Any]]:
    return {sample["__key__"]: sample for sample in samples(folder)}


@pytest.mark.parametrize("name", WRITERS)
def test_every_row_arrives_from_every_kind_of_table(tmp_path: Path, name: str) -> None:
    table = WRITERS[name](images(tmp_path / "source") / name, rows())
    done = convert(table, tmp_path / "out", SMALL)
    manifest = done.manifests[tmp_path / "out"]
    assert (manifest.total, manifest.fields) == (10, ("cls", "jpg", "txt"))
    assert manifest.classes == ("kind 0", "kind 1", "kind 2")
    assert manifest.label_counts is not None
    assert manifest.label_counts.tolist() == [4, 3, 3]
    found = read(tmp_path / "out")
    for i in range(10):
        sample = found[f"in/{i % 2}/{i:03d}"]
        assert sample["jpg"] == jpeg(i)
        assert sample["txt"].decode() == one_line(CAPTIONS[i])
        assert sample["cls"] == str(i % 3).encode()


def test_neither_the_kind_of_table_nor_the_processes_matter(tmp_path: Path) -> None:
    found = []
    source = images(tmp_path / "source")
    for name, workers in (("t.csv", 0), ("t.parquet", 2), ("t.tsv", 0)):
        convert(WRITERS[name](source / name, rows()), tmp_path / f"out-{name}", SMALL, workers=workers)
        found.append(shards(tmp_path / f"out-{name}"))
    assert found[0] == found[1] == found[2]


def test_rows_are_shuffled_or_keep_their_order(tmp_path: Path) -> None:
    table = write_csv(images(tmp_path / "s", 40) / "t.csv", rows(40))
    convert(table, tmp_path / "ordered", ConvertOptions(shuffle=False))
    convert(table, tmp_path / "mixed", ConvertOptions())
    ordered, mixed = ([s["__key__"] for s in samples(tmp_path / name)] for name in ("ordered", "mixed"))
    assert ordered == [f"in/{i % 2}/{i:03d}" for i in range(40)]
    assert sorted(mixed) == sorted(ordered)
    assert mixed != ordered


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1), min_size=1))
def test_whatever_a_caption_says_it_arrives_or_is_bad(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = as_folder(tmp_path_factory.mktemp("any"), {"a.jpg": jpeg(0)})
    table = write_csv(folder / "t.csv", [{"image": "a.jpg", "text": text} for text in texts])
    good = [text for text in texts if text.strip()]
    if not good:
        with pytest.raises(SourceError):
            convert(table, folder / "out", ConvertOptions(shuffle=False), skip_bad=True)
        return
    done = convert(table, folder / "out", ConvertOptions(shuffle=False), skip_bad=True)
    written = [sample["txt"].decode() for sample in samples(folder / "out")]
    assert written == [one_line(text) for text in good]
    assert all(len(text.splitlines()) == 1 for text in written)
    assert len(done.bad) == len(texts) - len(good)


def test_an_image_may_have_several_rows(tmp_path: Path) -> None:
    folder = as_folder(tmp_path, {"a.jpg": jpeg(0)})
    convert(write_csv(folder / "t.csv", [{"image": "a.jpg", "text": t} for t in "xyz"]), tmp_path / "out", SMALL)
    assert {key: sample["txt"] for key, sample in read(tmp_path / "out").items()} == {
        "a": b"x",
        "a~2": b"y",
        "a~3": b"z",
    }


def test_columns_may_be_named_and_lie_elsewhere_than_the_images(tmp_path: Path) -> None:
    source = images(tmp_path / "source")
    table = write_csv(tmp_path / "t.csv", [{"a": f"{i % 2}/{i:03d}.jpg", "b": f"c{i}", "text": "no"} for i in range(4)])
    columns = Columns(image="a", label="b", caption="b", root=source / "in")
    convert(table, tmp_path / "out", SMALL, columns=columns)
    assert {(s["txt"], s["cls"]) for s in samples(tmp_path / "out")} == {
        (f"c{i}".encode(), b"%d" % i) for i in range(4)
    }


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        (["0", "10", "2"], {"0": 0, "10": 10, "2": 2}, None),
        (["3.0", "1.0"], {"3.0": 3, "1.0": 1}, None),  # pandas' way with gaps
        (["b", "a", "1"], {"1": 0, "a": 1, "b": 2}, ["1", "a", "b"]),
        (["01", "x1"], {"01": 0, "x1": 1}, ["01", "x1"]),
    ],
)
def test_labels_are_numbers_or_names(labels: list[str], numbers: dict[str, int], classes: list[str] | None) -> None:
    assert _number(Path("t"), set(labels)) == (numbers, classes)


@pytest.mark.parametrize("labels", [["-1", "0"], ["0.5", "1"], ["1e3", "2"], ["10000000"], ["9" * 5000]])
def test_numbers_that_are_no_labels_are_refused(labels: list[str]) -> None:
    with pytest.raises(SourceError, match="label column: expected whole numbers"):
        _number(Path("t"), set(labels))


@pytest.mark.parametrize("column", [[3, 1, 0], [3.0, 1.0, 0.0], ["3", "1", "0"]])
def test_labels_of_any_type_of_a_parquet_file(tmp_path: Path, column: list[Any]) -> None:
    source = images(tmp_path / "s")
    table = pa.table({"path": [r["path"] for r in rows(3)], "label": pa.array(column)})
    parquet.write_table(table, source / "t.parquet")
    convert(source / "t.parquet", tmp_path / "out", ConvertOptions(shuffle=False))
    assert [sample["cls"] for sample in samples(tmp_path / "out")] == [b"3", b"1", b"0"]


def test_categories_of_a_parquet_file_are_names_in_their_order(tmp_path: Path) -> None:
    source = images(tmp_path / "s")
    column = pa.array(["b", "a", "b"]).dictionary_encode()
    parquet.write_table(pa.table({"path": [r["path"] for r in rows(3)], "class": column}), source / "t.parquet")
    convert(source / "t.parquet", tmp_path / "out", ConvertOptions(shuffle=False))
    assert [sample["cls"] for sample in samples(tmp_path / "out")] == [b"1", b"0", b"1"]


def test_bad_rows_are_told_all_at_once_and_may_be_skipped(tmp_path: Path) -> None:
    source = as_folder(images(tmp_path / "source"), {"bad.jpg": b"no image", "folder/x": b""})
    good = [{k: row[k] for k in ("path", "caption", "label")} for row in rows(6)]
    lines = write_csv(source / "t.csv", good).read_bytes().split(b"\r\n")
    lines[3:3] = [
        b"in/gone.jpg,words,kind 0",
        b"bad.jpg,words,kind 0",
        b"folder,words,kind 0",
        b"in/0/000.jpg,,kind 0",
        b"in/0/000.jpg,  ,kind 0",
        b"in/0/000.jpg,words,",
        b"in/0/000.jpg,caf\xe9,kind 0",
        b",words,kind 0",
        b"too,many,values,here",
        b"too few \xff",
    ]
    (source / "t.csv").write_bytes(b"\r\n".join(lines))
    with pytest.raises(SourceError, match="10 that cannot") as caught:
        convert(source / "t.csv", tmp_path / "out", SMALL)
    for said in ("line 4 (in/gone.jpg): No such", "line 6 (folder): a folder", "line 12: 4 for 3", "line 13: 1 for 3"):
        assert said in str(caught.value)
    done = convert(source / "t.csv", tmp_path / "out", SMALL, skip_bad=True)
    assert done.manifests[tmp_path / "out"].total == 6
    assert done.num_images == 16
    convert(source / "t.csv", tmp_path / "fresh", SMALL, skip_bad=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_images_are_made_smaller_as_those_of_a_folder_are(tmp_path: Path) -> None:
    source = as_folder(tmp_path / "s", {"a.jpg": jpeg(0, 40, 80), "b.jpg": jpeg(1, 10, 10)})
    options = ConvertOptions(short_side=20)
    convert(write_csv(tmp_path / "t.csv", [{"image": "a.jpg"}, {"image": "b.jpg"}]), tmp_path / "out", options,
            columns=Columns(root=source))  # fmt: skip
    convert(source, tmp_path / "other", options)
    by_key = [{key: s["jpg"] for key, s in read(tmp_path / name).items()} for name in ("out", "other")]
    assert by_key[0] == by_key[1]


@pytest.mark.parametrize("name", ["../secret.jpg", "in/../../secret.jpg", "{whole}/secret.jpg", "in/../.."])
def test_paths_do_not_leave_the_root_unless_they_may(tmp_path: Path, name: str) -> None:
    as_folder(tmp_path, {"secret.jpg": jpeg(9), "root/in/a.jpg": jpeg(0)})
    table = write_csv(tmp_path / "root/t.csv", [{"image": "in/a.jpg"}, {"image": name.format(whole=tmp_path)}])
    with pytest.raises(SourceError, match=r"line 3: expected a path inside .*--allow-outside"):
        convert(table, tmp_path / "out", SMALL, skip_bad=True)
    assert not (tmp_path / "out").exists()
    if name.endswith("jpg"):
        done = convert(table, tmp_path / "out", SMALL, columns=Columns(allow_outside=True))
        assert done.manifests[tmp_path / "out"].total == 2
        assert all(".." not in key and not key.startswith("/") for key in read(tmp_path / "out"))


def test_a_whole_path_inside_the_root_is_like_a_relative_one(tmp_path: Path) -> None:
    source = images(tmp_path / "s")
    convert(write_csv(source / "t.csv", [{"image": f"{source}/in/0/000.jpg"}]), tmp_path / "out", SMALL)
    assert list(read(tmp_path / "out")) == ["in/0/000"]


def test_a_device_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(SourceError, match="a folder or device"):
        convert(write_csv(tmp_path / "t.csv", [{"image": "pipe.jpg"}]), tmp_path / "out", SMALL)


WRONG: dict[str, tuple[str, bytes, str]] = {
    "no image column": ("t.csv", b"a,b\n1,2\n", r"image column: expected one of image,.* columns a, b.*--image-column"),
    "urls alone": ("t.csv", b"url,caption\nhttp://x/a.jpg,c\n", r"image column.*img2dataset"),
    "urls as paths": ("t.csv", b"image\nhttps://x.org/a.jpg\n", r"line 2: .*'https://x.org/a.jpg'.*img2dataset"),
    "twice": ("t.csv", b"image,image\na,b\n", r"expected one column 'image'"),
    "empty": ("t.csv", b"", r"image column: .*found no columns"),
    "half a quotation": ("t.csv", b'image,text\na.jpg,"words\nb.jpg,words\n', r"unexpected end of data"),
    "words behind one": ("t.csv", b'image,text\na.jpg,"big" dog\n', r"expected after"),
    "header alone": ("t.csv", b"image,caption\n", r"expected a table with rows, found none"),
    "no parquet": ("t.parquet", b"PAR1 nonsense", r"expected a whole table"),
    "no gzip": ("t.csv.gz", b"image\n", r"expected a whole table"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_table_that_cannot_be_used_is_refused(tmp_path: Path, kind: str) -> None:
    name, data, said = WRONG[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=said):
        convert(tmp_path / name, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet"])
def test_damaged_anywhere_a_table_gives_rows_or_an_error_of_ours(tmp_path: Path, name: str) -> None:
    folder = as_folder(tmp_path, {"a.jpg": jpeg(0)})
    table = [{"image": "a.jpg", "caption": CAPTIONS[i % 10], "label": i} for i in range(20)]
    whole = WRITERS[name](folder / name, table).read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 2, 5])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (folder / name).write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        with suppress(DataError):
            assert len(open_table(folder / name, Columns(), ImageNormalizer(None, 10**6), tmp_path).store.offsets) > 0


def test_columns_that_are_not_there_or_hold_something_else(tmp_path: Path) -> None:
    source = images(tmp_path / "s")
    table = write_csv(source / "t.csv", rows(3))
    with pytest.raises(SourceError, match=r"caption column: expected one column 'words', found the columns id, path"):
        convert(table, tmp_path / "out", SMALL, columns=Columns(caption="words"))
    nested = pa.table({"path": [r["path"] for r in rows(3)], "caption": [["a"], ["b"], ["c"]]})
    parquet.write_table(nested, source / "t.parquet")
    with pytest.raises(SourceError, match=r"column caption: expected text or numbers, found list"):
        convert(source / "t.parquet", tmp_path / "out", SMALL)
    with pytest.raises(SourceError, match="expected a table, found nothing there"):
        convert(tmp_path / "gone.csv", tmp_path / "out", SMALL)


def test_options_of_another_kind_of_source_are_refused(tmp_path: Path) -> None:
    source = images(tmp_path / "s")
    table = write_csv(source / "t.csv", rows(3))
    with pytest.raises(SourceError, match="--split-by-folder: expected an image folder"):
        convert(table, tmp_path / "out", ConvertOptions(split_by_folder=True))
    with pytest.raises(SourceError, match="--caption-field: expected WebDataset shards"):
        convert(table, tmp_path / "out", SMALL, caption_field="txt")
    with pytest.raises(SourceError, match=r"-column: expected a table"):
        convert(source / "in", tmp_path / "out", SMALL, columns=Columns(image="a"))
    with pytest.raises(SourceError, match=r"found a URL.*img2dataset"):
        convert(Path("https://host/list.csv"), tmp_path / "out", SMALL)
    (tmp_path / "urls.txt").write_text("http://x/a.jpg\n")
    with pytest.raises(SourceError, match=r"another kind of file.*img2dataset"):
        convert(tmp_path / "urls.txt", tmp_path / "out", SMALL)


def test_it_goes_on_where_it_was_stopped_and_not_with_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = images(tmp_path / "s")
    table = write_csv(source / "t.csv", rows())
    convert(table, tmp_path / "whole", SMALL)
    replace = os.replace
    left = 4

    def replace_until(a: Any, b: Any) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        replace(a, b)

    monkeypatch.setattr("os.replace", replace_until)
    with pytest.raises(Killed):
        convert(table, tmp_path / "out", SMALL)
    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(DataError, match="unfinished"):
        load_manifest(str(tmp_path / "out"))
    (source / "in/0/000.jpg").rename(tmp_path / "kept")
    (source / "in/0/000.jpg").write_bytes(jpeg(77))
    with pytest.raises(DataError, match="source = "):
        convert(table, tmp_path / "out", SMALL)
    (tmp_path / "kept").rename(source / "in/0/000.jpg")
    convert(table, tmp_path / "out", SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_of_many_rows_only_keys_and_offsets_stay_in_memory(tmp_path: Path) -> None:
    """Captions of 20 MB in all: what Python holds on to meanwhile is a small part of that."""
    as_folder(tmp_path, {"a.jpg": jpeg(0)})
    with (tmp_path / "t.csv").open("w") as file:
        file.write("image,caption\n")
        file.writelines(f"a.jpg,{n} {'x' * 2000}\n" for n in range(10_000))
    keys = UniqueKeys.of
    UniqueKeys.of = lambda self, name: name  # type: ignore[method-assign]
    tracemalloc.start()
    try:
        opened = open_table(tmp_path / "t.csv", Columns(), ImageNormalizer(None, 10**6), tmp_path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        UniqueKeys.of = keys  # type: ignore[method-assign]
    assert len(opened.store.offsets) == 10_000
    assert kept < 10**6
    assert peak < 10**6
