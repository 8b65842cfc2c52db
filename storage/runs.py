"""Runs: what was asked for, by which versions, under a name that is used once."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from .integrity import Record, exact_json, json_digest, seal, unseal
from .objects import Store
from .refs import RunRef

FORMAT = "rollflow.run/1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a run came from that was made from another one."""

    kind: Literal["fork", "replay", "rescore", "rollout"]
    run: str
    """Name of the run it was made from, in the same store; empty where from none."""
    first_step: int = 0
    """Steps of this run begin here; what was before is the other run's."""
    batches: str = ""
    """Name of the run that holds the batches which this one's steps trained on; empty for its own."""
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    """What else there is to know, e.g. the weights or the grader."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What ``run.json`` holds."""

    ref: RunRef
    config: dict[str, Any]
    """The resolved settings that decide what a step computes, as JSON."""
    config_digest: str
    free: dict[str, Any]
    """The other settings, as the run was created with; a continued run may have others."""
    versions: dict[str, str]
    """Version by package."""
    code_revision: str
    created_at: str
    """UTC, ISO 8601."""
    origin: Origin | None = None
    """None for a run that began by itself."""

    @property
    def settings(self) -> dict[str, Any]:
        """``config`` and ``free`` as one tree: all that the run was created with."""
        both = {
            key: {**self.free[key], **self.config[key]} for key in self.free if key in self.config
        }
        return {**self.free, **self.config, **both}


class RunNotFound(ValueError):
    """There is no run of that name in the store."""


class ConfigMismatch(ValueError):
    """A run was opened with another config than it was created with; ``keys`` are dotted."""

    def __init__(self, name: str, differences: Mapping[str, str]) -> None:
        super().__init__(name, differences)
        self.keys = list(differences)
        self._text = "; ".join(f"{key}: {change}" for key, change in differences.items())
        self._name = name

    def __str__(self) -> str:
        return (
            f"run {self._name!r} was created with other settings ({self._text}); "
            "use those, or give the run another name"
        )


def create_run(
    store: Store,
    name: str,
    config: Mapping[str, Any],
    versions: Mapping[str, str],
    code_revision: str,
    free: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
) -> RunRef:
    """Create the run, or open it where one of that name, config and origin exists already.

    ``config`` is the resolved config as JSON, ``free`` what of it may differ later. ValueError for a bad name, ``ConfigMismatch`` (with
    the keys that differ) where the run exists with another config.
    """
    ref = run_ref(store, name)
    record: Record = {
        "format": FORMAT,
        "name": name,
        "config": dict(config),
        "config_digest": json_digest(exact_json(dict(config), "config")),
        "free": exact_json(dict(free or {}), "free"),
        "versions": dict(versions),
        "code_revision": code_revision,
        "origin": asdict(origin) if origin else None,
        "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    try:
        store.put_new(_url(ref), seal(record))
    except FileExistsError:
        _check_origin(read_run(store, name), origin)
        return open_run(store, name, config)
    return ref


def open_run(store: Store, name: str, config: Mapping[str, Any] | None = None) -> RunRef:
    """Open a run; given a config, refuse another than it was created with.

    ``RunNotFound`` names the runs there are; ``ConfigMismatch`` names the keys that differ.
    """
    record = read_run(store, name)
    if config is not None and json_digest(dict(config)) != record.config_digest:
        raise ConfigMismatch(name, config_differences(record.config, config))
    return record.ref


def read_run(store: Store, name: str) -> RunRecord:
    """Read a run's record, verified; ``RunNotFound`` where there is none."""
    ref = run_ref(store, name)
    try:
        record = unseal(store.get(_url(ref)), _url(ref), FORMAT)
    except FileNotFoundError:
        known = ", ".join(run_names(store)) or "none"
        raise RunNotFound(f"run {name!r} is not in {store.root} (there: {known})") from None
    return RunRecord(
        ref=ref,
        config=record["config"],
        config_digest=record["config_digest"],
        free=record["free"],
        versions=record["versions"],
        code_revision=record["code_revision"],
        created_at=record["created_at"],
        origin=Origin(**record["origin"]) if record.get("origin") else None,
    )


def list_runs(store: Store) -> list[RunRecord]:
    """Read the records of all runs, oldest first."""
    return sorted((read_run(store, n) for n in run_names(store)), key=lambda r: r.created_at)


def run_names(store: Store) -> list[str]:
    """Give the names of all runs in alphabetical order."""
    names = store.children("runs")
    return [n for n in names if store.exists(store.join("runs", n, "run.json"))]


def run_ref(store: Store, name: str) -> RunRef:
    """Name a run without looking whether it exists; ValueError where the name cannot be a folder."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"run name is {name!r}; use letters, digits, '.', '_' and '-', a letter or digit first"
        )
    return RunRef(name, store.run_url(name))


def _check_origin(standing: RunRecord, origin: Origin | None) -> None:
    """A run goes on by the command that made it; a fork is a run like others once it is there."""
    made = standing.origin
    if made == origin or (origin is None and made and made.kind == "fork"):
        return
    how = f"made by `rollflow {made.kind}` from {made.run!r}" if made else "made by itself"
    raise ValueError(
        f"run {standing.ref.name!r} exists and was {how}, from step {made.first_step if made else 0}; "
        "repeat that command to go on with it, or give this run another name"
    )


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Give ``old -> new`` by dotted key for everything that differs between two configs."""
    before, after = _flat(old), _flat(new)
    keys = [*before, *(key for key in after if key not in before)]
    shown = {key: (before.get(key, "unset"), after.get(key, "unset")) for key in keys}
    return {key: f"{a} -> {b}" for key, (a, b) in shown.items() if a != b}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = repr(value)
    return flat


def _url(ref: RunRef) -> str:
    return f"{ref.url}/run.json"
