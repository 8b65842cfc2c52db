"""What a run remembers. ``open_run`` is the way in for whoever wants to look."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .opened import OpenRun, open_run

__all__ = ["OpenRun", "open_run"]


def __getattr__(name: str) -> Any:
    """Arrow is loaded when somebody looks: a process that grades answers needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import opened

    return getattr(opened, name)
