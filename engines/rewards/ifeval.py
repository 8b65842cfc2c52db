"""IFEval (arXiv:2311.07911): does an answer follow the instructions of its prompt?

The prompt's row has the benchmark's own columns, ``instruction_id_list`` and ``kwargs``::

    {"prompt": "...", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

Whichever number is trained on, all four of the paper's accuracies are parts of the reward:
``prompt_strict``, ``instruction_strict``, ``prompt_loose``, ``instruction_loose``; and for each
instruction, under its id, whether it was followed strictly.
"""

import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, cast

from rollflow.storage.samples import Sample

from .instructions import follows


def strict(sample: Sample) -> dict[str, float]:
    """1.0 where every instruction is followed to the letter, else 0.0.

    Raises ValueError for a sample without instructions, or with some that cannot be checked.
    """
    return _scored(sample, "prompt_strict")


def loose(sample: Sample) -> dict[str, float]:
    """1.0 where every instruction is followed by some form of :func:`loose_forms`, else 0.0."""
    return _scored(sample, "prompt_loose")


def share(sample: Sample) -> dict[str, float]:
    """The share of the instructions that are followed strictly."""
    return _scored(sample, "instruction_strict")


def loose_forms(text: str) -> list[str]:
    """The answer with and without its first line, its last line and all ``*``: eight forms.

    So a greeting, a closing word or Markdown emphasis does not spoil what is otherwise right.
    """
    lines = text.split("\n")
    cut = [
        "\n".join(lines[first : len(lines) - last]).strip() if first or last else text
        for first, last in product((0, 1), repeat=2)
    ]
    return [*cut, *(form.replace("*", "") for form in cut)]


def _scored(sample: Sample, trained_on: str) -> dict[str, float]:
    text, forms = sample.response_text, loose_forms(sample.response_text)
    strictly: dict[str, list[bool]] = {}
    loosely: list[bool] = []
    for instruction, arguments in _instructions(sample):
        strictly.setdefault(instruction, []).append(follows(instruction, arguments, text))
        loosely.append(any(follows(instruction, arguments, form) for form in forms))
    every = [followed for verdicts in strictly.values() for followed in verdicts]
    parts = {
        "prompt_strict": float(all(every)),
        "instruction_strict": statistics.fmean(every),
        "prompt_loose": float(all(loosely)),
        "instruction_loose": statistics.fmean(loosely),
    }
    by_id = {name: statistics.fmean(verdicts) for name, verdicts in strictly.items()}
    return {"reward": parts[trained_on], **parts, **by_id}


def _instructions(sample: Sample) -> list[tuple[str, Mapping[str, Any]]]:
    names = cast(Sequence[str] | None, sample.metadata.get("instruction_id_list"))
    given = cast(Sequence[Mapping[str, Any] | None] | None, sample.metadata.get("kwargs"))
    if not names:
        raise ValueError(
            f"sample {sample.sample_id}: no instruction_id_list in its metadata; give the data "
            "IFEval's columns instruction_id_list and kwargs"
        )
    given = [None] * len(names) if given is None else given
    if len(given) != len(names):
        raise ValueError(
            f"sample {sample.sample_id}: {len(given)} kwargs for {len(names)} instructions; give an "
            "object for each"
        )
    return [(name, arguments or {}) for name, arguments in zip(names, given, strict=True)]
