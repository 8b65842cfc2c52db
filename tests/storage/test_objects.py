"""Objects are whole or absent, on every kind of store, and faults are retried within bounds."""

import errno
import hashlib
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rollflow.storage import s3
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store, normalised_url
from rollflow.storage.retries import StoreError


def test_an_object_comes_back_as_it_was_written(store):
    url = store.put_atomic("a/b.bin", b"one")
    assert url == store.join("a", "b.bin") == f"{store.root}/a/b.bin"
    assert store.get(url) == store.get("a/b.bin") == b"one"
    assert store.exists(url)
    store.put_atomic(url, b"two")
    assert store.get(url) == b"two"


def test_a_missing_object_is_not_found_and_not_an_error_to_delete(store):
    with pytest.raises(FileNotFoundError):
        store.get("a/none")
    assert not store.exists("a/none")
    assert store.list("a") == store.children("a") == []
    store.delete("a/none")


def test_lists_are_sorted_urls_and_children_are_names(store):
    for path in ("x/b/2", "x/a", "x/b/1", "xy"):
        store.put_atomic(path, b"")
    assert store.list("x") == [store.join(p) for p in ("x/a", "x/b/1", "x/b/2")]
    assert store.children("x") == ["a", "b"]
    assert [store.get(url) for url in store.list("x")] == store.get_all(store.list("x"))
    store.delete("x/b/1")
    assert store.list("x/b") == [store.join("x/b/2")]


def test_put_new_refuses_an_object_that_exists(store):
    store.put_new("a", b"first")
    with pytest.raises(FileExistsError):
        store.put_new("a", b"second")
    assert store.get("a") == b"first"
    assert store.sweep() == []


def test_of_many_writers_of_a_new_object_on_disk_one_wins(tmp_path):
    store = Store(StoreConfig(url=str(tmp_path)))

    def create(i: int) -> bool:
        try:
            store.put_new("lock", bytes([i]) * 1000)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(64)))
    assert won.count(True) == 1
    assert store.get("lock") == bytes([won.index(True)]) * 1000
    assert store.list() == [store.join("lock")]


def test_files_go_in_and_out_and_their_checksum_is_known(store, tmp_path):
    source = tmp_path / "in"
    source.write_bytes(b"abc" * 1000)
    store.put_file("f/1", source)
    store.get_file("f/1", tmp_path / "new" / "out")
    assert (tmp_path / "new" / "out").read_bytes() == source.read_bytes()
    assert store.checksum("f/1") == (3000, hashlib.sha256(b"abc" * 1000).hexdigest())


def test_a_large_object_goes_up_in_parts_and_comes_down_by_every_way(store, tmp_path):
    data = bytes(range(256)) * (s3.SINGLE_PUT_BYTES // 256 + 1)
    (tmp_path / "in").write_bytes(data)
    url = store.put_file("large", tmp_path / "in")
    assert store.get(url) == data
    assert store.get_buffer(url).to_pybytes() == data
    assert store.checksum(url)[0] == len(data)


@pytest.mark.parametrize(
    "name", ["ü n", "a#1", "50%20", "q?x=1&y", "a+b=c", "[a]*", "'\"$(x)", "日本"]
)
def test_names_with_odd_characters_are_names_like_others(store, name):
    url = store.put_new(f"{name}/{name}", b"1")
    store.put_atomic(url, b"2")
    assert store.get(url) == store.get(f"{name}/{name}") == b"2"
    assert store.get_buffer(url).to_pybytes() == b"2"
    assert store.list(name) == [url]
    assert store.children(name) == store.children() == [name]
    store.delete(url)
    assert not store.exists(url)


@pytest.mark.parametrize("path", ["/elsewhere/x", "s3://other/x", "../x", "a/../../x"])
def test_a_path_outside_of_the_store_is_refused(store, path):
    with pytest.raises(ValueError, match=r"outside|'\.\.'"):
        store.put_atomic(path, b"")


def test_a_local_store_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(StoreConfig(url="here/store/"))
    assert store.root == store.config.url == str(tmp_path / "here/store")
    assert store.run_url("r") == f"{tmp_path}/here/store/runs/r"
    assert store.local_path("a") == tmp_path / "here/store/a"
    assert normalised_url(f"file://{tmp_path}/x") == f"{tmp_path}/x"
    assert normalised_url("s3://bucket/prefix/") == "s3://bucket/prefix"
    assert Store(StoreConfig(url="memory://x")).local_path("a") is None


@pytest.mark.parametrize("url", ["s3://", "simplecache::s3://bucket/x"])
def test_a_url_that_names_no_single_place_is_refused(url):
    with pytest.raises(ValueError, match="give"):
        Store(StoreConfig(url=url))


KILLED_BEFORE_THE_NAME = """
import os, signal, sys
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
store = Store(StoreConfig(url=sys.argv[1]))
store.put_atomic("a/done", b"1")
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.put_atomic("a/half", b"2" * 100_000)
"""


def test_a_writer_killed_in_the_middle_leaves_no_object(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_THE_NAME, str(tmp_path)], check=False
    )
    assert done.returncode == -signal.SIGKILL
    store = Store(StoreConfig(url=str(tmp_path)))
    assert store.list() == [store.join("a/done")]
    assert store.children("a") == ["done"]
    [leftover] = store.sweep()
    assert Path(leftover).name.startswith(".half.")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["done"]


class FlakyFileSystem(MemoryFileSystem):
    """Memory that fails as often as it is told to before it works."""

    protocol = "flaky"
    faults: list[Exception] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("flaky://", "memory://"))

    def cat_file(self, path, *args, **kwargs):
        if self.faults:
            raise self.faults.pop()
        return super().cat_file(path, *args, **kwargs)


@pytest.fixture
def flaky():
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    store = Store(StoreConfig(url="flaky://x", max_retries=2, retry_backoff_s=1e-4))
    store.put_atomic("a", b"1")
    yield store
    FlakyFileSystem.faults.clear()


@pytest.mark.parametrize(
    "fault", [ConnectionResetError(), TimeoutError(), OSError(errno.EBUSY, "SlowDown")]
)
def test_a_transient_fault_is_retried(flaky, fault):
    FlakyFileSystem.faults[:] = [fault, fault]
    assert flaky.get("a") == b"1"


def test_retries_are_bounded_and_the_error_names_operation_object_and_fault(flaky):
    FlakyFileSystem.faults[:] = [ConnectionResetError("peer left")] * 9
    with pytest.raises(StoreError, match=r"read flaky://x/a: .* 3 tries, .*peer left"):
        flaky.get("a")
    assert len(FlakyFileSystem.faults) == 6


def test_a_fault_that_will_not_pass_is_not_retried(flaky):
    FlakyFileSystem.faults[:] = [PermissionError("no"), PermissionError("no")]
    with pytest.raises(PermissionError):
        flaky.get("a")
    assert len(FlakyFileSystem.faults) == 1


LIGHT = """
import pkgutil, importlib, sys, rollflow.storage
for module in pkgutil.iter_modules(rollflow.storage.__path__):
    importlib.import_module(f"rollflow.storage.{module.name}")
heavy = {"torch", "ray", "sglang", "megatron", "prefect", "botocore", "s3fs", "pandas"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_storage_imports_nothing_heavy():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)
