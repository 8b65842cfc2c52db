"""The settings of the bench's parts fit the recipe that they are laid over."""

import importlib

import pytest
from rich.console import Console

from rollflow.flows.arguments import load_config, recipes
from rollflow.flows.bench import recovery


class TakenError(Exception):
    """In place of a training: these are its settings."""


@pytest.mark.parametrize("part", ["iteration", "tail"])
async def test_a_part_trains_by_settings_that_are_sound(part, monkeypatch, tmp_path):
    async def taken(config):
        raise TakenError(config.steps)

    module = importlib.import_module(f"rollflow.flows.bench.{part}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "train", taken)
    with pytest.raises(TakenError):
        await module.measure(Console(quiet=True))


def test_the_training_that_is_killed_has_settings_that_are_sound(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recovery._Training, "_start", lambda self: None)
    words = recovery._Training("killed")._command
    recipe = words.index("train") + 1
    config = load_config(recipes()[words[recipe]], words[recipe + 1 :])
    assert config.steps == recovery.STEPS
