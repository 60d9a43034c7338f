"""Shards behind URLs: the same samples as from the disk, whatever the server does."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.datasets.dataset import Part
from data_pipeline.datasets.mixture import Mixture
from data_pipeline.datasets.read import ShardDataset, open_dataset
from data_pipeline.datasets.remote_parts import remote_parts
from data_pipeline.datasets.selection import Subset
from data_pipeline.errors import DataError, ManifestError, PretrainError, RunError, ShardError
from data_pipeline.inspect.stats import stats
from data_pipeline.inspect.verify import verify
from data_pipeline.order.order import Order
from data_pipeline.remote import fetch as remote
from data_pipeline.remote.cache import Cache
from data_pipeline.remote.config import CacheConfig
from data_pipeline.remote.prefetch import Prefetcher, check_room
from data_pipeline.shards import load_manifest
from data_pipeline.shards.scan import index_shards
from tests.data_pipeline.servers import FolderServer, bucket, served
from tests.data_pipeline.test_read import all_samples
from tests.data_pipeline.tiny import loader, rows_of, steps, write_shards

SIZES = [3, 0, 5, 1, 4, 3]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return write_shards(tmp_path_factory.mktemp("local"), SIZES)


@pytest.fixture
def server(local: ShardDataset) -> Iterator[FolderServer]:
    assert isinstance(local.manifest.root, Path)
    with served(local.manifest.root) as found:
        yield found


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(load_manifest, "_MAX_BYTES", 10**6)


@pytest.fixture
def spec(tmp_path: Path) -> CacheConfig:
    return CacheConfig(folder=str(tmp_path / "cache"), max_gb=1.0, timeout_seconds=10, retries=2)


def changed(spec: CacheConfig, **values: Any) -> CacheConfig:
    return spec.model_copy(update=values)


def files(spec: CacheConfig) -> set[str]:
    """What lies in the cache, the lock and the notes of what was checked apart."""
    folder = Path(spec.folder)
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return {name for name in names if name != ".lock" and not name.endswith(".ok")}


def opened(url: str, spec: CacheConfig) -> ShardDataset:
    dataset = open_dataset(url, spec)
    assert isinstance(dataset, ShardDataset)
    return dataset


def test_http_gives_the_samples_of_the_disk_and_asks_once(
    local: ShardDataset, server: FolderServer, spec: CacheConfig
) -> None:
    dataset = opened(server.url, spec)
    assert all_samples(dataset) == all_samples(local)
    assert dataset.fingerprint == local.fingerprint
    assert sorted(server.requests) == sorted(set(server.requests))
    asked = len(server.requests)
    assert all_samples(pickle.loads(pickle.dumps(dataset))) == all_samples(local)
    assert all_samples(opened(f"{server.url}/", spec)) == all_samples(local)
    assert server.requests[asked:] == ["manifest.json"]
    assert dataset.origin(4) == local.origin(4)


def test_s3_gives_the_samples_of_the_disk(
    local: ShardDataset, spec: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(local.manifest.root, Path)
    with bucket(local.manifest.root, monkeypatch) as url:
        assert all_samples(opened(url, spec)) == all_samples(local)
        with pytest.raises(ManifestError, match=r"s3://shards/none/manifest.json: .* no such file"):
            open_dataset("s3://shards/none", spec)
    with pytest.raises(RunError, match=r"s3://shards/a/manifest.json: .* no connection .* 3 attempts") as caught:
        open_dataset(url, spec)
    assert "sesame" not in str(caught.value)


def test_a_pattern_behind_a_url_opens_its_shards_only(
    local: ShardDataset, server: FolderServer, spec: CacheConfig
) -> None:
    whole = all_samples(local)
    assert all_samples(opened(f"{server.url}/part-{{002..003}}.tar", spec)) == whole[3:9]
    assert all_samples(opened(f"{server.url}/manifest.json", spec)) == whole
    with pytest.raises(ManifestError, match=r"no part-009\.tar"):
        open_dataset(f"{server.url}/part-009.tar", spec)
    with pytest.raises(ShardError, match="several hosts"):
        open_dataset(f"http://{{a,b}}.{server.url[7:]}/x.tar", spec)


def test_verify_and_stats_read_urls(
    tmp_path: Path, local: ShardDataset, server: FolderServer, spec: CacheConfig
) -> None:
    assert isinstance(local.manifest.root, Path)
    assert verify(server.url, cache=spec) == verify(str(local.manifest.root))
    found = stats(server.url, tmp_path / "sheet.png", cache=spec)
    assert sorted(found.image_bytes) == sorted(len(sample.fields["jpg"]) for sample in all_samples(local))
    server.choose = lambda number, name: "404" if name == "part-002.tar" else None
    faults = [str(fault) for fault in verify(server.url, cache=changed(spec, folder=str(tmp_path / "fresh"))).faults]
    assert len(faults) == 1
    assert "part-002.tar" in faults[0]
    assert "no such file" in faults[0]
    with pytest.raises(DataError, match="local folder"):
        index_shards(server.url)


def quick(spec: CacheConfig, fault: str, seconds: float = 0.5) -> CacheConfig:
    """Not waiting long where nothing will come."""
    return changed(spec, timeout_seconds=seconds) if fault in ("stall", "trickle", "drip") else spec


TRANSIENT = ["500", "503", "429", "page", "truncate", "short", "stall", "endless", "trickle", "drip"]
LASTING = ["404", "403", "redirect file:///etc/passwd", "redirect ftp://127.0.0.1/x"]


@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_fails_once_is_tried_again(
    local: ShardDataset, server: FolderServer, spec: CacheConfig, fault: str
) -> None:
    """The first request for each file fails; every second one for the same file does not."""
    server.choose = lambda number, name: None if name in server.requests else fault
    dataset = opened(server.url, quick(spec, fault, seconds=2))
    assert dataset.read(4) == local.read(4)
    assert server.requests == ["manifest.json"] * 2 + ["part-002.idx"] * 2 + ["part-002.tar"] * 2


def test_making_a_connection_ready_is_not_counted_as_waiting_for_the_server(
    server: FolderServer, spec: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a process's first transfer, which imports what makes connections."""
    ready = remote.backend

    def slow(*args: Any) -> Any:
        time.sleep(2.2)
        return ready(*args)

    monkeypatch.setattr(remote, "backend", slow)
    opened(server.url, changed(spec, timeout_seconds=2))
    assert server.requests == ["manifest.json"]


