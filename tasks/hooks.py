"""The contract test of a user's function: called once with an example, what it gives is judged."""

from rollflow.engines.hooks.check import Verdict, check_function
from rollflow.engines.hooks.signatures import SETTINGS, SIGNATURES, HookKind

__all__ = ["HOOKS", "Verdict", "check_hook"]

HOOKS = {kind: (SETTINGS[kind], signature.example) for kind, signature in SIGNATURES.items()}
"""Hook -> its setting, and what its function looks like."""

TENSORS = ("advantage", "loss")
"""Hooks whose functions are not called here: they fit by their signature alone."""


def check_hook(path: str, kind: str | None = None) -> list[Verdict]:
    """Check the function named ``path`` as the hook ``kind``, or find out which it can be.

    Raises:
        ValueError: it fits none; says for each what is wrong.
    """
    if kind is not None and kind not in SIGNATURES:
        raise ValueError(f"--kind {kind}: no such hook; there are {', '.join(SIGNATURES)}")
    kinds: list[HookKind] = [
        k for k in SIGNATURES if k == kind or (kind is None and k not in TENSORS)
    ]  # pyright: ignore[reportAssignmentType]
    found: list[Verdict] = []
    refused: list[str] = []
    for name in kinds:
        try:
            found.append(check_function(path, name))
        except ValueError as error:
            refused.append(f"{name}: {error}")
    if not found:
        raise ValueError("\n".join(refused))
    return found
