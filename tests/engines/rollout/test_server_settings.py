"""Groups of servers, engines of others and frozen models: what fits together and what is refused."""

from typing import Any

import pytest

from rollflow.engines.rollout.config import RolloutConfig, check_policies
from rollflow.engines.rollout.server_args import router_arguments

HALVES = [{"name": "pre", "role": "prefill"}, {"name": "de", "role": "decode", "servers": 2}]
THEIRS = {"urls": ["http://10.0.0.7:30000/"], "weights": "weights"}


def settings(**given: Any) -> RolloutConfig:
    return RolloutConfig(reward="pkg.mod:fn", **given)


def test_each_group_has_its_own_arguments_over_those_of_all():
    groups = [
        {"name": "long", "servers": 2, "sglang": {"context_length": 4096}},
        {"name": "short", "sglang": {"max_running_requests": 8}},
    ]
    shared = {"context_length": 512}
    assert settings(groups=groups).tables(shared) == [
        ("long-0", {"context_length": 4096}),
        ("long-1", {"context_length": 4096}),
        ("short-0", {"context_length": 512, "max_running_requests": 8}),
    ]
    beside = settings(servers=1, groups=groups[1:]).tables(shared)
    assert [name for name, _ in beside] == ["server-0", "short-0"]
    assert settings(groups=groups).generates


def test_prefill_and_decode_servers_have_policies_of_their_own():
    check_policies(
        {"prefill_policy": "bucket", "decode_policy": "power_of_two"}, settings(groups=HALVES)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"groups": HALVES[:1]}, "no group has the role 'decode'"),
        ({"groups": HALVES, "servers": 1}, "rollout.servers = 1 does both halves"),
        ({"groups": [*HALVES, {"name": "x"}]}, "group 'x' does both halves"),
        ({"groups": HALVES, "external": THEIRS}, "rollout.external does both halves"),
        ({"groups": [{"name": "a"}, {"name": "a"}]}, "name 'a' is used twice"),
        ({"groups": [{"name": "a", "sglang": {"tp_sze": 2}}]}, "did you mean"),
        ({"groups": [{"name": "a", "sglang": {"disaggregation_mode": "decode"}}]}, "use the role"),
        ({"external": {**THEIRS, "urls": ["10.0.0.7"]}}, "not of the form http://host:port"),
        ({"external": {**THEIRS, "urls": ["http://a:1", "http://a:1/"]}}, "is named twice"),
        ({"external": {**THEIRS, "weights": "s3://b/w"}}, "set rollout.external.seen_as"),
        ({"external": THEIRS, "deterministic": True}, "leave out one of the two"),
        ({"judge": {"path": "a", "url": "b"}}, "rollout.judge: path = 'a' and url = 'b'"),
        ({"teacher": {}}, "rollout.teacher: path = '' and url = ''"),
    ],
)
def test_what_does_not_fit_together_is_named(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        settings(**given)


@pytest.mark.parametrize(
    ("router", "given", "message"),
    [
        ({"policy": "round_robbin"}, {}, "none of the router's"),
        ({"prefill_policy": "random"}, {}, "is for prefill and decode servers"),
        ({"decode_policy": "bucket"}, {"groups": HALVES}, "router.decode_policy = 'bucket'"),
        ({"policy": "cache_aware"}, {"affinity": "group"}, "set it to one of manual"),
    ],
)
def test_a_policy_that_does_not_do_what_is_asked_for_is_named(
    router: dict[str, Any], given: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        check_policies(router, settings(**given))


def test_a_router_with_keys_gives_a_new_key_to_the_server_with_the_fewest_requests():
    ports = {"port": 1, "metrics_port": 2, "timeout_s": 60.0}
    plain, keyed = router_arguments({}, **ports), router_arguments({}, **ports, keyed=True)
    assert plain["policy"] == "round_robin"
    assert (keyed["policy"], keyed["assignment_mode"]) == ("manual", "min_load")
    chosen = router_arguments({"policy": "consistent_hashing"}, **ports, keyed=True)
    assert chosen["policy"] == "consistent_hashing"


def test_places_of_engines_are_the_same_from_everywhere():
    others = settings(external=THEIRS, servers=0).external
    assert others
    assert others.urls == ["http://10.0.0.7:30000"]
    assert others.weights.endswith("/weights")
    assert others.weights.startswith("/")
    assert settings(external=THEIRS, servers=0).generates
