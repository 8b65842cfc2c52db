"""``make trajectories``: 50 steps of every algorithm's recipe, beginning along the ways that are kept."""

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .trajectory import COURSES, MANY, RECIPES, Course, Trajectory, down, golden, prepare, take

PARALLEL = 2
"""Each has a server and a rank, which take turns: two keep two cores busy."""


def main() -> int:
    """Exit status 1 where a reward does not rise or a way is not the one that is kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.trajectories.run", description=__doc__)
    parser.add_argument("--only", nargs="*", default=RECIPES, choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--course", choices=COURSES, default=MANY.name)
    parser.add_argument("--write", action="store_true", help="keep what comes out in COURSE.json")
    arguments = parser.parse_args()
    console = Console(width=120)
    course = COURSES[arguments.course]
    kept = golden(course)
    found: dict[str, Trajectory] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rollflow-trajectories-") as folder:
        prepare(Path(folder))

        def way_of(recipe: str) -> Trajectory | str:
            try:
                return take(Path(folder), recipe, course)
            except AssertionError as error:
                return str(error)

        try:
            with ThreadPoolExecutor(PARALLEL) as pool:
                ways = pool.map(way_of, arguments.only)
                for recipe, way in zip(arguments.only, ways, strict=True):
                    if isinstance(way, str):
                        wrong.append(f"{recipe}: {way}")
                        continue
                    found[recipe] = way
                    its = way if arguments.write else kept.get(recipe)
                    faults = _faults(way, its, course)
                    wrong += [f"{recipe}: {fault}" for fault in faults]
                    said = "; ".join(faults) or "as it is kept"
                    console.print(f"{recipe}: {way.rise():+.3f}, {said}", highlight=False)
                    if arguments.write:
                        _keep({**kept, **found}, course)
        finally:
            down(Path(folder))
    console.print(_table(found, golden(course)))
    for line in wrong:
        console.print(line, style="red", highlight=False)
    return 1 if wrong else 0


def _faults(way: Trajectory, kept: Trajectory | None, course: Course) -> list[str]:
    rises = course is not MANY or way.rise() > 0
    rise = [] if rises else [f"does not rise ({way.rise():+.3f})"]
    return rise + (way.differences(kept) if kept else ["no golden trajectory is kept"])


def _keep(ways: dict[str, Trajectory], course: Course) -> None:
    rows = {name: asdict(way) for name, way in sorted(ways.items())}
    course.golden.write_text(json.dumps(rows, indent=1) + "\n")


def _table(found: dict[str, Trajectory], kept: dict[str, Trajectory]) -> Table:
    table = Table("recipe", "first fifth", "last fifth", "bit-equal to the golden trajectory")
    for name, way in found.items():
        values = way.loss if way.algorithm == "sft" else way.reward
        part = max(len(values) // 5, 1)
        first, last = sum(values[:part]) / part, sum(values[-part:]) / part
        unit = " loss" if way.algorithm == "sft" else " reward"
        same = name in kept and kept[name].digest == way.digest
        table.add_row(name, f"{first:.3f}{unit}", f"{last:.3f}{unit}", "yes" if same else "no")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
