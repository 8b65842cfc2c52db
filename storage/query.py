"""SQL over a run: DuckDB on the shards as they stand, also of a run that still goes on.

Reads the columns that a query names and nothing else, so checksums are not verified here: training,
``audit`` and whatever reads a sample to show it do that.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .checkpoints import list_checkpoints, read_checkpoint
from .compaction import Compacted, compactions
from .integrity import Record
from .manifests import batch_folder, batch_steps, dataset_names, read_manifest
from .objects import Store
from .origins import batch_home
from .refs import RunRef
from .schema import ADDED, SCHEMA
from .steps import read_step_records

if TYPE_CHECKING:
    import duckdb
    import pyarrow.dataset as pads

VIEWS = {
    "samples": "one row a sample that was trained on or is about to be: the columns of the schema, "
    "and sample_id, response_tokens",
    "evals": "the same of evaluations, and dataset",
    "batches": "one row a committed batch: step, rows, groups, digest, policy_versions, committed_at",
    "steps": "one row a committed step: step, batch_digest, weights_digest, committed_at, metrics "
    "(a map: metrics['rollout/reward'])",
    "metrics": "one row a step and metric: step, name, value",
    "checkpoints": "one row a checkpoint: step, weights_digest, files, bytes, committed_at",
}
"""What a query can name; storage/README.md has the columns of the schema."""

ROWS_AT_ONCE = 1024
_LATER = {name: value for columns in ADDED.values() for name, value in columns.items()}
_SCANNED = pa.schema([field.with_nullable(True) for field in SCHEMA])


def query(store: Store, run: RunRef, sql: str, parameters: Sequence[Any] = ()) -> pa.Table:
    """Give the answer to one SQL query over the ``VIEWS`` of a run; ValueError where it is wrong."""
    return reader(store, run, sql, parameters).read_all()


def reader(
    store: Store, run: RunRef, sql: str, parameters: Sequence[Any] = ()
) -> pa.RecordBatchReader:
    """The same, batch by batch: memory stays flat whatever the size of the answer."""
    import duckdb

    connection = connect()
    create_views(connection, store, run, sql)
    try:
        answer = connection.sql(sql, params=list(parameters) or None)
        if answer is None:  # a statement that gives no rows
            return pa.schema([]).empty_table().to_reader()
        return answer.to_arrow_reader(ROWS_AT_ONCE)
    except duckdb.Error as error:
        views = ", ".join(VIEWS)
        raise ValueError(f"the query fails: {error}\nThere are the views {views}") from error


def connect() -> "duckdb.DuckDBPyConnection":
    """Give a connection in memory that loads nothing from elsewhere."""
    import duckdb

    return duckdb.connect(config={"autoinstall_known_extensions": False})


def create_views(
    connection: "duckdb.DuckDBPyConnection",
    store: Store,
    run: RunRef,
    sql: str,
    prefix: str = "",
) -> None:
    """Create the views that ``sql`` names, under names that begin with ``prefix``."""
    makers: dict[str, Callable[[], None]] = {
        "samples": lambda: _samples_view(connection, store, batch_home(store, run), prefix),
        "evals": lambda: _evals_view(connection, store, run, prefix),
        "batches": lambda: _table(
            connection, f"{prefix}batches", _batches(store, batch_home(store, run))
        ),
        "steps": lambda: _table(connection, f"{prefix}steps", _steps(store, run)),
        "metrics": lambda: _table(connection, f"{prefix}metrics", _metrics(store, run)),
        "checkpoints": lambda: _table(connection, f"{prefix}checkpoints", _checkpoints(store, run)),
    }
    for name, make in makers.items():
        if re.search(rf"\b{prefix}{name}\b", sql, re.IGNORECASE):
            make()


def read_manifests(
    store: Store, run: RunRef, dataset: str | None = None, without: Iterable[int] = ()
) -> list[Record]:
    """Give the manifests of all committed batches in order, but for the steps in ``without``."""
    skipped = set(without)
    found: list[Record] = []
    for step in batch_steps(store, run, dataset):
        if step not in skipped:
            try:
                found.append(read_manifest(store, batch_folder(run, step, dataset)))
            except FileNotFoundError:
                continue
    return found


def scan(store: Store, run: RunRef, manifests: Sequence[Record]) -> "pads.Dataset":
    """Give the parts that manifests name as a dataset that reads only what is asked for."""
    import pyarrow.dataset as pads

    format_ = pads.IpcFileFormat()
    filesystem, _ = store.arrow_place(run.url)
    fragments = []
    for manifest in manifests:
        folder = batch_folder(run, manifest["step"], manifest["dataset"])
        is_of_step = pads.field("step") == manifest["step"]
        for part in manifest["parts"]:
            _, path = store.arrow_place(f"{folder}/{part['name']}")
            fragments.append(format_.make_fragment(path, filesystem, is_of_step))
    return pads.FileSystemDataset(fragments, _SCANNED, format_, filesystem)


def _samples_view(
    connection: "duckdb.DuckDBPyConnection", store: Store, run: RunRef, prefix: str
) -> None:
    files = compactions(store, run)
    covered = {step for file in files for step in file.digests}
    manifests = read_manifests(store, run, without=covered)
    sources = [_registered(connection, f"{prefix}parts", scan(store, run, manifests), manifests)]
    if files:
        sources.append(_parquet(connection, store, files, f"{prefix}compacted"))
    _view(connection, f"{prefix}samples", sources)


def _evals_view(
    connection: "duckdb.DuckDBPyConnection", store: Store, run: RunRef, prefix: str
) -> None:
    sources: list[str] = []
    for number, dataset in enumerate(dataset_names(store, run)):
        manifests = read_manifests(store, run, dataset)
        name = f"{prefix}evals_{number}"
        source = _registered(connection, name, scan(store, run, manifests), manifests)
        quoted = dataset.replace("'", "''")
        sources.append(f"SELECT *, '{quoted}' AS dataset FROM ({source})")
    if not sources:
        empty = _SCANNED.empty_table().append_column("dataset", pa.array([], pa.string()))
        connection.register(f"{prefix}evals_none", empty)
        sources = [f'SELECT * FROM "{prefix}evals_none"']
    _view(connection, f"{prefix}evals", sources, ", dataset")


def _registered(
    connection: "duckdb.DuckDBPyConnection",
    name: str,
    dataset: "pads.Dataset",
    manifests: Sequence[Record],
) -> str:
    """Make parts known to DuckDB; the query that gives the members of their batches."""
    connection.register(name, dataset)
    left_out = [(m["step"], group) for m in manifests for group in m.get("left_out") or {}]
    if not left_out:
        return f'SELECT * FROM "{name}"'
    steps, groups = zip(*left_out, strict=True)
    table = pa.table({"step": pa.array(steps, pa.int64()), "group_id": pa.array(groups)})
    connection.register(f"{name}_left_out", table)
    return f'SELECT * FROM "{name}" ANTI JOIN "{name}_left_out" USING (step, group_id)'


def _parquet(
    connection: "duckdb.DuckDBPyConnection", store: Store, files: Sequence[Compacted], name: str
) -> str:
    places = [store.local_path(file.url) for file in files]
    if all(places):  # DuckDB's own reader skips row groups by their statistics
        quoted = ", ".join("'" + str(place).replace("'", "''") + "'" for place in places)
        # Columns that are newer than all of the files are in none of them.
        connection.register(f"{name}_columns", _SCANNED.empty_table())
        return (
            f"SELECT * FROM read_parquet([{quoted}], union_by_name = true) "
            f'UNION ALL BY NAME SELECT * FROM "{name}_columns"'
        )
    import pyarrow.dataset as pads

    filesystem, _ = store.arrow_place(files[0].url)
    paths = [store.arrow_place(file.url)[1] for file in files]
    dataset = pads.dataset(paths, _SCANNED, format="parquet", filesystem=filesystem)
    connection.register(name, dataset)
    return f'SELECT * FROM "{name}"'


def _view(
    connection: "duckdb.DuckDBPyConnection", name: str, sources: Sequence[str], more: str = ""
) -> None:
    columns = ", ".join(
        f"coalesce({_literal(column)}) AS {column}" if _LATER.get(column) is not None
        else f'"{column}"'
        for column in SCHEMA.names
    )  # fmt: skip
    # DuckDB finds the columns of sources by position: they are named, so that all agree.
    union = " UNION ALL ".join(f"SELECT {columns}{more} FROM ({source})" for source in sources)
    connection.execute(
        f"CREATE VIEW {name} AS SELECT *, group_id || '#' || \"index\" AS sample_id, "
        f"len(response_ids) AS response_tokens FROM ({union})"
    )


def _literal(column: str) -> str:
    value = str(_LATER[column]).replace("'", "''")
    return f"\"{column}\", '{value}'"


def _table(connection: "duckdb.DuckDBPyConnection", name: str, table: pa.Table) -> None:
    connection.register(name, table)


def _batches(store: Store, run: RunRef) -> pa.Table:
    rows = [
        {
            "step": m["step"],
            "rows": m["rows"],
            "groups": m["groups"],
            "digest": m["digest"],
            "policy_versions": m["policy_versions"],
            "committed_at": m["committed_at"],
        }
        for m in read_manifests(store, run)
    ]
    kinds = {
        "step": pa.int64(),
        "rows": pa.int64(),
        "groups": pa.int64(),
        "digest": pa.string(),
        "policy_versions": pa.list_(pa.int64()),
        "committed_at": pa.string(),
    }
    return pa.Table.from_pylist(rows, schema=pa.schema(list(kinds.items())))


def _steps(store: Store, run: RunRef) -> pa.Table:
    rows = [
        {
            "step": r.ref.step,
            "batch_digest": r.ref.batch_digest,
            "weights_digest": r.ref.weights_digest,
            "committed_at": r.committed_at,
            "metrics": list(r.ref.metrics.items()),
        }
        for r in read_step_records(store, run)
    ]
    kinds = {
        "step": pa.int64(),
        "batch_digest": pa.string(),
        "weights_digest": pa.string(),
        "committed_at": pa.string(),
        "metrics": pa.map_(pa.string(), pa.float64()),
    }
    return pa.Table.from_pylist(rows, schema=pa.schema(list(kinds.items())))


def _metrics(store: Store, run: RunRef) -> pa.Table:
    rows = [
        {"step": r.ref.step, "name": name, "value": value}
        for r in read_step_records(store, run)
        for name, value in r.ref.metrics.items()
    ]
    kinds = {"step": pa.int64(), "name": pa.string(), "value": pa.float64()}
    return pa.Table.from_pylist(rows, schema=pa.schema(list(kinds.items())))


def _checkpoints(store: Store, run: RunRef) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for ref in list_checkpoints(store, run):
        record = read_checkpoint(store, ref.url)
        size = sum(file["bytes"] for file in record["files"])
        rows.append(
            {
                "step": ref.step,
                "weights_digest": ref.weights_digest,
                "files": len(record["files"]),
                "bytes": size,
                "committed_at": record["committed_at"],
            }
        )
    kinds = {
        "step": pa.int64(),
        "weights_digest": pa.string(),
        "files": pa.int64(),
        "bytes": pa.int64(),
        "committed_at": pa.string(),
    }
    return pa.Table.from_pylist(rows, schema=pa.schema(list(kinds.items())))
