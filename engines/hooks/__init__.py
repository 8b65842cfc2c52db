"""Functions that a user brings: how they look, how they are found, how they are known afterwards.

A hook is named ``pkg.mod:fn``. A reward is as small as this::

    def contains(sample: Sample) -> float:
        return float(sample.label in sample.response_text)
"""

from .load import hook_version, is_async, load_hook, parse_reward
from .signatures import HookKind
from .slime import set_arguments
from .types import Completion, GenerateContext, GenerateEngine, GenerateFn, Reward, RewardFn

__all__ = [
    "Completion",
    "GenerateContext",
    "GenerateEngine",
    "GenerateFn",
    "HookKind",
    "Reward",
    "RewardFn",
    "hook_version",
    "is_async",
    "load_hook",
    "parse_reward",
    "set_arguments",
]
