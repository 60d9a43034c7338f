"""`pretrain data ...` as a user meets it: exit status, what is said, and what is left on disk."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.shards.load_manifest import load_manifest
from launch.cli import main
from pretrain.evals.zeroshot.protocol import nonempty_lines
from tests.data_pipeline.archives import as_folder, as_tar, as_tar_gz, class_folders, contents, jpeg

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `pretrain data ...` here, in an empty folder, and gives (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pretrain", "data", *map(str, words)])
        try:
            status = main()
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 1
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_make_verify_and_stats(data: Run, tmp_path: Path) -> None:
    make = (
        "make",
        "shapes",
        "out",
        "--samples",
        "20",
        "--size",
        "16",
        "--shard-size",
        "10",
        "--workers",
        "1",
    )
    assert data(*make) == (0, "out: 20 samples, 48 classes, 2 shards, 0.1 MB, fields cls jpg json txt\n", "")
    status, out, _ = data("verify", "out", "--workers", "1")
    assert (status, out) == (0, "out: sound; 20 samples in 2 shards, 0.1 MB\n")
    status, out, _ = data("stats", "out", "--out", "sheet.png")
    assert status == 0
    assert "    1 red square" in out
    assert "width 16 to 16" in out
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_convert_tells_what_it_left_out(data: Run, tmp_path: Path) -> None:
    files = class_folders(6, top="set/train/") | {"set/test/cat/1.jpg": jpeg(7), "set/readme.txt": b""}
    as_tar_gz(tmp_path / "a.tar.gz", files | {"set/train/cat/bad.jpg": b"bad"})
    convert = ("convert", "a.tar.gz", "out", "--split-by-folder", "--workers", "1")
    status, _, err = data(*convert)
    assert status == 2
    assert "set/train/cat/bad.jpg" in err
    assert "--skip-bad" in err
    status, out, _ = data(*convert, "--skip-bad")
    assert status == 0
    assert out.splitlines()[1:] == [
        "left out 1 bad image",
        "passed over, being no images: 1 file (1 .txt), such as set/readme.txt",
        "passed over set/, which all images share",
        "out/test: 1 samples, 3 classes, 1 shard, 0.0 MB, fields cls jpg",
        "out/train: 6 samples, 3 classes, 1 shard, 0.0 MB, fields cls jpg",
    ]


def test_convert_accounts_for_every_file(data: Run, tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    avif = io.BytesIO()
    picture.save(avif, "AVIF")
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(8)
    taken = {"cat/a.JPG": jpeg(0), "cat/b.jfif": jpeg(1), "dog/c.AVIF": avif.getvalue()}
    refused = {"eel/d.heic": heic, "eel/e.HEIC": heic, "cat/f.jpg": heic, "cat/g.jxl": b"\xff\x0a", "cat/h.jpg": b"?"}
    others = {"cat/notes.txt": b"", "fox/notes.txt": b"", "list.JSON": b"", ".DS_Store": b""}
    as_folder(tmp_path / "in", taken | refused | others)
    convert = ("convert", "in", "out", "--workers", "1")
    status, _, err = data(*convert)
    assert (status, "expected images in each class folder, found none in fox" in err) == (2, True)
    assert not (tmp_path / "out").exists()
    for name in ("cat/notes.txt", "fox/notes.txt"):
        (tmp_path / "in" / name).unlink()
    (tmp_path / "in/fox").rmdir()
    status, _, err = data(*convert)
    assert (status, "5 that cannot" in err, "object at" in err) == (2, True, False)
    assert all(name in err for name in refused)
    assert "with heif-convert or ImageMagick. Convert it to JPEG, PNG, WebP or AVIF first, with djxl" in err
    status, out, _ = data(*convert, "--skip-bad")
    assert status == 0
    assert {line.split(":")[1].strip() for line in out.splitlines() if line.startswith("left out:")} == set(refused)
    assert out.splitlines()[-4:-1] == [
        "left out 5 bad images",
        "passed over, being no images: 2 files (1 hidden, 1 .JSON), such as list.JSON",
        "classes without an image now: eel",
    ]
    samples = load_manifest("out")
    assert (samples.total, samples.classes, samples.fields) == (3, ("cat", "dog", "eel"), ("avif", "cls", "jpg"))
    assert data("verify", "out", "--workers", "1")[0] == 0


def test_convert_leaves_out_folders_without_images_only_where_it_is_told_to(data: Run, tmp_path: Path) -> None:
    as_tar_gz(tmp_path / "a.tar.gz", class_folders(3) | {"docs/readme.txt": b""})
    assert data("convert", "a.tar.gz", "out", "--workers", "1")[0] == 2
    status, out, _ = data("convert", "a.tar.gz", "out", "--workers", "1", "--skip-bad")
    assert (status, "left out the folders without images: docs\n" in out) == (0, True)
    assert load_manifest("out").classes == ("cat", "dog", "eel")


def test_index_takes_class_names(data: Run, tmp_path: Path) -> None:
    as_tar(tmp_path / "a.tar", {"x.jpg": jpeg(0), "x.cls": b"1"})
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "holes.txt").write_text("cat\n\ndog\n")
    status, _, err = data("index", ".", "--classes", "holes.txt")
    assert (status, "empty one" in err) == (2, True)
    status, _, err = data("index", ".", "--classes", "none.txt")
    assert (status, "none.txt" in err) == (2, True)
    status, out, _ = data("index", "a.tar", "--classes", "names.txt")
    assert (status, out) == (0, ".: 1 samples, 2 classes, 1 shard, 0.0 MB, fields cls jpg\n")
    assert data("verify", ".")[0] == 0


@pytest.mark.parametrize("text", ["\ufeffcat\ndog\n", "\ufeffcat\r\ndog"])
def test_class_names_may_begin_with_an_editors_mark(data: Run, tmp_path: Path, text: str) -> None:
    as_tar(tmp_path / "a.tar", {"x.jpg": jpeg(0), "x.cls": b"1"})
    (tmp_path / "names.txt").write_bytes(text.encode())
    assert data("index", "a.tar", "--classes", "names.txt")[0] == 0
    assert load_manifest(".").classes == ("cat", "dog")
    assert nonempty_lines(tmp_path / "names.txt", "names") == ("cat", "dog")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("index", "a.tar", "--classes", "none.txt"), "none.txt: expected a text file, one class name a line, found"),
        (("index", "a.tar", "--classes", "."), "found Is a directory."),
        (("index", "a.tar", "--classes", "utf16.txt"), "one class name a line, found UTF-16. Save it as UTF-8."),
        (("convert", "none.csv", "out"), "found nothing there"),
        (("convert", "a.jpg", "out"), "another kind of file"),
        (("convert", "folder", "out"), "found 1 that cannot: x.png: 5 bytes that are none (no known format)"),
    ],
)  # fmt: skip
def test_messages_hold_no_numbers_of_errors_and_no_addresses(
    data: Run, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    as_tar(tmp_path / "a.tar", {"x.jpg": jpeg(0), "x.cls": b"1"})
    as_folder(tmp_path, {"a.jpg": jpeg(0), "folder/x.png": b"bytes", "utf16.txt": "cat".encode("utf-16")})
    status, _, err = data(*words, "--workers", "1")
    assert (status, said in err) == (2, True), err
    assert not re.search(r"\[Errno|object at|0x[0-9a-f]{6}|Traceback", err)


def test_verify_lists_faults_and_ends_with_status_2(data: Run, tmp_path: Path) -> None:
    data("make", "shapes", "out", "--samples", "4", "--size", "16", "--workers", "1")
    shard = tmp_path / "out/shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[512] ^= 1
    shard.write_bytes(content)
    status, out, err = data("verify", "out", "--workers", "1")
    assert status == 2
    assert "shard-000000.tar, shapes/train/0000000: .cls has other bytes" in out
    assert err.startswith("error: out: expected a dataset without a fault")


def test_half_pictures_in_whole_shards_are_told_from_damaged_shards(data: Run, tmp_path: Path) -> None:
    as_folder(tmp_path / "in", {**class_folders(6), "cat/half.jpg": jpeg(7, 40, 40)[:-500]})
    data("convert", "in", "out", "--workers", "1")
    status, out, err = data("verify", "out", "--workers", "1")
    assert (status, "cat/half: .jpg: expected a whole image" in out) == (2, True)
    assert "repair the source and convert it again" in err
    status, out, _ = data("stats", "out", "--out", "sheet.png")
    assert (status, "not on the contact sheet: cat/half.jpg: expected a whole image" in out) == (0, True)
    shard = tmp_path / "out/shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[512] ^= 1
    shard.write_bytes(content)
    assert "Copy the shards again" in data("verify", "out", "--workers", "1")[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("verify", "pipe:touch hacked"), "a pipe: URL"),
        (("stats", "ftp://host/{0..9}.tar"), "a ftp: URL"),
        (("index", "nowhere"), "nowhere"),
        (("convert", "nowhere", "out"), "nothing there"),
        (("convert", "images", "images"), "other files"),
        (("make", "cats", "out", "--samples", "1"), "cats"),
        (("make", "digits", "out", "--samples", "99999"), "at most 1,437"),
        (("make", "fractals", "out", "--samples", "5", "--size", "2"), "--size"),
    ],
)
def test_wrong_input_is_told_and_changes_nothing(data: Run, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    as_folder(tmp_path / "images", class_folders(3))
    before = contents(tmp_path)
    status, out, err = data(*words)
    assert status == 2
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["make", "convert", "index", "verify", "stats"])
def test_help_has_an_example(data: Run, command: str) -> None:
    status, out, _ = data(command, "--help")
    assert status == 0
    assert f"pretrain data {command}" in out.partition("Examples:")[2]


def test_convert_a_table_from_the_command_line(data: Run, tmp_path: Path) -> None:
    as_folder(tmp_path / "images", class_folders(6))
    lines = [f"{name},{name[:3]},a photo of {name}" for name in class_folders(6)]
    (tmp_path / "birds.csv").write_text("\n".join(["file,species,text", *lines, "cat/gone.jpg,cat,a ghost"]))
    words = ("convert", "birds.csv", "out", "--root", "images", "--image-column", "file", "--workers", "1")
    status, _, err = data(*words, "--label-column", "species")
    assert (status, "line 8 (cat/gone.jpg): No such file" in err) == (2, True)
    status, out, _ = data(*words, "--label-column", "species", "--skip-bad")
    assert status == 0
    assert "left out 1 bad image\n" in out
    assert "out: 6 samples, 3 classes, 1 shard" in out
    assert "fields cls jpg txt" in out
    (tmp_path / "images/cat/0000.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    status, _, err = data("convert", "birds.csv", "other", *words[3:])
    assert (status, "(cat/0000.jpg): HEIC" in err, "with heif-convert" in err) == (2, True, True)
    status, _, err = data(*words, "--caption-column", "words")
    assert (status, "caption column: expected one column 'words', found the columns file, species, text" in err) == (
        2,
        True,
    )


def test_convert_other_shards_from_the_command_line(data: Run, tmp_path: Path) -> None:
    for tar in (0, 1):
        rows = {f"{tar}{i}.{field}": value for i in range(3) for field, value in told(i).items()}
        (tmp_path / "laion").mkdir(exist_ok=True)
        as_tar(tmp_path / f"laion/0000{tar}.tar", rows)
    assert data("convert", "laion", "out", "--caption-field", "json:caption", "--workers", "1")[0] == 0
    assert data("verify", "out", "--workers", "1")[1].startswith("out: sound; 6 samples in 1 shard")
    status, _, err = data("convert", "laion", "other", "--image-column", "x")
    assert (status, "expected a table" in err) == (2, True)


def told(i: int) -> dict[str, bytes]:
    return {"jpg": jpeg(i), "json": b'{"caption": "number %d"}' % i}
