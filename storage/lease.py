"""One writer per run: a lease whose every change of hands has a higher fencing epoch."""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from .integrity import ManifestError, Record, seal, unseal
from .objects import NO_HARD_LINKS, Store
from .processes import Process, is_gone, this_process
from .refs import RunRef

CLAIM_FORMAT = "rollflow.lease/1"
HEARTBEAT_FORMAT = "rollflow.heartbeat/1"


@dataclass(frozen=True, slots=True)
class Claim:
    """What ``lease/epoch-000007.json`` holds: who took the lease, written once."""

    epoch: int
    holder: str
    process: Process
    token: str
    """Tells two claims of one epoch apart, on a store that lets the second replace the first."""
    ttl_s: float
    since: float
    """Seconds since 1970, on the holder's clock."""

    def __str__(self) -> str:
        place = f"host {self.process.host}, pid {self.process.pid}"
        return f"{self.holder!r} ({place}, epoch {self.epoch}, since {_clock(self.since)})"


class LeaseHeldError(RuntimeError):
    """Another writer holds the run; names holder, host, pid, since when and until when."""

    def __init__(self, run: str, claim: Claim, until: float) -> None:
        super().__init__(run, claim, until)
        self.claim = claim
        self.until = until

    def __str__(self) -> str:
        run, claim, until = self.args
        return (
            f"run {run!r} is held by {claim} until {_clock(until)}, unless renewed; "
            "wait for it, stop it, or give this run another name"
        )


class LeaseLostError(RuntimeError):
    """This writer's epoch is over; nothing of it is accepted any more."""

    def __init__(self, run: str, epoch: int, reason: str) -> None:
        super().__init__(run, epoch, reason)
        self.epoch = epoch

    def __str__(self) -> str:
        run, epoch, reason = self.args
        return f"run {run!r}: a writer of epoch {epoch} is refused: {reason}"


def acquire(
    store: Store, run: RunRef, holder: str, ttl_s: float, process: Process | None = None
) -> "Lease":
    """Take the run's lease for ``ttl_s`` seconds, to be renewed well before they are over.

    It is free where nobody took it, and where its holder released it, let it expire, or was a
    process of this machine that is gone. ``process`` is the one whose end frees it; by default the
    caller's. LeaseHeldError where another has it or was faster.

    Expiry compares the clocks of two machines, so ``ttl_s`` must be long against what they differ
    by. The log does not depend on it: whoever holds an older epoch is refused, however late.
    Where the store ignores conditional puts (``probe_conditional_puts``), two that claim an epoch
    in the same instant may both believe they won until the first reads its claim again: here, and
    at every ``renew``. Something else must then keep two flows of a run from starting at once.
    """
    if ttl_s <= 0:
        raise ValueError(f"ttl_s is {ttl_s}; give a positive number of seconds")
    newest = check_free(store, run)
    return Lease(store, run, _claim(store, run, newest + 1, holder, ttl_s, process))


def check_free(store: Store, run: RunRef) -> int:
    """Give the newest epoch, whose lease is over; LeaseHeldError where it is not."""
    newest = newest_epoch(store, run)
    if newest:
        claim = read_claim(store, run, newest)
        until = _held_until(store, run, claim)
        if until is not None and time.time() <= until and not is_gone(claim.process):
            raise LeaseHeldError(run.name, claim, until)
    return newest


class Lease:
    """A lease that was acquired; safe to share between threads."""

    def __init__(self, store: Store, run: RunRef, claim: Claim) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._ended = ""
        self._take(run, claim)

    @property
    def run(self) -> RunRef:
        """The run with this lease's epoch: what every writer must be given."""
        return self._run

    @property
    def ttl_s(self) -> float:
        """Seconds that it lasts from each renewal on."""
        return self._claim.ttl_s

    @property
    def until(self) -> float:
        """When it expires unless it is renewed; seconds since 1970."""
        return self._until

    def renew(self) -> None:
        """Hold it for another ``ttl_s`` from now on.

        LeaseLostError where it has expired, even if nobody else took it, and where a newer epoch
        exists; from then on always.
        """
        with self._lock:
            self._renew()

    def advance(self) -> RunRef:
        """Go on under the next epoch; give the run with it.

        For a flow that replaces engines which may not be dead: with their epoch they are refused.
        """
        with self._lock:
            self._renew()
            mine = self._claim
            try:
                claim = _claim(
                    self._store, self._run, mine.epoch + 1, mine.holder, mine.ttl_s, mine.process
                )
            except LeaseHeldError as error:
                raise self._lose(str(error)) from error
            self._take(self._run, claim)
            return self._run

    def release(self) -> None:
        """Give it back, so that nobody has to wait; nothing to do where it is lost."""
        with self._lock:
            if self._ended:
                return
            self._ended = "it was released"
            if newest_epoch(self._store, self._run) == self._claim.epoch:
                self._beat(time.time(), released=True)

    def _take(self, run: RunRef, claim: Claim) -> None:
        self._claim = claim
        self._run = replace(run, epoch=claim.epoch)
        self._until = claim.since + claim.ttl_s
        self._renewed = time.monotonic() - max(0.0, time.time() - claim.since)

    def _renew(self) -> None:
        # Taken first: whoever sleeps anywhere below writes a heartbeat that is over already.
        now, ticks = time.time(), time.monotonic()
        if self._ended:
            raise LeaseLostError(self._run.name, self._claim.epoch, self._ended)
        if now > self._until or ticks - self._renewed > self._claim.ttl_s:
            raise self._lose(f"it expired at {_clock(self._until)} without being renewed")
        try:
            check_fence(self._store, self._run)
        except LeaseLostError as error:
            raise self._lose(error.args[2]) from error
        standing = read_claim(self._store, self._run, self._claim.epoch)
        if standing.token != self._claim.token:
            raise self._lose(f"{standing} claimed the same epoch")
        self._until, self._renewed = now + self._claim.ttl_s, ticks
        self._beat(now, released=False)

    def _beat(self, now: float, *, released: bool) -> None:
        record: Record = {
            "format": HEARTBEAT_FORMAT,
            "epoch": self._claim.epoch,
            "token": self._claim.token,
            "renewed": now,
            "until": now if released else now + self._claim.ttl_s,
            "released": released,
        }
        self._store.put_atomic(_heartbeat_url(self._run, self._claim.epoch), seal(record))

    def _lose(self, reason: str) -> LeaseLostError:
        self._ended = reason
        return LeaseLostError(self._run.name, self._claim.epoch, reason)


