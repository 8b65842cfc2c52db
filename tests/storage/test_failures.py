"""What people and machines do to a store: each ends in a clear error or a retry, nothing half-visible."""

import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rollflow.storage import s3
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refusals import StoreAccessError, StoreRefused
from rollflow.storage.retries import StoreError
from tests.object_stores import BUCKET, SECRET, ObjectStoreServer, install

from .conftest import s3_store

CALLS = {
    "put": lambda store: store.put_atomic("a", b"1"),
    "put new": lambda store: store.put_new("a", b"1"),
    "get": lambda store: store.get("a"),
    "get buffer": lambda store: store.get_buffer("a"),
    "list": lambda store: store.list("a"),
    "children": lambda store: store.children("a"),
}


def store_of_its_own(server: ObjectStoreServer, bucket: str = BUCKET, **changes) -> Store:
    """A store that shares no client, so that it looks for credentials anew."""
    options = {"endpoint_url": server.endpoint, "skip_instance_cache": True}
    return Store(StoreConfig(url=f"s3://{bucket}/x", options=options, **changes))


@pytest.mark.parametrize("call", CALLS)
def test_without_credentials_the_error_says_where_they_come_from(rclone, monkeypatch, call):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(StoreAccessError, match=r"s3://.*credentials.*AWS_ACCESS_KEY_ID"):
        CALLS[call](store_of_its_own(rclone))


@pytest.mark.parametrize("call", CALLS)
def test_wrong_credentials_are_refused_at_once_and_never_logged(rclone, monkeypatch, caplog, call):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong-key")
    with pytest.raises(StoreAccessError, match=r"store: .* s3://.*access denied") as caught:
        CALLS[call](store_of_its_own(rclone))
    assert SECRET not in f"{caught.value} {caplog.text}"


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_bucket_is_named_and_never_taken_for_an_empty_store(rclone, call):
    with pytest.raises(StoreRefused, match="bucket 'no-such-bucket' does not exist"):
        CALLS[call](store_of_its_own(rclone, "no-such-bucket"))


@pytest.mark.parametrize(
    "options",
    [
        {"key": "a"},
        {"secret": "a"},
        {"token": "a"},
        {"client_kwargs": {"aws_secret_access_key": "a"}},
    ],
)
def test_settings_with_a_secret_are_refused_without_showing_it(options):
    with pytest.raises(ValueError, match="holds a secret; credentials come from") as caught:
        StoreConfig(url="s3://bucket/x", options=options)
    assert "'a'" not in str(caught.value)
    with pytest.raises(ValueError, match="address holds a password") as caught:
        StoreConfig(url="s3://key:hidden@bucket/x")
    assert "hidden" not in str(caught.value)


@pytest.fixture
def own_server(tmp_path):
    install()
    server = ObjectStoreServer("rclone", tmp_path / "objects")
    server.start()
    yield server
    server.kill()


def test_a_server_that_dies_in_the_middle_of_a_write_and_comes_back_gets_the_whole_object(
    rclone, own_server
):
    store = s3_store(own_server, "x", retry_backoff_s=0.05)
    data = os.urandom(s3.SINGLE_PUT_BYTES - 1)
    own_server.halt()
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(store.put_atomic, "a/big", data)
        own_server.wait_for_client()
        own_server.kill()
        own_server.start()
        url = written.result(timeout=60)
    assert store.list() == [url]
    assert store.get(url) == data


def test_a_server_that_stays_away_is_named_after_bounded_retries(rclone, own_server):
    store = s3_store(own_server, "x", max_retries=2, retry_backoff_s=0.01)
    own_server.kill()
    started = time.monotonic()
    with pytest.raises(StoreError, match=rf"write s3://.*3 tries.*{own_server.endpoint}"):
        store.put_atomic("a", b"1")
    assert time.monotonic() - started < 30


DISK_FULL = """
import subprocess, sys
from pathlib import Path
from rollflow.storage import s3
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refusals import StoreRefused

folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
store = Store(StoreConfig(url=str(folder)))
written = []
try:
    for n in range(9):
        written.append(store.put_new(f"runs/{n}", bytes([n]) * 200_000))
    raise SystemExit("the disk never filled up")
except StoreRefused as error:
    print(error)
assert store.list() == written and store.temporaries() == []
assert [store.get(url)[0] for url in written] == list(range(len(written)))
store.delete(written[0])
assert store.put_new("runs/last", b"9" * 100_000) in store.list()
print("went on")
"""


def test_on_a_full_disk_nothing_is_half_written_and_it_goes_on_once_there_is_room(tmp_path):
    unshare = ["unshare", "--mount", *(() if os.geteuid() == 0 else ("--user", "--map-root-user"))]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", DISK_FULL, str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no space left on the disk of" in done.stdout
    assert "make room" in done.stdout
    assert done.stdout.endswith("went on\n")
