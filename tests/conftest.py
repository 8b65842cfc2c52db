"""In which order the files are tested, and what they share."""

import gc

import pytest

from rollflow.engines.rollout import forked


def pytest_configure() -> None:
    """What has SGLang imported stays until the last test, once one has made it; all workers share it."""
    forked.hold()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that none of them runs on alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What was imported stays: no collection need look through a million objects again, half a second a time."""
    gc.freeze()
