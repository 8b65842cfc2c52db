"""Importing megatron-core, mbridge and tokenizers on a CPU without what only other models and devices need.

Half of what a trainer rank imports is a compiler and models for images: megatron-core has PyTorch
compile a dozen functions as its modules are loaded, which loads the compiler, although a CPU calls
none of them for a dense model; and mbridge loads every model that it knows. To read a tokenizer,
transformers loads the compiler for the masks of its models' attention.
"""

import contextlib
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

TESTED = {"megatron-core": "0.16.1", "mbridge": "0.15.1"}
UNUSED = {"mbridge.models.glm4_vl": ("Glm4VLBridgeDense", "Glm4VLBridgeMoe")}
"""Modules of models that rollflow has no bridge for, and what mbridge takes from them. This one
loads transformers' modelling code, and with it scipy."""

COMPILED_MASKS = "torch._dynamo._trace_wrapped_higher_order_op"
"""Of the compiler, what transformers takes a class from when it is imported."""

_compile = torch.compile


def import_megatron() -> None:
    """Import both; again is harmless.

    Raises:
        RuntimeError: one has a version that this was not tested with.
    """
    for package, tested in TESTED.items():
        if (version := importlib.metadata.version(package)) != tested:
            raise RuntimeError(
                f"{package} {version} on a CPU: {__name__} was tested with {tested}; install that one"
            )
    for name, taken in UNUSED.items():
        if name not in sys.modules:
            sys.modules[name] = _unused(name, taken)
    torch.compile = _compile_when_called
    try:
        import mbridge  # noqa: F401
        import megatron.core  # noqa: F401
    finally:
        torch.compile = _compile


@contextlib.contextmanager
def no_compiled_masks() -> Iterator[None]:
    """What is imported of transformers within has that class too, but loads the compiler when it is called."""
    if COMPILED_MASKS in sys.modules:
        yield
        return
    sys.modules[COMPILED_MASKS] = stand_in = ModuleType(COMPILED_MASKS, "Loaded when it is called.")
    setattr(stand_in, "TransformGetItemToIndex", _transform_when_called)  # noqa: B010 - of a module
    try:
        yield
    finally:
        if sys.modules.get(COMPILED_MASKS) is stand_in:
            del sys.modules[COMPILED_MASKS]


def _transform_when_called() -> Any:
    return importlib.import_module(COMPILED_MASKS).TransformGetItemToIndex()


def _unused(name: str, taken: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name, "Left out by rollflow.")
    for attribute in taken:
        setattr(module, attribute, None)
    return module


def _compile_when_called(function: Any = None, **options: Any) -> Any:
    """As ``torch.compile``, which this stands in for, but the compiler is loaded by the first call."""
    if function is None:
        return functools.partial(_compile_when_called, **options)
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(_compile(function, **options))
        return compiled[0](*args, **kwargs)

    return call
