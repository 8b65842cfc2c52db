"""``make mutants``: every mutant against the tests of this folder, and ``mutants.json``.

Exit status 1 where one survives. The working tree is never changed: a mutant is a copy of
engines/algorithms in a folder of its own, in front of the true one on the module path.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.engines.algorithms.mutant import Mutant
from tests.engines.algorithms.mutants import MUTANTS

ROOT = Path(__file__).parents[3]
TESTS = Path(__file__).parent
RESULTS = TESTS / "mutants.json"


def main() -> None:
    """Run the tests on the code as it is, which must pass, then on every mutant."""
    parser = argparse.ArgumentParser(prog="mutate", description=__doc__)
    parser.add_argument("--parallel", type=int, default=2, help="mutants at a time")
    arguments = parser.parse_args()
    results: list[dict[str, str | None]] = []
    # Each in a process of its own, forked from one that has paid for the imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pydantic"])
    with ProcessPoolExecutor(arguments.parallel, context, max_tasks_per_child=1) as processes:
        if failed := processes.submit(first_failure, None).result():
            sys.exit(f"{failed} fails on the code as it is; a mutation run would prove nothing")
        for mutant, killed_by in zip(MUTANTS, processes.map(first_failure, MUTANTS), strict=True):
            print(f"{mutant.name}: {killed_by or 'SURVIVED'}", flush=True)
            results.append({"mutant": mutant.name, "killed_by": killed_by})
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    survivors = sum(result["killed_by"] is None for result in results)
    print(f"{len(results) - survivors} of {len(results)} mutants killed")
    sys.exit(1 if survivors else 0)


def first_failure(mutant: Mutant | None) -> str | None:
    """The first test that fails on a mutant, or on the code as it is; None where all pass.

    For a process that has not imported rollflow and does nothing after.

    Raises:
        ValueError: the text to be replaced does not stand exactly once in its file.
        RuntimeError: the tests could not be run, or would have run on other code.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "rollflow"
        make_package(package)
        if mutant:
            file = package / "engines" / "algorithms" / mutant.file
            file.write_text(mutated(mutant, file.read_text()))
        sys.dont_write_bytecode = True
        sys.path.insert(0, folder)
        it = importlib.import_module("rollflow.engines.algorithms")
        if not Path(str(it.__file__)).is_relative_to(folder):
            raise RuntimeError(f"the tests would import {it.__file__}, not what is in {folder}")
        return _run_tests(mutant)


def mutated(mutant: Mutant, text: str) -> str:
    """The mutant's file, from the text of the true one."""
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(
            f"mutant {mutant.name!r}: its text stands {found} times in {mutant.file}, not once; "
            f"write it anew: {mutant.old!r}"
        )
    return text.replace(mutant.old, mutant.new)


def make_package(package: Path) -> None:
    """The package with links to everything but engines/algorithms, which is copied."""
    source = ROOT / ".src" / "rollflow"
    (package / "engines").mkdir(parents=True)
    for entry in [*source.iterdir(), *(source / "engines").iterdir()]:
        place = package / entry.relative_to(source)
        if entry.name == "algorithms":
            shutil.copytree(entry, place, ignore=shutil.ignore_patterns("__pycache__"))
        elif entry.name not in ("engines", "__pycache__"):
            place.symlink_to(entry.resolve())


class _Failures:
    """A pytest plugin that keeps the names of the tests that failed."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.names.append(report.nodeid)


def _run_tests(mutant: Mutant | None) -> str | None:
    failures, output = _Failures(), io.StringIO()
    os.chdir(ROOT)
    options = ["-x", "-p", "no:cacheprovider", "--hypothesis-profile=first-failure"]
    with contextlib.redirect_stdout(output):
        status = pytest.main([*options, *_tests(mutant)], [failures])
    if status == pytest.ExitCode.OK:
        return None
    if status != pytest.ExitCode.TESTS_FAILED or not failures.names:
        raise RuntimeError(f"the tests could not be run:\n{output.getvalue()}")
    return failures.names[0]


def _tests(mutant: Mutant | None) -> list[str]:
    """All of this folder's, those of the changed file first, then those of whole algorithms."""
    nearest = [TESTS / f"test_{mutant.file}"] if mutant else []
    first = [test for test in [*nearest, TESTS / "test_policy.py"] if test.exists()]
    about_mutants = TESTS / "test_mutants.py"
    return [*map(str, first), str(TESTS), f"--ignore={about_mutants}"]


if __name__ == "__main__":
    main()
