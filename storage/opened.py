"""A run to look into from Python: ``rollflow.storage.open_run(url)``."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .checkpoints import list_checkpoints
from .config import StoreConfig
from .manifests import batch_steps, dataset_names, find_batch, read_table
from .objects import Store, normalised_url
from .origins import batch_home
from .query import query
from .refs import BatchRef, CheckpointRef, RunRef
from .runs import RunRecord, read_run
from .steps import StepRecord, read_step_records

if TYPE_CHECKING:
    import pandas


def open_run(url: str, options: Mapping[str, Any] | None = None) -> "OpenRun":
    """Open the run at ``url``, e.g. ``s3://bucket/prefix/runs/demo`` or ``.rollflow/store/runs/demo``.

    ``options`` are those of the store (``store.options``). It may still go on: every call reads what
    is committed by then. ``RunNotFound`` names the runs there are; ValueError where the URL names none.
    """
    root, found, name = normalised_url(url).rpartition("/runs/")
    if not found or "/" in name:
        raise ValueError(f"url {url!r} names no run; give <store>/runs/<name of the run>")
    store = Store(StoreConfig(url=root, options=dict(options or {})))
    return OpenRun(store, read_run(store, name))


class OpenRun:
    """Steps, samples, checkpoints, evaluations and metrics of one run."""

    def __init__(self, store: Store, record: RunRecord) -> None:
        self.store = store
        self.record = record
        """Settings, versions and code revision that it was created with."""

    @property
    def ref(self) -> RunRef:
        """Its name and URL, for the functions of the storage layer."""
        return self.record.ref

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting that it was created with."""
        return self.record.settings

    def steps(self) -> list[StepRecord]:
        """Records of the committed steps in order, verified."""
        return read_step_records(self.store, self.ref)

    def batches(self, dataset: str | None = None) -> list[BatchRef]:
        """The committed batches in order, or the evaluations on ``dataset``; a replay's are its source's."""
        home = batch_home(self.store, self.ref) if dataset is None else self.ref
        steps = batch_steps(self.store, home, dataset)
        found = (find_batch(self.store, home, step, dataset) for step in steps)
        return [ref for ref in found if ref]

    def samples(
        self, steps: int | Iterable[int] | None = None, dataset: str | None = None
    ) -> pa.Table:
        """Samples of some steps or all, every byte verified, ordered by step, group and index.

        Arrow; ``.to_pandas()`` and ``rollflow.storage.schema.from_table`` give the rest. Everything
        is in memory then: for a few columns of a large run take :meth:`sql`.

        Raises:
            ValueError: a step that was asked for has no committed batch.
        """
        known = {ref.step: ref for ref in self.batches(dataset)}
        wanted = known if steps is None else [steps] if isinstance(steps, int) else steps
        tables: list[pa.Table] = []
        for step in sorted(wanted):
            if step not in known:
                raise ValueError(
                    f"run {self.ref.name!r} has no committed batch of step {step}; it has "
                    f"{_spans(sorted(known))}"
                )
            tables.append(read_table(self.store, known[step]))
        return pa.concat_tables(tables) if tables else query(self.store, self.ref, "FROM samples")

    def frame(
        self, steps: int | Iterable[int] | None = None, dataset: str | None = None
    ) -> "pandas.DataFrame":
        """The same as a pandas data frame."""
        return self.samples(steps, dataset).to_pandas()

    def checkpoints(self) -> list[CheckpointRef]:
        """The committed checkpoints in order."""
        return list_checkpoints(self.store, self.ref)

    def evaluations(self) -> dict[str, list[BatchRef]]:
        """The committed evaluations in order, by name of the dataset."""
        return {name: self.batches(name) for name in dataset_names(self.store, self.ref)}

    def metrics(self) -> pa.Table:
        """One row a step: ``step``, then every metric by its slash name; null where a step lacks it."""
        records = self.steps()
        names = sorted({name for record in records for name in record.ref.metrics})
        columns: dict[str, list[Any]] = {"step": [record.ref.step for record in records]}
        for name in names:
            columns[name] = [record.ref.metrics.get(name) for record in records]
        return pa.table(columns)

    def sql(self, query_text: str, *parameters: Any) -> pa.Table:
        """The answer to a query over the views that ``storage/README.md`` lists."""
        return query(self.store, self.ref, query_text, parameters)


def _spans(numbers: list[int]) -> str:
    """``0-7, 9`` for a list of step numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in spans) or "none"
