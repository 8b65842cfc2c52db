"""From a TOML file and command-line words to a RunConfig, with errors that name the fix.

A word on the command line means the same as a key in the file::

    --rollout.batch-size 64      [rollout] batch_size = 64
    --rollout-batch-size 64      the same
    --sglang-mem-fraction-static 0.5   [sglang] mem_fraction_static = 0.5
    --router-policy round_robin        [router] policy = "round_robin"
    --tensor-model-parallel-size 2     [megatron] tensor_model_parallel_size = 2
"""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refusals import CREDENTIALS
from rollflow.storage.runs import read_run

from .config import SLIME_NAMES, RunConfig

PASSED_THROUGH = ("sglang", "router", "megatron")


def load_config(path: str | Path, words: Sequence[str] = ()) -> RunConfig:
    """Read ``path`` (TOML), lay the command-line ``words`` over it and validate the whole.

    Raises:
        ValueError: one line per mistake, each with field, value and fix.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"config file {str(path)!r} is a folder; give a TOML file in it")
    if not file.is_file():
        near = difflib.get_close_matches(file.stem, list(recipes()), n=1)
        hint = f"; did you mean {recipes()[near[0]]}?" if near else ""
        raise ValueError(f"config file {str(path)!r} does not exist{hint}")
    try:
        tree = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    return build_config(overlay(without_old_kind(tree, words), words))


def without_old_kind(tree: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """``tree`` without its algorithm's fields where ``words`` name another: they are of the old one's
    setting, and the new one has its own."""
    table, given = tree.get("algorithm", {}), overlay({}, words).get("algorithm", {})
    kind = given.get("name") if isinstance(given, dict) else given
    if not kind or not isinstance(table, Mapping) or kind == table.get("name", "grpo"):
        return _copy(tree)
    return {**_copy(tree), "algorithm": {"name": kind}}


def build_config(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a settings tree; unknown keys are refused with the nearest known name."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(dict(e)) for e in error.errors()]
        raise ValueError("\n".join(lines)) from error


def stored_settings(store_url: str, run: str) -> dict[str, Any]:
    """The settings that a run in a store was created with."""
    store = StoreConfig(url=store_url)
    record = read_run(Store(store), run)
    return {**record.settings, "store": store.model_dump()}


def overlay(tree: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """``tree`` with ``--key value`` and ``--key=value`` words laid over it.

    Values are TOML literals (``0.5``, ``true``, ``[1, 2]``); anything else is text. A list may also
    be given word by word. A switch without a value is ``true``.
    """
    result = _copy(tree)
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} stands where a --setting is expected")
        key, given, value = word[2:].partition("=")
        path = place_of(key)
        *tables, last = path
        values = [value] if given else _taken(rest, many=_item_of(path) is not None)
        place = result
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ValueError(f"--{key}: {table} is not a table")  # noqa: TRY004
        place[last] = value_of(path, values)
    return result


def merged(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with another tree laid over it, table by table; what is no table is replaced."""
    result = _copy(tree)
    for key, value in over.items():
        standing = result.get(key)
        if isinstance(standing, Mapping) and isinstance(value, Mapping):
            result[key] = merged(standing, value)
        else:
            result[key] = value
    return result


def value_of(path: Sequence[str], values: Sequence[str]) -> Any:
    """What the words after a setting's name are as its value; none are ``true``, for a switch.

    ValueError where there is none for a setting that is no switch. Text where the setting is a text, and a list where it is one, by TOML (``["a", "b"]``) or word by
    word (``a b``); any other word is a TOML literal.
    """
    if not values:
        types = _annotations(path)
        if types and bool not in types:
            raise ValueError(f"{'.'.join(path)} has no value; give one after its name")
        return True
    item = _item_of(path)
    if item is not None and not isinstance(literal(values[0]), list):
        return [_plain(v) if item is str else literal(v) for v in values]
    if len(values) > 1:
        return [literal(v) for v in values]
    return _plain(values[0]) if _is_text(path) else literal(values[0])


def recipes() -> dict[str, Path]:
    """The recipes that come with rollflow, by name."""
    return {p.stem: p for p in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}


