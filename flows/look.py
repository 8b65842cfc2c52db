"""Looking into runs: queries, filters, comparisons and exports, for a person or a file."""

import base64
import csv
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from rollflow.storage.compaction import compact
from rollflow.storage.compare import compare_runs
from rollflow.storage.inspect import sample_rows
from rollflow.storage.opened import OpenRun
from rollflow.storage.query import reader
from rollflow.storage.runs import read_run
from rollflow.storage.samples import Sample, Status
from rollflow.storage.schema import JSON_COLUMNS, SCHEMA, from_table

from .terminal import console, opened

Format = Literal["table", "csv", "json"]
LONGEST_CELL = 80


def print_run(store_url: str, name: str) -> None:
    """What a run is: where it came from, how far it is, what it holds."""
    store, ref = opened(store_url, name)
    run = OpenRun(store, read_run(store, name))
    steps, batches, checkpoints = run.steps(), run.batches(), run.checkpoints()
    facts: dict[str, Any] = {
        "run": ref.name,
        "url": ref.url,
        "created": run.record.created_at,
        "code": run.record.code_revision,
        "algorithm": run.settings.get("algorithm", {}).get("name", ""),
        "committed steps": len(steps),
        "batches": f"{len(batches)} with {sum(b.rows for b in batches)} samples",
        "checkpoints": ", ".join(f"step {c.step}" for c in checkpoints) or "none",
        "weights": steps[-1].ref.weights_digest if steps else "the first",
    }
    for dataset, found in run.evaluations().items():
        key = f"eval/{dataset}/reward"
        facts[f"evaluated on {dataset}"] = ", ".join(
            f"{b.step}: {b.metrics[key]:.3f}" for b in found if key in b.metrics
        )
    table = Table(box=None, show_header=False)
    for key, value in facts.items():
        table.add_row(key, Text(str(value)))
    console.print(table)


def print_query(store_url: str, name: str, sql: str, form: Format, limit: int) -> None:
    """The answer to a query: a table of at most ``limit`` rows for a person, all rows for a program."""
    store, run = opened(store_url, name)
    answer = reader(store, run, sql)
    if form != "table":
        _write_rows(answer, form)
        return
    table = Table(*answer.schema.names, box=None)
    rows = _rows(answer)
    for row in islice(rows, limit):
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    console.print(table)
    if next(rows, None) is not None:
        console.print(f"the first {limit} rows; --limit or --format csv gives more")


def filtered(
    store_url: str,
    name: str,
    step: int | None,
    min_reward: float | None,
    max_reward: float | None,
    status: Status | None,
    prompt: str | None,
    limit: int,
) -> list[Sample]:
    """The first samples that every given filter lets through."""
    tests = {
        "step = ?": step,
        "reward >= ?": min_reward,
        "reward <= ?": max_reward,
        "status = ?": None if status is None else status.value,
        "prompt_id = ?": prompt,
    }
    given = {test: value for test, value in tests.items() if value is not None}
    store, run = opened(store_url, name)
    where = " AND ".join(given) or "true"
    return from_table(_stored(sample_rows(store, run, where, list(given.values()), limit)))


def print_difference(
    store_url: str, left: str, right: str, other_store: str, step: int | None, limit: int
) -> None:
    """Two runs side by side: what both have, and the samples whose rewards differ most."""
    other = opened(other_store or store_url, right)
    found = compare_runs(opened(store_url, left), other, step, limit)
    console.print(
        f"{found.both} samples in both, {found.only_left} only in {left}, "
        f"{found.only_right} only in {right}"
    )
    console.print(
        f"of those in both: {found.other_reward} with another reward, "
        f"{found.other_text} with another answer; mean reward {_number(found.mean_left)} "
        f"in {left}, {_number(found.mean_right)} in {right}"
    )
    if not found.rows:
        return
    table = Table("sample", f"reward in {left}", f"reward in {right}", "graders", box=None)
    for row in found.rows:
        graders = dict.fromkeys((row["left_grader"], row["right_grader"]))
        table.add_row(
            Text(row["sample_id"]),
            _number(row["left_reward"]),
            _number(row["right_reward"]),
            Text(" -> ".join(graders)),
        )
    console.print(table)


