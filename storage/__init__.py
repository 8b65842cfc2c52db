"""What a run remembers. ``open_run`` is the way in for whoever wants to look."""

from .opened import OpenRun, open_run

__all__ = ["OpenRun", "open_run"]