def place_of(key: str) -> list[str]:
    """``rollout-batch-size`` -> ``["rollout", "batch_size"]``; bare unknown names are Megatron's."""
    if "." in key:
        return [part.replace("-", "_") for part in key.split(".")]
    name = key.replace("-", "_")
    if name in SLIME_NAMES:
        return SLIME_NAMES[name].split(".")
    return _path_of(name, [RunConfig], is_top=True) or ["megatron", name]


def _path_of(name: str, models: Sequence[type[BaseModel]], *, is_top: bool = False) -> list[str]:
    """The tables and the field that ``name`` joins with underscores; empty where there are none.

    A field that is nearly one of a table's is taken for it, so that the error names the table.
    """
    fields = {f: info for model in models for f, info in model.model_fields.items()}
    if name in fields:
        return [name]
    for table, info in fields.items():
        rest = name.removeprefix(f"{table}_")
        if rest == name or (is_top and table == "megatron"):
            continue
        below = models_in(info.annotation)
        if is_top and table in PASSED_THROUGH:
            return [table, rest]
        if path := _path_of(rest, below):
            return [table, *path]
        if difflib.get_close_matches(rest, [f for m in below for f in m.model_fields], n=1):
            return [table, rest]
    return []


def _taken(rest: list[str], *, many: bool) -> list[str]:
    """Take the words that belong to a setting off the others: one, or all up to the next name."""
    taken: list[str] = []
    while rest and not rest[0].startswith("--") and (many or not taken):
        taken.append(rest.pop(0))
    return taken


def _is_text(path: Sequence[str]) -> bool:
    found = _annotations(path)
    return bool(found) and all(a is str for a in found)


def _item_of(path: Sequence[str]) -> type | None:
    """What a setting that is a list of plain values holds; None for any other."""
    items = {get_args(a)[0] for a in _annotations(path) if get_origin(a) is list}
    return next((item for item in (str, int, float) if items == {item}), None)


def _annotations(path: Sequence[str]) -> list[Any]:
    """The types of the setting at ``path``: one, or one for each class that its table may be."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in path[:-1]:
        below = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [m for annotation in below for m in models_in(annotation)]
    last = path[-1] if path else ""
    return [m.model_fields[last].annotation for m in models if last in m.model_fields]


def _plain(text: str) -> Any:
    """A word that is text as it stands, e.g. ``2026`` for ``name``; a quoted one as TOML reads it."""
    return literal(text) if text.startswith(("'", '"')) else text


def literal(text: str) -> Any:
    """A value as TOML reads it; anything else is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _explain(error: dict[str, Any]) -> str:
    """One line for one pydantic error: field, what is wrong, value or nearest name."""
    place = _place(error["loc"])
    if error["type"] == "extra_forbidden":
        if (name := str(error["loc"][-1])) in SLIME_NAMES:
            return f"{place} is slime's name, for the command line; here it is {SLIME_NAMES[name]}"
        names = _siblings(error["loc"])
        near = difflib.get_close_matches(str(error["loc"][-1]), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(names))}"
        return f"{place} is not a setting; {hint}"
    if error["type"] == "union_tag_invalid":
        tag, known = error["ctx"]["tag"], error["ctx"]["expected_tags"].replace("'", "")
        near = difflib.get_close_matches(tag, known.split(", "), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {known}"
        return f"{place}.name = {tag!r} is none; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if not place or error["type"] == "missing" or CREDENTIALS in message:  # show no secret
        return f"{place}: {message}".removeprefix(": ")
    if place.startswith("store.options") or isinstance(error["input"], Mapping):
        return f"{place}: {message}"  # it may hold a secret, or is a table of which some fields are named
    return f"{place} = {error['input']!r}: {message}"


def _place(location: tuple[Any, ...]) -> str:
    """Dotted name of a setting; pydantic puts the algorithm's own name between."""
    parts = [str(part) for part in location]
    if parts[:1] == ["algorithm"] and len(parts) > 1:
        del parts[1]
    return ".".join(parts)


def _siblings(location: tuple[Any, ...]) -> set[str]:
    """Names known where ``location`` ends, following tables and list items from RunConfig down."""
    models: list[Any] = [RunConfig]
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        below = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [m for a in below for m in models_in(a)] or [
            m
            for m in models
            if m.model_fields.get("name") and m.model_fields["name"].default == part
        ]
    return {name for m in models for name in m.model_fields}


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in get_args(annotation) for m in models_in(a)]
