"""What a server of ours tells in its answer to the last bucket of weights, so that nobody has to ask again.

Light: trainer and server both import it. SGLang's own servers tell nothing, and are asked.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

MARK = " rollflow tells "
"""Between SGLang's message and ours."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a server holds under its new weights, e.g. ``Told({"model.norm.weight": "0f3a..."}, True, "...")``."""

    checksums: Mapping[str, str]
    """As ``/weights_checker`` tells them, computed from its parameters after the last bucket was in them."""
    flushed: bool
    """Whether the keys and values of older weights are gone."""
    rest: str
    """What SGLang says after it: the version."""

    def is_called(self, version: int | str) -> bool:
        """Whether the server took the weights' version."""
        return self.rest.strip() == f"Weight version updated to {version}."


def told(checksums: Mapping[str, str], *, flushed: bool) -> str:
    """To be put behind SGLang's own message."""
    return MARK + json.dumps({"checksums": dict(checksums), "flushed": flushed})


def read(message: str) -> Told | None:
    """What a server told in its message; None where it is no server of ours."""
    _, mark, rest = message.partition(MARK)
    if not mark:
        return None
    facts, end = json.JSONDecoder().raw_decode(rest)
    return Told(facts["checksums"], facts["flushed"], rest[end:])
