"""A mistake that the algorithms could have: one piece of text in the place of another."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """``old`` stands exactly once in ``file`` of engines/algorithms; the mutant has ``new`` there."""

    name: str
    file: str
    old: str
    new: str


def mutants_of(file: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    """Mutants of one file, each from its (name, old, new)."""
    return [Mutant(name, file, old, new) for name, old, new in changes]
