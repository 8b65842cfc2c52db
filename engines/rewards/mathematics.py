"""Mathematical answers, compared by what they mean: ``1/2`` is ``0.5`` is ``\\frac{1}{2}``."""

from typing import Any, cast

from math_verify import (  # pyright: ignore[reportMissingTypeStubs]
    ExprExtractionConfig,
    LatexExtractionConfig,
    parse,
    verify,
)

from rollflow.storage.samples import Sample

TAIL_CHARACTERS = 300
"""DAPO looks for the answer near the end only."""


def boxed(sample: Sample) -> dict[str, float]:
    r"""1.0 where the last ``\boxed{...}`` of the answer equals the label, else 0.0.

    ``boxed`` tells whether there is one. Raises ValueError for a sample without a label.
    """
    label, given = _label(sample), last_boxed(sample.response_text)
    right = given is not None and equal(given, label)
    return {"reward": float(right), "boxed": float(given is not None)}


def answer(sample: Sample) -> float:
    """1.0 where the answer's last expression equals the label, boxed or not, else 0.0."""
    return float(equal(sample.response_text, _label(sample)))


def dapo(sample: Sample) -> dict[str, float]:
    r"""1.0 where what follows the last ``Answer:`` (or stands in ``\boxed{}``) is right, else -1.0.

    Only the last 300 characters are looked at, as in DAPO (arXiv:2503.14476). ``acc`` is 1 or 0.
    """
    tail = sample.response_text[-TAIL_CHARACTERS:]
    found = tail.rpartition("Answer:")[2].strip().splitlines() if "Answer:" in tail else []
    given = found[0] if found else last_boxed(tail)
    right = given is not None and equal(given, _label(sample))
    return {"reward": 1.0 if right else -1.0, "acc": float(right)}


def equal(given: str, expected: str) -> bool:
    """Whether two expressions, in LaTeX or plain, mean the same (math-verify)."""
    if given.strip() == expected.strip():
        return True
    return bool(verify(_parsed(expected), _parsed(given)))


def last_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` or ``\fbox{...}``; None where none is closed."""
    for name in (r"\boxed{", r"\fbox{"):
        start = text.rfind(name)
        if start < 0:
            continue
        depth, first = 1, start + len(name)
        for place in range(first, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[first:place]
    return None


def _parsed(text: str) -> list[Any]:
    within = text if "$" in text or "\\boxed" in text else f"${text}$"
    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    return cast(list[Any], parse(within, extraction_config=configs) or parse(text))


def _label(sample: Sample) -> str:
    if sample.label is None:
        raise ValueError(
            f"sample {sample.sample_id}: label is None; give a label column in the data"
        )
    return sample.label
