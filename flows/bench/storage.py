"""What the store costs: bytes and seconds of a large batch, and queries over many samples."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rollflow.storage.config import StoreConfig
from rollflow.storage.integrity import sha256_hex
from rollflow.storage.manifests import batch_folder, commit_batch, read_batch
from rollflow.storage.objects import Store
from rollflow.storage.refs import BatchRef, RunRef
from rollflow.storage.runs import create_run
from rollflow.storage.samples import Sample
from rollflow.storage.schema import from_table
from rollflow.storage.shards import Part, ShardWriter, encode

from . import synthetic

GROUPS, PER_GROUP, TOKENS = 32, 8, 4096
STEPS, STEP_GROUPS, STEP_TOKENS = 100, 125, 1024
REPEATS = 3
S3_STORE = "ROLLFLOW_BENCH_STORE"
"""Environment variable with the URL of a second store, e.g. ``s3://bucket/bench``."""
MEAN = "SELECT step, avg(reward) FROM samples GROUP BY 1 ORDER BY 1"

_QUERIES = """
import json, statistics, sys, time
from pathlib import Path
from rollflow.storage import open_run
from rollflow.storage.inspect import find_sample

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

def median_s(call):
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)

run = open_run(sys.argv[1])
before = peak()
mean_s = median_s(lambda: run.sql(sys.argv[2]))
sample_s = median_s(lambda: find_sample(run.store, run.ref, sys.argv[3]))
found = {"mean_reward_by_step_s": mean_s, "one_transcript_s": sample_s}
print(json.dumps({**found, "mb_before": before, "mb_peak": peak()}))
"""


async def measure(console: Console) -> dict:
    """Write and read a batch beside ``torch.save``; ask 100,000 samples two questions."""
    samples = from_table(synthetic.table("bench", 0, GROUPS, PER_GROUP, TOKENS))
    tokens = len(samples) * TOKENS
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=_folder()))
    try:
        rows = {"store, local disk": _batch(str(folder / "store"), samples)}
        if url := os.environ.get(S3_STORE):
            rows["store, S3"] = _batch(f"{url}/{folder.name}", samples)
        else:
            console.print(
                f"S3 is not measured: {S3_STORE} names no store (`make bench` starts one)"
            )
        rows["torch.save, local disk"] = _torch(folder / "batch.pt", samples)
        queries = _queries(folder / "many")
    finally:
        shutil.rmtree(folder)
    facts = {name: _figures(row, tokens) for name, row in rows.items()}
    _print(console, facts, queries)
    return {"samples": len(samples), "tokens_each": TOKENS, "batch": facts, "queries": queries}


def _folder() -> Path:
    folder = Path(".rollflow")
    folder.mkdir(exist_ok=True)
    return folder


def _batch(url: str, samples: list[Sample]) -> tuple[int, float, float]:
    """Bytes, and median seconds to commit a batch durably and to read it back verified."""
    store = Store(StoreConfig(url=url))
    run = RunRef("bench", store.run_url("bench"))
    refs: list[BatchRef] = []

    def write() -> None:
        step = len(refs)
        writer = ShardWriter(store, run, batch_folder(run, step))
        for start in range(0, len(samples), 64):
            writer.append(samples[start : start + 64])
        refs.append(
            commit_batch(
                store, run, writer.folder, step, writer.parts,
                groups=GROUPS, policy_versions=[0], metrics={}, ledger={},
            )
        )  # fmt: skip

    write_s = _median_s(write)
    read_s = _median_s(lambda: read_batch(store, refs[0]))
    size = sum(store.checksum(part)[0] for part in store.list(refs[0].url))
    for part in store.list(run.url):
        store.delete(part)
    return size, write_s, read_s


def _torch(path: Path, samples: list[Sample]) -> tuple[int, float, float]:
    """The same of a dump: the same fields, neither synced nor verified."""
    rows = [
        {name: getattr(sample, name) for name in Sample.__slots__ if name != "status"}
        for sample in samples
    ]
    write_s = _median_s(lambda: torch.save(rows, path))
    read_s = _median_s(lambda: torch.load(path, weights_only=True))
    return path.stat().st_size, write_s, read_s


def _queries(folder: Path) -> dict:
    """Two questions to 100,000 samples on local disk, asked in a process of their own."""
    store = Store(StoreConfig(url=str(folder)))
    run = create_run(store, "many", {}, {}, "")
    for step in range(STEPS):
        table = synthetic.table("many", step, STEP_GROUPS, PER_GROUP, STEP_TOKENS)
        data = encode(table)
        part = Part("part-0000-00000.arrow", table.num_rows, len(data), sha256_hex(data))
        store.put_new(f"{batch_folder(run, step)}/{part.name}", data)
        commit_batch(
            store, run, batch_folder(run, step), step, [part],
            groups=STEP_GROUPS, policy_versions=[step], metrics={}, ledger={},
        )  # fmt: skip
    middle = STEPS // 2
    sample = f"{middle:06d}/train.jsonl:{middle * STEP_GROUPS}#3"
    command = [sys.executable, "-c", _QUERIES, run.url, MEAN, sample]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    size = sum(file.stat().st_size for file in folder.rglob("*.arrow"))
    rows = STEPS * STEP_GROUPS * PER_GROUP
    return {
        "samples": rows,
        "tokens_each": STEP_TOKENS,
        "mb": size / 1e6,
        **json.loads(answer.stdout),
    }


def _median_s(call: Callable[[], object]) -> float:
    seconds: list[float] = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _figures(row: tuple[int, float, float], tokens: int) -> dict[str, float]:
    size, write_s, read_s = row
    return {
        "bytes_per_token": size / tokens,
        "write_s": write_s,
        "read_s": read_s,
        "write_mb_per_s": size / write_s / 1e6,
        "read_mb_per_s": size / read_s / 1e6,
        "write_tokens_per_s": tokens / write_s,
        "read_tokens_per_s": tokens / read_s,
    }


def _print(console: Console, facts: dict[str, dict[str, float]], queries: dict) -> None:
    names = ("bytes/token", "write s", "read s", "write MB/s", "read MB/s")
    table = Table("", *names, title=f"{GROUPS * PER_GROUP} samples of {TOKENS} tokens, as a batch")
    for name, found in facts.items():
        numbers = [f"{value:.2f}" for value in list(found.values())[:3]]
        rates = [f"{value:.0f}" for value in list(found.values())[3:5]]
        table.add_row(name, *numbers, *rates)
    console.print(table)
    console.print(
        f"{queries['samples']} samples of {queries['tokens_each']} tokens ({queries['mb']:.0f} MB): mean "
        f"reward by step {queries['mean_reward_by_step_s'] * 1e3:.0f} ms, one transcript "
        f"{queries['one_transcript_s'] * 1e3:.0f} ms, at most {queries['mb_peak']:.0f} MB of memory "
        f"({queries['mb_before']:.0f} before the first query)"
    )