@contextmanager
def kept(lease: Lease) -> Iterator[Lease]:
    """Renew the lease from a thread, three times per ``ttl_s``, and release it at the end.

    Nothing is raised when it is lost meanwhile: every commit finds that out by itself.
    """
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(lease.ttl_s / 3):
            try:
                lease.renew()
            except LeaseLostError:
                return
            except OSError:  # the store is away, perhaps not for as long as the lease lasts
                continue

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        stopped.set()
        thread.join()
        lease.release()


def check_fence(store: Store, run: RunRef, *, evaluation: bool = False) -> None:
    """Refuse a writer whose epoch is over: to be called right before every write.

    A writer without a lease (``refs.evaluator``) passes where it writes an ``evaluation``, and is
    refused by a LeaseLostError anywhere else.

    LeaseLostError where another epoch is the newest (it names who has that), and where the
    writer's own was released or has expired. A run that nobody ever leased is open to epoch 0.

    A writer that is suspended between this check and its write may still write one object when it
    wakes. That does no harm: parts and checkpoint files of an epoch have names of their own, and
    of the records that end a transaction only the first is accepted, which is whole.
    """
    if run.writer:
        if evaluation:
            return
        raise LeaseLostError(run.name, 0, f"{run.writer!r} holds no lease and may only evaluate")
    newest = newest_epoch(store, run)
    if not newest and not run.epoch:
        return
    if newest != run.epoch:
        reason = f"{read_claim(store, run, newest)} has the run" if newest else "no such lease"
        raise LeaseLostError(run.name, run.epoch, reason)
    claim = read_claim(store, run, newest)
    until = _held_until(store, run, claim)
    if until is None:
        raise LeaseLostError(run.name, run.epoch, "it was released")
    if time.time() > until:
        reason = f"it expired at {_clock(until)} without being renewed"
        raise LeaseLostError(run.name, run.epoch, reason)


def newest_epoch(store: Store, run: RunRef) -> int:
    """Give the newest epoch that was claimed; 0 before the first."""
    return max(claimed_epochs(store, run), default=0)


def claimed_epochs(store: Store, run: RunRef) -> list[int]:
    """Give all epochs that were claimed, in order."""
    names = store.children(f"{run.url}/lease")
    return sorted(int(n[6:-5]) for n in names if n.startswith("epoch-") and n.endswith(".json"))


def read_claim(store: Store, run: RunRef, epoch: int) -> Claim:
    """Read who claimed an epoch; ManifestError where the claim is damaged or misplaced."""
    url = _claim_url(run, epoch)
    record = unseal(store.get(url), url, CLAIM_FORMAT)
    if (record["run"], record["epoch"]) != (run.name, epoch):
        found = f"epoch {record['epoch']} of run {record['run']!r}"
        raise ManifestError(url, "the claim of that epoch", found)
    names = ("epoch", "holder", "token", "ttl_s", "since")
    return Claim(**{n: record[n] for n in names}, process=Process(**record["process"]))


def probe_conditional_puts(store: Store) -> bool:
    """Tell whether the store refuses to replace an object by a conditional put; puts one to see."""
    url = store.join("probes", uuid.uuid4().hex)
    try:
        store.put_if_absent(url, b"first")
        store.put_if_absent(url, b"second")
    except FileExistsError:
        return store.get(url) == b"first"
    except OSError as error:
        if error.errno in NO_HARD_LINKS:
            return False
        raise
    finally:
        store.delete(url)
    return False


def _claim(
    store: Store, run: RunRef, epoch: int, holder: str, ttl_s: float, process: Process | None
) -> Claim:
    claim = Claim(
        epoch, holder, process or this_process(), uuid.uuid4().hex, float(ttl_s), time.time()
    )
    record: Record = {"format": CLAIM_FORMAT, "run": run.name, **asdict(claim)}
    with suppress(FileExistsError):  # another was faster, or the answer to our own put got lost
        store.put_new(_claim_url(run, epoch), seal(record))
    standing = read_claim(store, run, epoch)
    if standing.token != claim.token:
        raise LeaseHeldError(run.name, standing, standing.since + standing.ttl_s)
    return claim


def _held_until(store: Store, run: RunRef, claim: Claim) -> float | None:
    """Give when a claim expires, by its newest heartbeat; None where it was released."""
    url = _heartbeat_url(run, claim.epoch)
    try:
        beat = unseal(store.get(url), url, HEARTBEAT_FORMAT)
    except FileNotFoundError:
        return claim.since + claim.ttl_s
    if beat["token"] != claim.token:  # of one whose claim was replaced
        return claim.since + claim.ttl_s
    return None if beat["released"] else beat["until"]


def _claim_url(run: RunRef, epoch: int) -> str:
    return f"{run.url}/lease/epoch-{epoch:06d}.json"


def _heartbeat_url(run: RunRef, epoch: int) -> str:
    return f"{run.url}/lease/heartbeat-{epoch:06d}.json"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds")
