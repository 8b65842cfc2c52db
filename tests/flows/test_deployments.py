"""What the Prefect server is told: forms, presets, queues, automations."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rollflow.flows.automations import automations
from rollflow.flows.config import RunConfig
from rollflow.flows.deployments import BESIDE, ENGINES, Placement, deployments, registered
from rollflow.flows.prefect_yaml import as_yaml
from rollflow.flows.remote import slug

ROOT = Path(__file__).parents[2]
FOUND = {d.full_name: d for d in deployments()}


def schema_of(name):
    return registered(FOUND[name], Placement())._parameter_openapi_schema.model_dump()


@pytest.fixture(scope="module")
def form():
    return schema_of("train/rollflow")


def test_every_flow_is_deployed_and_only_training_asks_for_the_whole_cluster():
    queues = {name: d.queue for name, d in FOUND.items() if not d.parameters}
    assert queues == {
        "train/rollflow": ENGINES,
        "sft/rollflow": ENGINES,
        "replay/rollflow": ENGINES,
        "evaluate/rollflow": BESIDE,
        "rescore/rollflow": BESIDE,
        "convert/rollflow": BESIDE,
    }


def test_the_form_has_the_type_the_default_and_the_words_of_every_setting(form):
    definitions = form["definitions"]
    for name, definition in definitions.items():
        for field, shown in definition.get("properties", {}).items():
            known = {"type", "anyOf", "$ref", "enum", "const", "allOf"} & set(shown)
            assert known, f"{name}.{field} has no type: {shown}"
    cluster = definitions["ClusterConfig"]["properties"]
    assert cluster["device"]["enum"] == ["auto", "cpu", "cuda"]
    assert cluster["lease_s"]["default"] == 60.0
    assert "taken over by another flow" in cluster["lease_s"]["description"]
    assert definitions["RunConfig"]["properties"]["steps"]["exclusiveMinimum"] == 0


def test_the_form_offers_the_algorithms_as_a_choice_that_prefect_can_show(form):
    algorithm = form["definitions"]["RunConfig"]["properties"]["algorithm"]
    assert len(algorithm["anyOf"]) == 11
    assert "oneOf" not in str(form)


@pytest.mark.parametrize("name", [n for n, d in FOUND.items() if d.parameters])
def test_a_recipe_is_a_preset_that_the_form_accepts(name):
    preset = FOUND[name].parameters
    jsonschema.validate(preset, schema_of(name))
    assert RunConfig.model_validate(preset["config"]).name


def test_the_form_refuses_what_is_no_setting(form):
    preset = FOUND["train/arithmetic_cpu"].parameters
    wrong = {"config": {**preset["config"], "steps": 0}}
    with pytest.raises(jsonschema.ValidationError, match="minimum"):
        jsonschema.validate(wrong, form)


def test_prefect_yaml_is_what_the_command_writes():
    assert (ROOT / "deploy/prefect.yaml").read_text() == as_yaml(), (
        "rollflow deploy --yaml > deploy/prefect.yaml"
    )


def test_schedules_of_runs_with_like_names_are_told_apart():
    names = ["nightly", "a-b", "a.b", "a_b", "A-b"]
    assert slug("nightly") == "nightly"
    assert len({slug(name) for name in names}) == len(names)
    assert all(set(slug(name)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)


def test_automations_watch_our_flow_runs_and_pass_the_event_on_by_its_types():
    found: list[Any] = automations("6f0d3a52-0000-0000-0000-000000000000", "rollflow")
    silent, crashed, checkpoint = found
    for automation in (silent, crashed):
        assert automation.trigger.match_related.model_dump() == {
            "prefect.resource.role": "tag",
            "prefect.resource.id": "prefect.tag.rollflow",
        }
    [action] = checkpoint.actions
    assert set(action.parameters) == {"run", "step", "store", "settings", "training"}
