"""One writer per run: the second is refused by the first's name, and a late one by the next's."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rollflow.storage.checkpoints import commit_checkpoint, delete_checkpoint, prepare_checkpoint
from rollflow.storage.config import StoreConfig
from rollflow.storage.integrity import ManifestError
from rollflow.storage.lease import (
    LeaseHeldError,
    LeaseLostError,
    acquire,
    check_fence,
    claimed_epochs,
    kept,
    probe_conditional_puts,
    read_claim,
)
from rollflow.storage.manifests import batch_folder, commit_batch, find_batch, read_manifest
from rollflow.storage.objects import Store
from rollflow.storage.processes import Process, is_gone, this_process
from rollflow.storage.refs import RunRef
from rollflow.storage.shards import ShardWriter
from rollflow.storage.steps import commit_step, last_step, read_step

TTL_S = 60.0


@pytest.fixture
def ended():
    """A process of this machine that was there once."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return replace(this_process(), pid=child.pid)


def wait_past(moment: float) -> None:
    while time.time() <= moment:
        time.sleep(0.01)


def test_the_second_writer_is_refused_with_all_that_is_known_of_the_first(store, run):
    lease = acquire(store, run, "flow green-owl", TTL_S)
    with pytest.raises(LeaseHeldError) as caught:
        acquire(store, run, "flow red-fox", TTL_S)
    words = str(caught.value)
    for word in (
        "flow green-owl",
        socket.gethostname(),
        f"pid {os.getpid()}",
        "since 2",
        "until 2",
    ):
        assert word in words
    assert caught.value.until == lease.until
    assert str(pickle.loads(pickle.dumps(caught.value))) == words


def test_a_released_lease_is_free_and_its_former_holder_is_refused(store, run):
    first = acquire(store, run, "a", TTL_S)
    first.release()
    first.release()
    with pytest.raises(LeaseLostError, match="released"):
        first.renew()
    with pytest.raises(LeaseLostError, match="released"):
        check_fence(store, first.run)
    second = acquire(store, run, "b", TTL_S)
    assert (first.run.epoch, second.run.epoch) == (1, 2)
    assert first.run == second.run == run
    check_fence(store, second.run)


def test_an_expired_lease_is_lost_even_if_nobody_else_took_it(store, run):
    lease = acquire(store, run, "a", 0.05)
    wait_past(lease.until)
    with pytest.raises(LeaseLostError, match=r"expired at .* without being renewed"):
        check_fence(store, lease.run)
    for _ in range(2):
        with pytest.raises(LeaseLostError, match="expired"):
            lease.renew()
    assert acquire(store, run, "b", TTL_S).run.epoch == 2


def test_a_renewed_lease_lasts_on(store, run):
    lease = acquire(store, run, "a", 2.0)
    before = lease.until
    wait_past(before - 1.99)
    lease.renew()
    assert lease.until > before
    with pytest.raises(LeaseHeldError) as caught:
        acquire(store, run, "b", TTL_S)
    assert caught.value.until == lease.until


def test_a_kept_lease_is_renewed_meanwhile_and_released_at_the_end(store, run):
    with kept(acquire(store, run, "a", 0.5)) as lease:
        wait_past(lease.until)
        wait_past(lease.until)
        check_fence(store, lease.run)
    acquire(store, run, "b", TTL_S)


def test_a_holder_whose_process_is_gone_is_not_waited_for(store, run, ended):
    zombie = acquire(store, run, "a", TTL_S, process=ended)
    heir = acquire(store, run, "b", TTL_S)
    for refuse in (zombie.renew, zombie.advance, lambda: check_fence(store, zombie.run)):
        with pytest.raises(
            LeaseLostError, match=r"epoch 1 is refused: 'b' .*epoch 2.* has the run"
        ):
            refuse()
    zombie.release()
    heir.renew()


def test_only_a_process_of_this_machine_is_known_to_be_gone(ended):
    me = this_process()
    assert is_gone(ended)
    assert is_gone(replace(me, started=me.started + 1))
    assert not is_gone(me)
    for elsewhere in ({"host": "x"}, {"boot_id": "x"}, {"boot_id": ""}, {"namespace": "x"}):
        assert not is_gone(replace(ended, **elsewhere))