def export(store_url: str, name: str, target: Path, where: str) -> int:
    """Write samples to a local file whose ending says how: .jsonl, .parquet, .arrow or .csv.

    Returns:
        How many samples were written.

    Raises:
        ValueError: the ending is another, or the condition is no SQL.
    """
    writers = {".jsonl": _to_jsonl, ".parquet": _to_parquet, ".arrow": _to_arrow, ".csv": _to_csv}
    if target.suffix not in writers:
        raise ValueError(f"{str(target)!r} ends in none of {', '.join(writers)}")
    store, run = opened(store_url, name)
    columns = ", ".join(f'"{column}"' for column in SCHEMA.names)
    answer = reader(store, run, f"SELECT {columns} FROM samples WHERE {where}")
    partial = target.with_name(f".{target.name}.partial")
    try:
        rows = writers[target.suffix](answer, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return rows


def print_compaction(store_url: str, name: str, before: int | None) -> None:
    """Compact the steps of a run below ``before``; say what was written."""
    made = compact(*opened(store_url, name), before)
    for file in made:
        console.print(f"steps {file.first}-{file.last}: {file.rows} samples in {file.url}")
    console.print(f"{len(made)} files written")


def _rows(answer: pa.RecordBatchReader) -> Iterator[dict[str, Any]]:
    for batch in answer:
        yield from batch.to_pylist()


def _write_rows(answer: pa.RecordBatchReader, form: Format) -> None:
    if form == "json":
        for row in _rows(answer):
            print(json.dumps(row, default=str, ensure_ascii=False))
        return
    lines = csv.writer(sys.stdout)
    lines.writerow(answer.schema.names)
    for row in _rows(answer):
        lines.writerow(row.values())


def _stored(answer: pa.RecordBatchReader) -> pa.Table:
    """What DuckDB gives, in the types of the schema."""
    table = answer.read_all()
    columns = [table.column(field.name).cast(field.type) for field in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _to_jsonl(answer: pa.RecordBatchReader, target: Path) -> int:
    count = 0
    with target.open("w", encoding="utf-8") as lines:
        for row in _rows(answer):
            objects = {name: json.loads(row[name]) for name in JSON_COLUMNS}
            parts = dict(row["reward_parts"])
            plain = {**row, **objects, "reward_parts": parts}
            lines.write(json.dumps(plain, ensure_ascii=False, default=_as_text))
            lines.write("\n")
            count += 1
    return count


def _as_text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _to_parquet(answer: pa.RecordBatchReader, target: Path) -> int:
    with pq.ParquetWriter(target, answer.schema, compression="zstd") as writer:
        return _copied(answer, writer.write_batch)


def _to_arrow(answer: pa.RecordBatchReader, target: Path) -> int:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(
        sink, answer.schema, options=options
    ) as writer:  # fmt: skip
        return _copied(answer, writer.write_batch)


def _to_csv(answer: pa.RecordBatchReader, target: Path) -> int:
    """Only the columns that fit a cell: no lists, maps and bytes."""
    unfit = pa.types.is_nested, pa.types.is_binary, pa.types.is_large_binary
    flat = [f.name for f in answer.schema if not any(is_it(f.type) for is_it in unfit)]
    schema = pa.schema([answer.schema.field(name) for name in flat])
    with pacsv.CSVWriter(str(target), schema) as writer:
        return _copied(answer, lambda batch: writer.write_batch(batch.select(flat)))


def _copied(answer: pa.RecordBatchReader, write: Any) -> int:
    count = 0
    for batch in answer:
        write(batch)
        count += batch.num_rows
    return count


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    flat = text.replace("\n", "⏎")
    return flat if len(flat) <= LONGEST_CELL else f"{flat[: LONGEST_CELL - 1]}…"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
