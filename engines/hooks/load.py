"""Finding a hook by name, checking that it can be called, and knowing it again."""

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, overload

from .adapters import adapted
from .signatures import SIGNATURES, HookKind
from .types import GenerateFn, RewardFn


@overload
def load_hook(path: str, kind: Literal["reward"]) -> RewardFn: ...
@overload
def load_hook(path: str, kind: Literal["generate"]) -> GenerateFn: ...
@overload
def load_hook(path: str, kind: HookKind) -> Callable[..., Any]: ...
def load_hook(path: str, kind: HookKind) -> Callable[..., Any]:
    """Import the function named ``pkg.mod:fn`` and check that it can be called as a ``kind`` hook.

    A function with the signature that slime, TRL or verl gives to hooks of that kind is wrapped.
    Raises ValueError that says what is wrong and shows the signature that is expected.
    """
    hook = find_hook(path, kind)
    expected = SIGNATURES[kind]
    if (wrapped := adapted(hook, kind)) is not None:
        return wrapped
    try:
        inspect.signature(hook).bind(*expected.arguments)
    except TypeError as error:
        names = ", ".join(expected.arguments)
        raise _refusal(path, kind, f"cannot be called with ({names}): {error}") from None
    if expected.must_be_async and not is_async(hook):
        raise _refusal(path, kind, "is not async; write it as 'async def'")
    if is_async(hook) and not expected.may_be_async:
        raise _refusal(path, kind, "is async; write it as a plain 'def'")
    return hook


def find_hook(path: str, kind: HookKind | None = None) -> Callable[..., Any]:
    """The function named ``path``, whatever its signature; ValueError where there is none."""
    hook = _named(path, kind or "")
    if inspect.isclass(hook):
        raise _refusal(
            path, kind or "", "is a class; name a function, or an instance that is callable"
        )
    if not callable(hook):
        raise _refusal(path, kind or "", f"is of type {type(hook).__name__}, not a function")
    return hook


def is_async(hook: Callable[..., Any]) -> bool:
    """Whether a hook is to be awaited on the event loop: an ``async def``, wrapped or an instance's."""
    unwrapped = inspect.unwrap(hook)
    return inspect.iscoroutinefunction(unwrapped) or inspect.iscoroutinefunction(
        getattr(unwrapped, "__call__", None)  # noqa: B004 - its kind is asked, not its presence
    )


def hook_version(path: str) -> str:
    """``pkg.mod:fn@<digest>``: the digest is of the whole file that defines the function.

    The whole file, because a grader changes when its neighbours do. Raises ValueError where the
    hook is not found or no file defines it.
    """
    hook = _named(path, "hook")
    module = inspect.getmodule(inspect.unwrap(hook)) if inspect.isroutine(hook) else None
    module = module or importlib.import_module(path.partition(":")[0])
    file = getattr(module, "__file__", None)
    if file is None:
        raise ValueError(
            f"hook {path!r} has no file to take its version from; define it in a module of your own"
        )
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return f"{path}@{digest[:12]}"


def parse_reward(result: object) -> tuple[float, dict[str, float]]:
    """What a reward hook returned, as (reward, named parts).

    Raises ValueError where it is neither a finite number nor a mapping of names to finite numbers
    with a key ``reward``.
    """
    if isinstance(result, Mapping):
        parts = {str(name): _finite(str(name), value) for name, value in result.items()}
        if "reward" not in parts:
            raise ValueError(
                f"reward function returned a mapping with keys {sorted(parts)}; "
                "it must have the key 'reward'"
            )
        return parts.pop("reward"), parts
    return _finite("reward", result), {}


def _finite(name: str, value: object) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"reward function returned {name} = {value!r}; return a finite number")
    return float(value)


def _named(path: str, kind: str) -> Any:
    module_name, colon, name = path.partition(":")
    if not colon and kind != "hook":
        module_name, _, name = path.rpartition(".")  # as slime writes it: pkg.mod.fn
    if not module_name or not name:
        raise _refusal(path, kind, "is not of the form 'pkg.mod:fn'")
    module = _import(path, kind, module_name)
    if not hasattr(module, name):
        near = get_close_matches(name, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise _refusal(path, kind, f"not found: {module_name} has no {name!r}{hint}")
    return getattr(module, name)


def _import(path: str, kind: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: it may raise anything
        raise _refusal(path, kind, f"cannot be imported: {error!r}") from error


def _refusal(path: str, kind: str, what: str) -> ValueError:
    expected = f"; expected {SIGNATURES[kind].example}" if kind in SIGNATURES else ""
    return ValueError(f"{kind} hook {path!r} {what}{expected}".lstrip())