WAITING = """
import dataclasses, json
from rollflow.storage.processes import this_process
print(json.dumps(dataclasses.asdict(this_process())), flush=True)
input()
"""


def test_a_killed_process_is_gone_before_its_parent_asks_and_a_suspended_one_is_not():
    child = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None and child.stdout is not None
    process = Process(**json.loads(child.stdout.readline()))
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert not is_gone(process)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(process)
    child.stdin.close()
    child.stdout.close()
    child.wait()


SUSPENDED = """
import sys
from rollflow.storage.config import StoreConfig
from rollflow.storage.lease import LeaseLostError, acquire
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.steps import commit_step
store = Store(StoreConfig(url=sys.argv[1]))
lease = acquire(store, RunRef("r1", store.run_url("r1")), "sleeper", 0.5)
print(lease.until, flush=True)
input()
for attempt in (lease.renew, lambda: commit_step(store, lease.run, 0, "b", "w", {})):
    try:
        attempt()
    except LeaseLostError as error:
        print(error, flush=True)
"""


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_process_suspended_past_its_lease_commits_nothing_when_woken(tmp_path, taken_over):
    store = Store(StoreConfig(url=str(tmp_path)))
    run = RunRef("r1", store.run_url("r1"))
    with subprocess.Popen(
        [sys.executable, "-c", SUSPENDED, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as sleeper:  # fmt: skip
        assert sleeper.stdout is not None
        until = float(sleeper.stdout.readline())
        sleeper.send_signal(signal.SIGSTOP)
        wait_past(until)
        if taken_over:
            acquire(store, run, "heir", TTL_S)
        sleeper.send_signal(signal.SIGCONT)
        said, _ = sleeper.communicate("\n")
    assert said.count("is refused") == 2
    assert ("'heir'" in said.splitlines()[1]) == taken_over
    assert last_step(store, run) is None


def test_a_holder_may_go_on_under_a_new_epoch_and_refuse_its_own_old_engines(store, run):
    lease = acquire(store, run, "a", TTL_S)
    before = lease.run
    after = lease.advance()
    assert (before.epoch, after.epoch, lease.run.epoch) == (1, 2, 2)
    with pytest.raises(LeaseLostError, match=r"'a' .*epoch 2"):
        check_fence(store, before)
    check_fence(store, after)
    lease.renew()
    assert claimed_epochs(store, run) == [1, 2]


def test_of_many_that_acquire_at_once_one_wins(tmp_path):
    store = Store(StoreConfig(url=str(tmp_path)))
    run = RunRef("r1", store.run_url("r1"))

    def attempt(i: int) -> str:
        try:
            return f"won by {acquire(store, run, f'flow {i}', TTL_S).run.epoch}"
        except LeaseHeldError as error:
            return error.claim.holder

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(attempt, range(32)))
    assert answers.count("won by 1") == 1
    winner = answers.index("won by 1")
    assert set(answers) == {"won by 1", f"flow {winner}"}


def test_without_a_lease_everything_is_open_until_one_is_taken(store, run):
    check_fence(store, run)
    acquire(store, run, "a", TTL_S)
    with pytest.raises(LeaseLostError, match="epoch 0 is refused: 'a'"):
        check_fence(store, run)
    with pytest.raises(LeaseLostError, match="no such lease"):
        check_fence(store, replace(run, url=f"{run.url}2", epoch=3))


def test_no_write_of_a_late_writer_is_accepted(store, run, make_sample, ended):
    late = acquire(store, run, "late", TTL_S, process=ended).run
    writer = ShardWriter(store, late, batch_folder(late, 3))
    writer.append([make_sample(0, 0)])
    checkpoint = commit_checkpoint(store, late, 1, "w", [])
    acquire(store, run, "heir", TTL_S)
    before = store.list(run.url)
    for write in (
        lambda: writer.append([make_sample(1, 0)]),
        lambda: ShardWriter(store, late, batch_folder(late, 4)),
        lambda: commit_batch(
            store, late, writer.folder, 3, writer.parts,
            groups=1, policy_versions=[3], metrics={}, ledger={},
        ),
        lambda: commit_step(store, late, 0, "b", "w", {}),
        lambda: prepare_checkpoint(store, late, 2),
        lambda: commit_checkpoint(store, late, 2, "w", []),
        lambda: delete_checkpoint(store, checkpoint),
    ):  # fmt: skip
        with pytest.raises(LeaseLostError, match="epoch 1 is refused: 'heir'"):
            write()
    assert store.list(run.url) == before


def test_every_record_has_the_epoch_of_its_writer(store, run, make_sample):
    acquire(store, run, "a", TTL_S).release()
    mine = acquire(store, run, "b", TTL_S).run
    writer = ShardWriter(store, mine, batch_folder(mine, 3))
    assert writer.append([make_sample(0, 0)]).name == "part-0002-00000.arrow"
    ref = commit_batch(
        store, mine, writer.folder, 3, writer.parts,
        groups=1, policy_versions=[3], metrics={}, ledger={},
    )  # fmt: skip
    commit_step(store, mine, 0, ref.digest, "w", {})
    commit_checkpoint(store, mine, 0, "w", [])
    assert read_manifest(store, ref.url)["epoch"] == 2
    assert read_step(store, run, 0).epoch == 2
    assert json.loads(store.get(f"{run.url}/checkpoints/step-000000/manifest.json"))["epoch"] == 2
    found = find_batch(store, mine, 3)
    assert found is not None
    assert found.run.epoch == 2


@pytest.mark.parametrize("name", ["epoch-000001", "heartbeat-000001"])
def test_a_damaged_lease_is_named_to_all(store, run, name):
    lease = acquire(store, run, "a", TTL_S)
    lease.renew()
    url = f"{run.url}/lease/{name}.json"
    store.put_atomic(url, store.get(url)[:-20])
    for look in (lambda: acquire(store, run, "b", TTL_S), lambda: check_fence(store, lease.run)):
        with pytest.raises(ManifestError) as caught:
            look()
        assert caught.value.name == url


def test_a_claim_that_was_copied_to_another_epoch_is_named(store, run):
    acquire(store, run, "a", TTL_S)
    url = f"{run.url}/lease/epoch-000002.json"
    store.put_atomic(url, store.get(f"{run.url}/lease/epoch-000001.json"))
    with pytest.raises(ManifestError, match=r"epoch-000002.json.*found epoch 1"):
        read_claim(store, run, 2)


class CarelessFileSystem(MemoryFileSystem):
    """Memory that ignores the condition of a conditional put, as some S3 servers do."""

    protocol = "careless"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("careless://", "memory://"))

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value, mode="overwrite", **kwargs)


@pytest.fixture
def careless():
    fsspec.register_implementation("careless", CarelessFileSystem, clobber=True)
    return Store(StoreConfig(url="careless://x"))


def test_a_store_is_asked_whether_it_honours_conditional_puts(store, careless, request):
    assert probe_conditional_puts(store) == ("rclone" not in request.node.callspec.id)
    assert not probe_conditional_puts(careless)
    assert store.list("probes") == careless.list("probes") == []


def test_where_a_claim_can_be_replaced_the_one_that_lost_it_finds_out(careless, tmp_path):
    run = RunRef("r1", careless.run_url("r1"))
    first = acquire(careless, run, "first", TTL_S)
    url = f"{run.url}/lease/epoch-000001.json"
    careless.delete(url)
    acquire(careless, run, "second", TTL_S)
    with pytest.raises(LeaseLostError, match=r"'second' .* claimed the same epoch"):
        first.renew()


@pytest.mark.parametrize("ttl_s", [0.0, -1.0])
def test_a_lease_that_lasts_no_time_is_refused(store, run, ttl_s):
    with pytest.raises(ValueError, match="ttl_s"):
        acquire(store, run, "a", ttl_s)