@pytest.mark.parametrize("name", ["manifest.json", "part-002.idx", "part-002.tar"])
@pytest.mark.parametrize("fault", TRANSIENT + LASTING)
def test_what_fails_always_is_told_after_bounded_attempts(
    server: FolderServer, spec: CacheConfig, fault: str, name: str
) -> None:
    server.choose = lambda number, asked: fault if asked == name else None
    with pytest.raises(PretrainError) as caught:
        opened(server.url, quick(spec, fault)).read(4)
    assert caught.value.where == f"{server.url}/{name}"
    attempts = 1 if fault in LASTING else 3
    assert server.requests.count(name) == attempts
    assert ("3 attempts" in str(caught.value)) == (attempts == 3)
    wrong_content = fault in LASTING or fault in ("page", "short")
    assert isinstance(caught.value, RunError) != wrong_content
    assert not [left for left in files(spec) if left.startswith(".")]
    server.choose = lambda number, asked: None
    assert opened(server.url, spec).read(4).key == "0004"


def test_other_bytes_of_the_right_size_are_never_used(server: FolderServer, spec: CacheConfig) -> None:
    server.choose = lambda number, name: "flip" if name == "part-002.tar" else None
    with pytest.raises(ShardError, match=r"part-002.tar: expected a shard of .* sha256"):
        opened(server.url, spec).read(4)
    assert not [name for name in files(spec) if name.endswith(".tar")]


