"""The contract test of a user's function: called once with an example, what it gives is judged."""

from typing import cast

from rollflow.engines.config import ModelConfig
from rollflow.engines.hooks import set_arguments
from rollflow.engines.hooks.check import Verdict, check_any, check_function
from rollflow.engines.hooks.signatures import SETTINGS, SIGNATURES, HookKind
from rollflow.engines.rollout.config import RolloutConfig
from rollflow.engines.rollout.datasets import slime_arguments

__all__ = ["HOOKS", "Verdict", "check_hook"]

HOOKS = {kind: (SETTINGS[kind], signature.example) for kind, signature in SIGNATURES.items()}
"""Hook -> its setting, and what its function looks like."""


def check_hook(path: str, kind: str | None = None) -> list[Verdict]:
    """Check the function named ``path`` as the hook ``kind``, or find out which it can be.

    slime's ``args`` are those of a run with default settings. Without ``kind``, a function whose
    arguments are named after a hook that it does not fit is refused, whatever else it fits.

    Raises:
        ValueError: it fits none; says for each what is wrong.
    """
    if kind is not None and kind not in SIGNATURES:
        raise ValueError(f"--kind {kind}: no such hook; there are {', '.join(SIGNATURES)}")
    set_arguments(slime_arguments(RolloutConfig(reward=path), ModelConfig(path="model"), None))
    if kind is not None:
        return [check_function(path, cast(HookKind, kind))]
    return check_any(path)
