"""Programs that are judged by running them, each in a sandbox of its own."""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rollflow.storage.samples import Sample

from .sandbox import Finished, Limits, run_python

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
TEST_SECONDS = 10.0


def code(sample: Sample) -> dict[str, float]:
    """1.0 where the answer's program passes every test, else 0.0; ``passed`` is the share it passes.

    The program is the last fenced block of the answer, or all of it. ``metadata["tests"]`` lists
    tests: ``{"input": ..., "output": ...}`` compares what is printed, white space at line ends
    aside; text is Python that runs after the program and raises where it is wrong.
    ``metadata["test_seconds"]`` bounds each. Raises ValueError for a sample without tests, and
    SandboxError where the machine cannot isolate a program.
    """
    tests = sample.metadata.get("tests")
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise ValueError(
            f"sample {sample.sample_id}: metadata has no list 'tests'; code needs one in the data"
        )
    program = extract_program(sample.response_text)
    seconds = float(sample.metadata.get("test_seconds", TEST_SECONDS))
    passed = [_passes(program, test, Limits(seconds)) for test in cast(Sequence[Any], tests)]
    return {"reward": float(all(passed)), "passed": sum(passed) / len(passed)}


def extract_program(answer: str) -> str:
    """The last fenced block, or the whole answer where there is none."""
    blocks = cast(list[str], _BLOCK.findall(answer))
    return blocks[-1] if blocks else answer


def _passes(program: str, test: Any, limits: Limits) -> bool:
    if isinstance(test, str):
        # A program that ends by itself before the test did not pass it.
        word = secrets.token_hex(16)
        done = run_python(f"{program}\n\n{test}\nprint({word!r})\n", limits=limits)
        return _ended_well(done) and done.output.rstrip().endswith(word)
    if not isinstance(test, Mapping) or "output" not in test:
        raise ValueError(f"test {test!r} is neither text nor has 'input' and 'output'")
    given = cast(Mapping[str, Any], test)
    done = run_python(program, str(given.get("input", "")), limits)
    return _ended_well(done) and _lines(done.output) == _lines(str(given["output"]))


def _ended_well(done: Finished) -> bool:
    return done.exit_code == 0


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
