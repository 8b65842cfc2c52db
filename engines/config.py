"""Settings that the engines share: the model, the Ray cluster, and names passed through to others.

``[megatron]``, ``[sglang]`` and ``[router]`` accept any field of those projects' own argument
classes. The names are read from the installed source without importing it, so that a typing error
is found in milliseconds and on machines without torch.
"""

import ast
import difflib
import gc
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Optional, Union

from pydantic import Field, TypeAdapter, ValidationError, field_validator

from rollflow.storage.config import Config


class ModelConfig(Config):
    """The policy: a Hugging Face checkpoint folder (config.json, tokenizer, safetensors)."""

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in both engines. Use float32 on a CPU."""
    random_weights: bool = False
    """Start from random weights (config.json and tokenizer are enough)."""
    trust_remote_code: bool = False


Placement = Literal["STRICT_PACK", "PACK"]
"""How Ray places the trainer's ranks; its own names."""


class ClusterConfig(Config):
    """The Ray cluster. By default a private one on loopback, which ends with the run."""

    address: str = "local"
    """``local``, or the address of a running cluster (``host:6379``, ``auto``); ``null`` for engines
    that compute nothing, to try out and measure what is around them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    colocate: bool = False
    """One GPU holds a trainer rank and a server. The server gives its memory back while the rank
    trains, so generation and training take turns (``rollout.mode = "sync"``)."""
    placement: Placement = "STRICT_PACK"
    """How Ray places the trainer's ranks, a bundle each with a GPU of its own: ``STRICT_PACK`` on one
    node, or the run waits for one that has room; ``PACK`` on as few nodes as it can. Nodes have to be
    of one machine in this version."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Deadline for Ray, for the ranks' place in the cluster and for each engine to come up."""
    max_recoveries: int = Field(default=5, ge=0)
    """Times in a row that a run goes on from its log after the loss of an engine, without having
    committed a step in between."""
    lease_s: float = Field(default=60.0, gt=0)
    """Seconds after which a run whose flow is silent may be taken over by another flow."""

    @field_validator("address")
    @classmethod
    def _address_is_one(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        is_place = port.isdecimal() and (host.startswith("[") or host.count(":") == 0) and host
        if not (address in ("local", "auto", "null") or "://" in address or is_place):
            raise ValueError("give host:port (Ray's port is 6379), 'auto', 'local' or 'null'")
        return address


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as its source declares it, e.g. ``Setting("lr", "Optional[float]", "None", "...")``."""

    name: str
    type: str
    default: str
    """As written; empty where it has to be given."""
    help: str


@cache
def dataclass_settings(package: str, file: str, *classes: str) -> dict[str, Setting]:
    """Annotated fields of ``classes`` in ``file`` of an installed package, not run by Python.

    Empty when the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    roots = list(spec.submodule_search_locations or []) if spec else []
    source = next((p for r in roots if (p := Path(r) / file).is_file()), None)
    if source is None:
        return {}
    found: dict[str, Setting] = {}
    for node in _parsed(source.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    found[statement.target.id] = _setting(statement.target.id, statement, after)
    return found


def _parsed(source: str) -> ast.Module:
    # A collection meanwhile may fail it (CPython 3.11.7 and before, gh-106905).
    collects = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if collects:
            gc.enable()


def _setting(name: str, statement: ast.AnnAssign, after: ast.stmt | None) -> Setting:
    """The help is the string below the field, or the one in ``Annotated`` (SGLang calls it ``A``)."""
    kind, text = statement.annotation, after.value if isinstance(after, ast.Expr) else None
    if (
        isinstance(kind, ast.Subscript)
        and isinstance(kind.slice, ast.Tuple)
        and ast.unparse(kind.value) in ("A", "Annotated")
    ):
        kind, text, *_ = kind.slice.elts
    if isinstance(text, ast.Call):
        text = next((k.value for k in text.keywords if k.arg == "help"), None)
    words = text.value if isinstance(text, ast.Constant) else ""
    return Setting(
        name,
        ast.unparse(kind),
        ast.unparse(statement.value) if statement.value else "",
        " ".join(str(words).split()),
    )


def check_table(
    table: str, given: Mapping[str, Any], known: Mapping[str, Setting], owned: Mapping[str, str]
) -> None:
    """Refuse names that ``known`` lacks (unless it is empty: not installed) or that we set ourselves,
    and values that are not of the type that their name was declared with.

    Args:
        table: name of the settings table, for the message.
        owned: name -> why it is not the user's to set, or what to set in its place.

    Raises:
        ValueError: names the field and the nearest known one, the right setting, or the type.
    """
    for name, value in given.items():
        if name in owned:
            raise ValueError(f"{table}.{name} is set by rollflow: {owned[name]}")
        if known and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {table}.{near[0]}?" if near else ""
            raise ValueError(f"{table}.{name} is not a name that {table} knows{hint}")
        if known and not _is_of_type(value, known[name].type):
            raise ValueError(f"{table}.{name} = {value!r} is no {known[name].type}; give one")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{table}.{name} = {value!r} is not finite; give a number that is")


def _is_of_type(value: Any, declared: str) -> bool:
    """Whether a value fits a declaration; True where that names a class which is not Python's own."""
    plain = {"Any": Any, "Dict": dict, "List": list, "Literal": Literal, "Optional": Optional}
    try:
        adapter = TypeAdapter(eval(declared, {**plain, "Union": Union}))  # installed source
    except NameError:
        return True
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True
