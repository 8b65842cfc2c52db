"""``rollflow bench``: figures that a command prints, with real engines on this machine.

Each part is a module with ``async def measure(console) -> dict``: it prints what it found and
gives the facts, which go to ``.rollflow/bench.json``.
"""

import importlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rollflow.flows.recipes import throughput

PARTS = ("iteration", "recovery", "storage", "training", "conversion", "modes", "tail", "gpu")
"""Modules of this folder, in the order in which they run."""
ON_REQUEST = ("orchestration",)
"""Modules that run only when they are named: they take a quarter of an hour."""
TOP = "iteration"
"""The part whose facts stand at the top of the file; the others have a key of their own."""


async def run_bench(
    only: Sequence[str],
    output: Path,
    console: Console,
    shapes: Sequence[str] = (),
    size: Mapping[str, Any] | None = None,
) -> None:
    """Measure the parts named in ``only``, or all but those on request; print and write the figures.

    Figures of other parts that the file holds already stay. ``shapes``: which ``gpu`` measures; it
    leaves those of the file's other shapes. ``size``: of its whole iterations, see ``gpu.Size``.

    Raises:
        ValueError: there is no part or shape of that name, or shapes are given and ``gpu`` is not.
    """
    for name in only:
        if name not in PARTS + ON_REQUEST:
            known = ", ".join(PARTS + ON_REQUEST)
            raise ValueError(f"--only {name}: no such part; there are {known}")
    for shape in shapes:
        if shape not in throughput.SHAPES or "gpu" not in only:
            known = ", ".join(throughput.SHAPES)
            raise ValueError(f"--shape {shape}: takes {known}, and goes with --only gpu")
    if size and not shapes:
        raise ValueError(f"{', '.join(size)}: goes with --only gpu and --shape")
    output.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {}
    facts |= {"cores": os.cpu_count(), "machine": platform.machine()}
    for name in only or PARTS:
        part = importlib.import_module(f".{name}", __package__)
        if name == "gpu" and shapes:
            size_given = part.Size(**(size or {}))
            found = facts.get(name, {}) | await part.measure(console, shapes, size_given)
        else:
            found = await part.measure(console)
        facts |= found if name == TOP else {name: found}
        output.write_text(json.dumps(facts, indent=2))
    console.print(f"Figures: {output}")
