"""Answers that are compared as text: multiple choice and overlap of words."""

import re
import string
from collections import Counter

from rollflow.storage.samples import Sample

_CHOICE = (
    re.compile(r"answer\s*(?:is|:)?\s*\**\(?([A-Z])\)?(?![A-Za-z])", re.IGNORECASE),
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\)?"),
    re.compile(r"(?:^|[\s(*])([A-Z])(?:[).:*]|\s*$)", re.MULTILINE),
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def multiple_choice(sample: Sample) -> dict[str, float]:
    """1.0 where the letter that the answer settles on is the label, else 0.0.

    The last of: ``answer is B``; a boxed letter; a letter that stands alone. ``found`` tells
    whether there is one. Raises ValueError for a sample without a label.
    """
    chosen = chosen_letter(sample.response_text)
    right = chosen == _label(sample).strip().strip("().").upper()
    return {"reward": float(right), "found": float(chosen is not None)}


def f1(sample: Sample) -> dict[str, float]:
    """Harmonic mean of precision and recall over words, case, punctuation and articles aside.

    As SQuAD scores answers (arXiv:1606.05250). Several right answers are parted by ``|||`` in the
    label; the best counts. Raises ValueError for a sample without a label.
    """
    given = words(sample.response_text)
    found = [_overlap(given, words(right)) for right in _label(sample).split("|||")]
    precision, recall, score = max(found, key=lambda overlap: overlap[2])
    return {"reward": score, "precision": precision, "recall": recall}


def chosen_letter(text: str) -> str | None:
    """The letter that an answer settles on; None where there is none."""
    for pattern in _CHOICE:
        if found := pattern.findall(text):
            return str(found[-1]).upper()
    return None


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return _ARTICLES.sub(" ", plain).split()


def _overlap(given: list[str], right: list[str]) -> tuple[float, float, float]:
    if not given or not right:
        same = float(given == right)
        return same, same, same
    common = sum((Counter(given) & Counter(right)).values())
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / len(given), common / len(right)
    return precision, recall, 2 * precision * recall / (precision + recall)


def _label(sample: Sample) -> str:
    if sample.label is None:
        raise ValueError(
            f"sample {sample.sample_id}: label is None; give a label column in the data"
        )
    return sample.label
