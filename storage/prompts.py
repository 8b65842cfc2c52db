"""Prompts: rows of a JSONL or Parquet file, and which of them a step takes."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import DataConfig
from .integrity import exact_json
from .objects import Store, normalised_url
from .order import draw_positions
from .samples import Message, Prompt

_SLICE = re.compile(r"(?P<path>.*)@\[(?P<start>\d*):(?P<stop>\d*)\]")

Row = tuple[int, str, Any]
"""Number of the row in the file, the place to show, and the row or the error that it gave."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no prompt, e.g. ``BadRow("train.jsonl line 8 (row 7)", "no column 'prompt'")``."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable rows of a dataset, in file order, and those that were skipped."""

    prompts: list[Prompt]
    skipped: list[BadRow] = field(default_factory=list[BadRow])

    def draw(self, step: int, n: int, seed: int, shuffle: bool) -> list[Prompt]:
        """Give the ``n`` prompts of a step: a pure function of its arguments.

        Step s takes positions s*n to s*n+n-1 of all epochs laid end to end. An epoch holds every
        prompt once; with ``shuffle`` its order comes from ``seed`` + epoch. A batch may span
        epochs, and holds no prompt twice unless ``n`` exceeds the number of prompts.
        """
        positions = draw_positions(len(self.prompts), step, n, seed=seed, shuffle=shuffle)
        return [self.prompts[i] for i in positions]


def load_prompts(
    store: Store, config: DataConfig, reject: Callable[[Prompt], str | None] | None = None
) -> PromptSet:
    """Load a dataset: a JSONL or Parquet file at any URL, whole or sliced by ``path@[a:b]``.

    The prompt is text or a list of chat messages, the label any scalar (kept as text); columns
    that have no other meaning join the metadata. ``reject`` may give the reason why a prompt is
    not usable, such as its length in tokens. ValueError names file, line and reason of a bad row
    (with ``on_bad_row = "skip"`` it is listed in ``skipped``), a bad slice, and a dataset without
    any usable row.
    """
    source, rows = _sliced_rows(store, config.path)
    prompts: list[Prompt] = []
    skipped: list[BadRow] = []
    for number, where, row in rows:
        try:
            prompt = _prompt(row, number, source, config)
            if reject and (reason := reject(prompt)):
                raise _RowError(reason)
            prompts.append(prompt)
        except _RowError as error:
            if config.on_bad_row == "stop":
                raise ValueError(
                    f'{where}: {error}; fix the row, or set on_bad_row = "skip"'
                ) from error
            skipped.append(BadRow(where, str(error)))
    if not prompts:
        raise ValueError(
            f"path {config.path!r} has no usable row ({len(skipped)} skipped"
            + (f", the first: {skipped[0].where}: {skipped[0].reason})" if skipped else ")")
            + "; give a dataset with at least one"
        )
    return PromptSet(prompts, skipped)


class _RowError(Exception):
    """Why a row is no prompt."""


def _prompt(row: Any, number: int, source: str, config: DataConfig) -> Prompt:
    if isinstance(row, _RowError):
        raise row
    if not isinstance(row, Mapping):
        raise _RowError(f"is {row!r:.80}, not an object with named columns")
    prompt_id = f"{source.rpartition('/')[2]}:{number}"
    columns = dict(row)
    if config.prompt_key not in columns:
        raise _RowError(
            f"has no column {config.prompt_key!r}, only {sorted(map(str, columns))}: prompt_key "
            "names the one with the prompts"
        )
    prompt = _prompt_value(columns.pop(config.prompt_key), config.prompt_key)
    label = _label(columns.pop(config.label_key, None), config.label_key)
    metadata = _metadata(columns, config.metadata_key)
    return Prompt(prompt_id, number, source, prompt, label, metadata)


def _prompt_value(value: Any, key: str) -> str | list[Message]:
    if isinstance(value, str) and value:
        return _text(value, key)
    if isinstance(value, list) and value:
        for i, message in enumerate(value):
            if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
                raise _RowError(f"{key}[{i}] is {message!r:.80}, not a message with a role")
            if not isinstance(message.get("content"), str | list | None):
                raise _RowError(f"{key}[{i}].content is {message['content']!r:.80}, not text")
        _text(json.dumps(_json(value, key), ensure_ascii=False), key)
        return value
    raise _RowError(f"{key} is {value!r:.80}; give text or a list of chat messages")


def _label(value: Any, key: str) -> str | None:
    if isinstance(value, list | dict | bytes):
        raise _RowError(f"{key} is {value!r:.80}; give one text, number or truth value")
    return None if value is None else _text(str(value), key)


def _metadata(columns: dict[str, Any], key: str) -> dict[str, Any]:
    metadata = columns.pop(key, None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise _RowError(f"{key} is {metadata!r:.80}; give an object")
    if both := sorted(columns.keys() & metadata.keys()):
        raise _RowError(f"{both[0]!r} is a column and a key of {key!r}; rename one")
    return {name: _json(value, name) for name, value in {**metadata, **columns}.items()}


def _json(value: Any, name: str) -> Any:
    try:
        return exact_json(value, name)
    except ValueError as error:
        raise _RowError(str(error)) from error


def _text(value: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _RowError(f"{name} is no valid Unicode ({error.reason})") from error
    return value


def _sliced_rows(store: Store, path: str) -> tuple[str, Iterator[Row]]:
    start, stop = 0, None
    if "@[" in path:
        if not (match := _SLICE.fullmatch(path)):
            raise ValueError(f"path {path!r} ends in no slice; write it as path@[a:b]")
        path = match["path"]
        start = int(match["start"] or 0)
        stop = int(match["stop"]) if match["stop"] else None
    source = normalised_url(path)
    rows = _read_rows(store, source)
    if not rows:
        raise ValueError(f"path {path!r} has no rows")
    stop = len(rows) if stop is None else stop
    if not 0 <= start < stop <= len(rows):
        raise ValueError(
            f"path {path!r}: the slice [{start}:{stop}] is not inside its {len(rows)} rows"
        )
    return source, iter(rows[start:stop])


def _read_rows(store: Store, source: str) -> list[Row]:
    name = source.rpartition("/")[2]
    try:
        with store.open_input(source) as stream:
            if name.endswith(".parquet"):
                return list(_parquet_rows(stream.read(), source))
            if ".jsonl" in name or ".ndjson" in name:
                return list(_json_rows(stream.read(), source))
    except FileNotFoundError as error:
        raise ValueError(f"path {source!r}: no such file; give an existing one") from error
    except IsADirectoryError as error:
        raise ValueError(f"path {source!r} is a folder; give a file in it") from error
    raise ValueError(f"path {source!r} is neither .jsonl nor .parquet; convert it to one of them")


def _json_rows(data: bytes, source: str) -> Iterator[Row]:
    """Read lines that are not blank; a line that is no JSON gives its error as the row."""
    number = 0
    for i, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            row = _RowError(f"is no JSON: {error}")
        yield number, f"{source} line {i} (row {number})", row
        number += 1


def _parquet_rows(data: bytes, source: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"path {source!r} is no Parquet file ({error}); write it anew") from error
    for number, row in enumerate(table.to_pylist()):
        yield number, f"{source} row {number}", row
