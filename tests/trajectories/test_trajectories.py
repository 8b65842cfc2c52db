"""Each algorithm's recipe trains a few steps of the real loop, along the way that is kept."""

import pytest

from rollflow.flows.arguments import load_config, recipes

from .trajectory import EXACT_STEPS, RECIPES, STEPS, down, golden, prepare, take

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectories")
    prepare(folder)
    yield folder
    down(folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_begins_along_its_golden_trajectory(folder, recipe):
    assert take(folder, recipe, EXACT_STEPS).differences(golden()[recipe]) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_golden_trajectory_rises(recipe):
    way = golden()[recipe]
    assert len(way.reward) == len(way.loss) == STEPS
    assert way.rise() > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_named_after_its_algorithm(recipe):
    config = load_config(recipes()[recipe], ())
    words = recipe.removeprefix("arithmetic_").removesuffix("cpu").strip("_")
    assert config.algorithm.name == (words or "grpo")