def test_a_redirect_within_http_is_followed(local: ShardDataset, server: FolderServer, spec: CacheConfig) -> None:
    assert isinstance(local.manifest.root, Path)
    with served(local.manifest.root) as other:
        server.choose = lambda number, name: f"redirect {other.url}/{name}"
        assert opened(server.url, spec).read(4) == local.read(4)
    assert other.requests == server.requests


@pytest.mark.parametrize(
    "url", ["http://me:sesame@host/a", "https://host/a?X-Amz-Signature=sesame", "s3://key:sesame@b/a", "pipe:sesame"]
)
def test_what_may_be_a_secret_is_refused_and_not_repeated(url: str, spec: CacheConfig) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(url, spec)
    assert "sesame" not in f"{caught.value}{caught.value!r}"


@pytest.mark.parametrize("url", ["http:///a", "s3://", "http://host:abc/a", "http://host:0/a", "http://a b/c"])
def test_urls_without_a_host_are_refused(url: str, spec: CacheConfig) -> None:
    with pytest.raises(DataError, match="a URL such as"):
        open_dataset(url, spec)


def test_a_signed_url_that_a_server_redirects_to_is_not_told(server: FolderServer, spec: CacheConfig) -> None:
    server.choose = lambda number, name: "redirect http://127.0.0.1:9/x?Signature=sesame"
    with pytest.raises(RunError) as caught:
        open_dataset(server.url, spec)
    assert "sesame" not in f"{caught.value}{caught.value!r}{caught.value.__cause__!r}"
    assert caught.value.__suppress_context__ or "sesame" not in repr(caught.value.__context__)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_reads_the_same_rows_through_a_cache_smaller_than_the_data(
    local: ShardDataset, server: FolderServer, spec: CacheConfig, num_workers: int
) -> None:
    """One request in seven fails; the parent has connections of its own when it forks the workers."""
    server.choose = lambda number, name: (None, "500", "truncate")[number % 14 // 7 + 1] if number % 7 == 3 else None
    largest = int(local.manifest.num_bytes.max())
    small = changed(spec, max_gb=(3 * largest + 2_000) / 1e9, retries=5)
    dataset = opened(server.url, small)
    got = steps(loader(dataset, read_streams=2, shuffle_window=3, num_workers=num_workers), 4, 24)
    expected = steps(loader(local, read_streams=2, shuffle_window=3), 4, 24)
    assert [rows_of(step) for step in got] == [rows_of(step) for step in expected]
    assert len([name for name in server.requests if name.endswith(".tar")]) > len(SIZES)  # some were dropped
    kept = [path.stat().st_size for path in Path(spec.folder).iterdir() if not path.name.startswith(".")]
    assert sum(kept) <= small.max_bytes


def test_a_mixture_of_near_and_far_is_that_of_the_disk(
    tmp_path: Path, local: ShardDataset, server: FolderServer, spec: CacheConfig
) -> None:
    near = write_shards(tmp_path / "near", [4, 2])

    def mixed(far: ShardDataset) -> Mixture:
        return Mixture([Part("near", near, 1.0), Part("far", far, 2.0)])

    dataset = mixed(opened(server.url, spec))
    assert [(part.first, part.num_samples) for part in remote_parts(dataset)] == [(6, 16)]
    assert dataset.fingerprint == mixed(local).fingerprint
    got, expected = (
        steps(loader(source, read_streams=2, shuffle_window=3), 4, 12) for source in (dataset, mixed(local))
    )
    assert [rows_of(step) for step in got] == [rows_of(step) for step in expected]


def test_of_a_subset_what_it_reads_is_fetched(server: FolderServer, spec: CacheConfig) -> None:
    far = opened(server.url, spec)
    (part,) = remote_parts(Subset(far, np.array([1, far.num_samples - 1]), None))
    assert part.shards is far
    assert part.shards_in(np.arange(2)).tolist() == far.shards_in(np.array([1, far.num_samples - 1])).tolist()


def test_threads_fetch_what_the_next_steps_read(tmp_path: Path, spec: CacheConfig) -> None:
    """After each step, the shards of the next ones come without being read, and no more than a few."""
    local = write_shards(tmp_path / "many", [8] * 12)
    with served(tmp_path / "many") as server:
        dataset = opened(server.url, spec)
        order = Order(dataset.shard_sizes, seed=5, read_streams=2, shuffle_window=4)
        stream = loader(dataset, read_streams=2, shuffle_window=4, global_size=4).steps(0)
        for _ in islice(stream, 3):
            pass
        coming = [np.unique(dataset.shards_in(order.locate(order.step_positions(c, 4)))) for c in range(0, 96, 4)]
        in_order = list(dict.fromkeys(int(shard) for shards in coming for shard in shards))
        taken = {int(shard) for shards in coming[:3] for shard in shards}
        expected = [f"part-{shard:03d}.tar" for shard in in_order[: len(taken) + 2]]
        deadline = time.monotonic() + 60
        while len([n for n in server.requests if n.endswith(".tar")]) < len(expected):
            assert time.monotonic() < deadline, server.requests
            time.sleep(0.01)
        time.sleep(0.2)
        assert {name for name in server.requests if name.endswith(".tar")} == set(expected)
        stream.close()  # type: ignore[attr-defined]
    assert len(expected) < len(local.shard_sizes)


def test_looking_ahead_has_an_end_where_nothing_is_to_be_fetched() -> None:
    looked: list[int] = []

    def coming() -> Iterator[tuple[int, None]]:
        for position in range(0, 10**9, 10):
            looked.append(position)
            yield position, None

    prefetcher = Prefetcher(coming(), 3)
    for cursor, expected in ((0, 3), (1, 4), (11, 5), (45, 8)):
        prefetcher.reached(cursor)
        deadline = time.monotonic() + 60
        while len(looked) < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(looked) == expected
    prefetcher.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_dead_server_ends_the_loader_with_its_url(server: FolderServer, spec: CacheConfig) -> None:
    dataset = opened(server.url, spec)
    server.close()
    with pytest.raises(RunError, match=rf"{server.url}/part-.*3 attempts"):
        steps(loader(dataset, num_workers=1), 0, 5)


def test_a_bound_below_what_is_read_at_once_is_told_before_anything_starts(tmp_path: Path, spec: CacheConfig) -> None:
    """Two streams, each in two shards with one more to come: six of ten."""
    local = write_shards(tmp_path / "ten", [4] * 10)
    largest = int(local.manifest.num_bytes.max())
    options = {"read_streams": 2, "shuffle_window": 2, "world_size": 1, "local_size": 1}
    with served(tmp_path / "ten") as server:
        five, six = (opened(server.url, changed(spec, max_gb=(n * largest + 1) / 1e9)) for n in (5, 6))
        with pytest.raises(DataError, match=r"data.cache.max_gb: expected at least .* 2 streams"):
            check_room(remote_parts(five), **options)
        check_room(remote_parts(six), **options)
        check_room(remote_parts(five), **(options | {"read_streams": 1}))
        check_room(
            remote_parts(five), **(options | {"read_streams": 4, "world_size": 8, "local_size": 1, "shuffle_window": 1})
        )
        check_room(remote_parts(local), **(options | {"read_streams": 1000}))
        with pytest.raises(DataError, match=r"data.cache.max_gb: expected room"):
            opened(server.url, changed(spec, max_gb=(largest - 1) / 1e9)).manifest.open(2)


def test_a_reader_closes_what_the_cache_has_dropped(
    local: ShardDataset, server: FolderServer, spec: CacheConfig
) -> None:
    dataset = opened(server.url, spec)
    dataset.read(0)
    dataset.read(4)
    for path in Path(spec.folder).glob("*.tar"):
        path.unlink()
    assert dataset.read(0) == local.read(0)  # still open
    dataset.read(9)
    descriptors = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert not [name for name in descriptors if name.startswith(spec.folder) and name.endswith("(deleted)")]
    assert all_samples(dataset) == all_samples(local)


@pytest.mark.parametrize("suffix", ["tar", "idx"])
@pytest.mark.parametrize("harm", ["emptied", "cut", "one byte", "another file"])
def test_a_damaged_file_of_the_cache_is_fetched_again(
    local: ShardDataset,
    server: FolderServer,
    spec: CacheConfig,
    harm: str,
    suffix: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert all_samples(opened(server.url, spec)) == all_samples(local)
    shards = [local.manifest.index(i) for i in range(len(SIZES))]
    first = {index.shard_sha256: int(index.offsets[0, 0]) if len(index) else 0 for index in shards}
    for path in Path(spec.folder).glob(f"*.{suffix}"):
        whole = path.read_bytes()
        if harm == "another file":
            path.with_suffix(".new").write_bytes(bytes(len(whole)))
            path.with_suffix(".new").replace(path)
            continue
        with path.open("r+b") as file:
            if harm == "one byte":
                file.seek(first[path.stem] if suffix == "tar" else len(whole) // 2)
                file.write(b"\x00\x00")
            else:
                file.truncate(0 if harm == "emptied" else len(whole) - 1)
    asked = len(server.requests)
    again = opened(server.url, spec)
    assert all_samples(again) == all_samples(local)
    fetched = [name for name in server.requests[asked:] if name.endswith(suffix)]
    assert 4 <= len(fetched) <= len(SIZES), "each one of which something was read, once"
    assert capfd.readouterr().err.count("damaged on this disk and is fetched again") == len(fetched)
    asked = len(server.requests)
    assert all_samples(opened(server.url, spec)) == all_samples(local)
    assert server.requests[asked:] == ["manifest.json"]


def test_a_cache_that_is_cleaned_while_it_is_read_costs_no_sample(
    local: ShardDataset, server: FolderServer, spec: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is removed now and then as a file of it is about to be opened, makes room, or gets its name."""
    expected, chance = all_samples(local), random.Random(7)
    for name in ("_open_own", "_make_room", "_finish"):
        before = getattr(Cache, name)
        calls = 0

        def cleaned(*arguments: Any, before: Any = before) -> Any:
            nonlocal calls
            calls += 1
            if chance.random() < 0.06:
                shutil.rmtree(spec.folder, ignore_errors=True)
            return before(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Cache, name, cleaned)
            for _ in range(5):
                shutil.rmtree(spec.folder, ignore_errors=True)
                assert all_samples(opened(server.url, spec)) == expected
        assert calls >= 50


def test_a_cache_that_is_cleaned_during_each_transfer_is_named(server: FolderServer, spec: CacheConfig) -> None:
    def clean(number: int, name: str) -> None:
        if name != "manifest.json":
            shutil.rmtree(spec.folder, ignore_errors=True)

    server.choose = clean
    with pytest.raises(RunError, match=r"data.cache.folder.*removed it 10 times.*nothing else cleans"):
        opened(server.url, spec).read(0)


def test_a_folder_that_cannot_be_written_is_told(server: FolderServer, spec: CacheConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    dataset = opened(server.url, changed(spec, folder=str(tmp_path / "file")))
    with pytest.raises(RunError, match=r"file \(data.cache.folder\)"):
        dataset.read(0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_at_once_and_not_as_the_servers_fault(
    server: FolderServer, spec: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened(server.url, spec)
    claimed = Cache._claimed

    def full(*arguments: object) -> object:
        @contextmanager
        def inner() -> Iterator[Path | None]:
            with claimed(*arguments) as part:  # type: ignore[arg-type]
                yield None if part is None else Path("/dev/full")

        return inner()

    monkeypatch.setattr(Cache, "_claimed", full)
    with pytest.raises(RunError, match=r"cache.*No space left.*max_gb"):
        dataset.read(0)
    assert server.requests.count("part-000.idx") == 1


def test_opening_local_data_loads_no_network_library() -> None:
    code = "import sys; import data_pipeline.shards.load_manifest; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"aiohttp", "s3fs", "botocore"} & set(done.stdout.split())
