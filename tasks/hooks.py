"""The contract test of a user's function: called once with an example, what it gives is judged."""

import inspect
from collections.abc import Callable
from typing import Any, cast

from rollflow.engines.config import ModelConfig
from rollflow.engines.hooks import set_arguments
from rollflow.engines.hooks.check import Verdict, check_function
from rollflow.engines.hooks.load import find_hook
from rollflow.engines.hooks.signatures import SETTINGS, SIGNATURES, HookKind
from rollflow.engines.rollout.config import RolloutConfig
from rollflow.engines.rollout.datasets import slime_arguments

__all__ = ["HOOKS", "Verdict", "check_hook"]

HOOKS = {kind: (SETTINGS[kind], signature.example) for kind, signature in SIGNATURES.items()}
"""Hook -> its setting, and what its function looks like."""

TENSORS = ("advantage", "loss")
"""Hooks whose functions are not called here: they fit by their signature alone."""
OTHERS = {"args", "completions", "solution_str"}
"""Arguments by which functions of slime, TRL and verl are known."""


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
    meant = _named_after(find_hook(path))
    found: list[Verdict] = []
    refused: dict[str, str] = {}
    for name in cast(list[HookKind], [k for k in SIGNATURES if k not in TENSORS]):
        try:
            found.append(check_function(path, name))
        except ValueError as error:
            why = str(error).removeprefix(f"{name} hook {path!r} ").removeprefix(f"{path}, ")
            refused[name] = f"  {name}: {why}"
    if found and not (meant and meant <= refused.keys()):
        return found
    lines = [line for name, line in refused.items() if not meant or name in meant]
    raise ValueError("\n".join([_heading(path, [v.kind for v in found]), *lines]))


def _named_after(hook: Callable[..., Any]) -> set[str]:
    """The hooks of which the function's arguments have most names; none for those of others."""
    names = set(inspect.signature(hook).parameters)
    shared = {kind: len(names & set(s.arguments)) for kind, s in SIGNATURES.items()}
    most = max(shared.values())
    if not most or names & OTHERS:
        return set()
    return {kind for kind, count in shared.items() if count == most and kind not in TENSORS}


def _heading(path: str, fits: list[HookKind]) -> str:
    if not fits:
        return f"{path} fits no hook; 'rollflow hooks ls' shows how each looks"
    return (
        f"{path} can be called as {', '.join(fits)}, but its arguments are named as another hook's; "
        "give --kind where that is meant"
    )
