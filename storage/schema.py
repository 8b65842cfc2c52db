"""Samples as Arrow: one row a sample, and the exact way there and back. Older schemas are read too."""

import json
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from .integrity import exact_json
from .samples import Sample, Status

SCHEMA = pa.schema(
    [
        pa.field("run", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("episode_id", pa.string(), nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("response_text", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("rollout_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("policy_versions", pa.list_(pa.int32()), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("reward", pa.float64(), nullable=True),
        pa.field("reward_parts", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("grader", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=True),
        pa.field("metadata", pa.string(), nullable=False),
        pa.field("sampling", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("engine", pa.string(), nullable=False),
        pa.field("template", pa.string(), nullable=False),
        pa.field("generate_s", pa.float64(), nullable=False),
        pa.field("score_s", pa.float64(), nullable=False),
        pa.field("cached_tokens", pa.int64(), nullable=False),
        pa.field("previous_reward", pa.float64(), nullable=True),
        pa.field("previous_grader", pa.string(), nullable=False),
        pa.field("routed_experts", pa.large_binary(), nullable=True),
    ],
    metadata={"rollflow.schema": "3"},
)
"""Schema 3, which is written; storage/README.md explains every column."""

ADDED: dict[int, dict[str, Any]] = {
    2: {"previous_reward": None, "previous_grader": ""},
    3: {"routed_experts": None},
}
"""Columns by the version that brought them, with the value that older samples get."""

_NEWEST = max(ADDED)

JSON_COLUMNS = ("metadata", "sampling")
"""Columns that hold a JSON object as text."""


def to_table(samples: Sequence[Sample]) -> pa.Table:
    """Give the samples as a table of ``SCHEMA``, in their order.

    Log-probabilities are kept as float32, the type the engines compute them in; everything else is
    kept exactly. ValueError names the sample and column of a value that the schema cannot hold.
    """
    columns = [_column(field, samples) for field in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def from_table(table: pa.Table) -> list[Sample]:
    """Give the table's rows as samples, in their order; ValueError where no version fits it."""
    table = upgraded(table)
    columns = [_values(field, table.column(field.name)) for field in SCHEMA]
    names = SCHEMA.names
    return [Sample(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]


def upgraded(table: pa.Table) -> pa.Table:
    """Give a table of any version as one of ``SCHEMA``; ValueError where no version fits it."""
    version = check_schema(table.schema)
    for later in range(version + 1, _NEWEST + 1):
        for name, value in ADDED[later].items():
            field = SCHEMA.field(name)
            filled = pa.repeat(pa.scalar(value, field.type), table.num_rows)
            table = table.append_column(field, filled)
    return table.replace_schema_metadata(SCHEMA.metadata)


def check_schema(schema: pa.Schema) -> int:
    """Give the version of a schema; ValueError names an unknown one or the columns that differ."""
    text = (schema.metadata or {}).get(b"rollflow.schema", b"none").decode()
    if text not in {str(version) for version in range(1, _NEWEST + 1)}:
        raise ValueError(
            f"rollflow.schema is {text}; this version of rollflow reads 1 to {_NEWEST}"
        )
    version = int(text)
    later = {name for number in range(version + 1, _NEWEST + 1) for name in ADDED[number]}
    expected = pa.schema([field for field in SCHEMA if field.name not in later])
    if not schema.equals(expected):
        ours, theirs = set(expected), set(schema)
        differing = sorted({field.name for field in ours ^ theirs}) or "their order"
        raise ValueError(
            f"columns differ from schema {text}: {differing}; write them with to_table"
        )
    return version


def _column(field: pa.Field, samples: Sequence[Sample]) -> pa.Array:
    values = [getattr(sample, field.name) for sample in samples]
    if field.name in JSON_COLUMNS:
        values = [
            json.dumps(exact_json(value, f"sample {sample.sample_id}: {field.name}"))
            for sample, value in zip(samples, values, strict=True)
        ]
    try:
        return _array(field, values)
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError) as error:
        raise _bad_value(field, samples, values) from error


def _array(field: pa.Field, values: list[Any]) -> pa.Array:
    kind = field.type
    if pa.types.is_list(kind):
        offsets = np.zeros(len(values) + 1, np.int32)
        np.cumsum([len(value) for value in values], out=offsets[1:])
        flat = _typed(list(chain.from_iterable(values)), kind.value_type)
        array, inner = pa.ListArray.from_arrays(offsets, flat, type=kind), flat
    elif pa.types.is_map(kind):
        array = pa.array([list(value.items()) for value in values], kind)
        inner = array.items
    else:
        array = inner = _typed(values, kind)
    if inner.null_count and not field.nullable:
        raise pa.ArrowInvalid("None is no value here")
    return array


def _typed(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Convert without the silent loss of ``pa.array([1, 2.5], pa.int32())``, which gives [1, 2]."""
    found = pa.array(values)
    if pa.types.is_floating(kind):
        fits = pa.types.is_floating(found.type) or pa.types.is_integer(found.type)
    elif pa.types.is_integer(kind):
        fits = pa.types.is_integer(found.type)
    elif pa.types.is_large_binary(kind):
        fits = pa.types.is_binary(found.type)
    else:
        fits = found.type == kind
    if not (fits or pa.types.is_null(found.type)):
        raise pa.ArrowInvalid(f"it is {found.type}")
    return found.cast(kind)


def _bad_value(field: pa.Field, samples: Sequence[Sample], values: list[Any]) -> ValueError:
    """Find the first value that does not fit, to name it."""
    for sample, value in zip(samples, values, strict=True):
        try:
            _array(field, [value])
        except (pa.ArrowException, OverflowError, UnicodeError, TypeError) as error:
            return ValueError(
                f"sample {sample.sample_id}: {field.name} is {value!r:.200}, "
                f"which {field.type} cannot hold ({error}); give a value of that type"
            )
    return ValueError(f"{field.name}: more than {field.type} can hold; write smaller shards")


def _values(field: pa.Field, column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_list(field.type):
        return list(chain.from_iterable(_lists(chunk) for chunk in column.chunks))
    values = column.to_pylist()
    if field.name in JSON_COLUMNS:
        return [json.loads(value) for value in values]
    if pa.types.is_map(field.type):
        return [dict(value) for value in values]
    if field.name == "status":
        return [Status(value) for value in values]
    return values


def _lists(chunk: pa.ListArray) -> list[list[Any]]:
    """Cut the flat values by offset: about ten times as fast as ``to_pylist``."""
    offsets = chunk.offsets.to_numpy().tolist()
    flat = chunk.values.to_numpy(zero_copy_only=False).tolist()
    return [flat[a:b] for a, b in pairwise(offsets)]
