"""Every setting by name: ours and those passed on to Megatron, SGLang and the router."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rollflow.engines.config import Setting
from rollflow.engines.megatron.config import MEGATRON_OWNED, megatron_settings
from rollflow.engines.rollout.config_servers import (
    ROUTER_OWNED,
    SGLANG_OWNED,
    router_settings,
    sglang_settings,
)

from .arguments import models_in, place_of
from .config import RunConfig

PASSED_ON = {
    "megatron": (megatron_settings, MEGATRON_OWNED, "megatron-core", "--"),
    "sglang": (sglang_settings, SGLANG_OWNED, "SGLang", "--sglang-"),
    "router": (router_settings, ROUTER_OWNED, "sglang-router", "--router-"),
}
"""Table -> its settings, those that rollflow sets itself, whose they are, their prefix as a word."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting, e.g. ``Entry("megatron.lr", "--lr", "Optional[float]", "None", "...", "")``."""

    name: str
    """Dotted, as on the command line; the last part is the key in its table of the file."""
    word: str
    """The other way to write it on the command line."""
    type: str
    default: str
    help: str
    owned: str
    """Why it cannot be set, and what to set in its place; empty where it can."""


def entries() -> dict[str, Entry]:
    """All settings by dotted name."""
    found = {entry.name: entry for entry in _own("", RunConfig)}
    for table, (settings, owned, _, prefix) in PASSED_ON.items():
        for setting in settings().values():
            entry = _passed_on(table, prefix, setting, owned)
            found[entry.name] = entry
    return found


def explain(name: str) -> Entry:
    """The setting of a dotted name, a word of the command line or the bare name of a field.

    Raises:
        ValueError: there is none; names the nearest.
    """
    known = entries()
    dotted = ".".join(place_of(name.removeprefix("--")))
    if dotted in known:
        return known[dotted]
    field = name.removeprefix("--").replace("-", "_")
    ends = [n for n in known if n.rpartition(".")[2] == field or n.endswith(f".{field}")]
    if len(ends) == 1:
        return known[ends[0]]
    if ends:
        raise ValueError(f"{name!r} is the end of several settings: {', '.join(sorted(ends))}")
    near = difflib.get_close_matches(dotted, known, n=3) or difflib.get_close_matches(field, known)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"{name!r} is no setting{hint}")


def schema() -> dict[str, Any]:
    """The JSON schema of a settings file, the passed-on tables with their known names."""
    tree = RunConfig.model_json_schema()
    for table, (settings, owned, whose, _) in PASSED_ON.items():
        names = {n: s for n, s in settings().items() if n not in owned}
        tree["properties"][table] = {
            "type": "object",
            "title": table,
            "description": f"Settings of {whose}.",
            "properties": {n: {"description": s.help or s.type} for n, s in names.items()},
            "additionalProperties": not names,
        }
    return tree


def diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(dotted name, value in ``a``, value in ``b``) of what differs; "-" where one has it not."""
    left, right = dict(_leaves("", a)), dict(_leaves("", b))
    names = sorted(left.keys() | right.keys())
    pairs = (
        (n, repr(left[n]) if n in left else "-", repr(right[n]) if n in right else "-")
        for n in names
    )
    return [(n, x, y) for n, x, y in pairs if x != y]


def page(table: str) -> str:
    """The reference page of a class of settings, as Markdown: ``rollflow`` or a passed-on table.

    Of what is passed on it has names, types and defaults; ``explain`` has the words of whoever
    declares it.
    """
    if table == "rollflow":
        lines = ["# Settings of rollflow", "", _GENERATED, ""]
        lines += ["| setting | type | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{e.name}` | `{_cell(e.type)}` | `{_cell(e.default)}` | {_cell(e.help)} |"
            for e in _own("", RunConfig)
        ]
        return "\n".join(lines) + "\n"
    settings, owned, whose, prefix = PASSED_ON[table]
    lines = [f"# Settings passed on to {whose}: `[{table}]`", "", _GENERATED, ""]
    lines += [f"`rollflow config explain {prefix}NAME` prints what {whose} says of one.", ""]
    lines += ["| setting | type | default | |", "|---|---|---|---|"]
    for setting in sorted(settings().values(), key=lambda s: s.name):
        note = f"cannot be set: {owned[setting.name]}" if setting.name in owned else ""
        lines.append(
            f"| `{setting.name}` | `{_cell(setting.type)}` | `{_cell(setting.default)}` | {note} |"
        )
    return "\n".join(lines) + "\n"


_GENERATED = "Generated by `rollflow config reference`; do not edit."


def _own(prefix: str, model: type[BaseModel]) -> Iterator[Entry]:
    for name, field in model.model_fields.items():
        if not prefix and name in PASSED_ON:
            continue
        dotted = f"{prefix}{name}"
        below = models_in(field.annotation)
        if below:
            several = len(below) > 1
            for inner in below:
                chosen = inner.model_fields["name"].default if several else ""
                inside = f"{dotted}<{chosen}>." if several else f"{dotted}."
                yield from _own(inside, inner)
            continue
        given = field.default is not PydanticUndefined or field.default_factory is not None
        default = field.default_factory() if field.default_factory else field.default  # type: ignore[call-arg]
        word = "--" + dotted.replace(".", "-").replace("_", "-")
        words = " ".join((field.description or "").split())
        yield Entry(
            dotted, word, _type(field.annotation), repr(default) if given else "", words, ""
        )


def _passed_on(table: str, prefix: str, setting: Setting, owned: Mapping[str, str]) -> Entry:
    word = prefix + setting.name.replace("_", "-")
    return Entry(
        f"{table}.{setting.name}",
        word,
        setting.type,
        setting.default,
        setting.help,
        owned.get(setting.name, ""),
    )


def _type(annotation: Any) -> str:
    text = getattr(annotation, "__name__", "") if isinstance(annotation, type) else str(annotation)
    return text.replace("typing.", "")


def _leaves(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ") or " "
