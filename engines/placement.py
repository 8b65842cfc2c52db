"""Where engines run: trainer ranks in a Ray placement group with one bundle for each, all else beside them.

A group is reserved as a whole or not at all, so that two runs on a cluster never each hold half of
what they need. It belongs to the flow's process: when that ends, however it ends, Ray takes the
group down and every rank in it.
"""

import asyncio
import time
from typing import Any

import ray
from ray._private import state
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from .cluster import DeadlineError
from .config import Placement
from .platform import Platform

NAME = "trainer"
"""Of the group, in the run's namespace."""
TRACE = {"CPU": 0.001}
"""A rank's bundle on a CPU: Ray accepts no empty one, and engines share the cores."""
ASK_S = 1


async def reserve(
    ranks: int, platform: Platform, strategy: Placement, *, timeout_s: float
) -> PlacementGroup:
    """Reserve a bundle for each rank, a GPU each where there are any; returns once all are held.

    Raises:
        DeadlineError: not placed after ``timeout_s`` seconds; names the bundles and what each
            machine of the cluster has.
        ValueError: the ranks would be on several machines.
    """
    bundle = {"GPU": 1.0} if platform.device == "cuda" else TRACE
    deadline = time.monotonic() + timeout_s
    group = placement_group([dict(bundle) for _ in range(ranks)], strategy=strategy, name=NAME)
    try:
        while not await asyncio.to_thread(group.wait, ASK_S):
            if time.monotonic() > deadline:
                raise DeadlineError(_not_placed(group, ranks, bundle, strategy, timeout_s))
        _check_machines(group)
    except BaseException:
        release()
        raise
    return group


def release() -> None:
    """Give the run's group back, which ends what runs in it; fine when there is none."""
    try:
        group = get_placement_group(NAME)
    except ValueError:
        return
    remove_placement_group(group)


def in_bundle(group: PlacementGroup, rank: int, *, with_children: bool = False) -> Any:
    """Scheduling strategy of an actor that runs in a rank's bundle.

    ``with_children``: so do the actors that it starts.
    """
    return PlacementGroupSchedulingStrategy(
        group, rank, placement_group_capture_child_tasks=with_children
    )


def on_its_machine(group: PlacementGroup) -> Any:
    """Scheduling strategy of an actor that runs where the first rank does: the two meet on loopback."""
    return _only_on(placement_group_table(group)["bundles_to_node_id"][0])


def on_this_machine() -> Any:
    """Scheduling strategy of an actor that runs where this process does."""
    return _only_on(ray.get_runtime_context().get_node_id())


def _only_on(node: str) -> Any:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _check_machines(group: PlacementGroup) -> None:
    address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    held = placement_group_table(group)["bundles_to_node_id"].values()
    machines = sorted({address[node] for node in held})
    if len(machines) > 1:
        raise ValueError(
            f"the trainer's ranks were placed on {len(machines)} machines ({', '.join(machines)}), but "
            "they meet on loopback in this version; set cluster.placement = 'STRICT_PACK', which waits "
            "for a machine that has room for all of them"
        )


def _not_placed(
    group: PlacementGroup, ranks: int, bundle: dict[str, float], strategy: str, timeout_s: float
) -> str:
    stats = placement_group_table(group)["stats"]
    has = "; ".join(_machine(node, bundle) for node in ray.nodes() if node["Alive"])
    return (
        f"waited {timeout_s:.0f} s for room for trainer.ranks = {ranks}: {ranks} bundles of "
        f"{_amounts(bundle)}, cluster.placement = {strategy!r}, are not placed "
        f"({stats['scheduling_state']}); the cluster has {has}; take fewer ranks or a larger cluster"
    )


def _machine(node: dict[str, Any], bundle: dict[str, float]) -> str:
    free = state.available_resources_per_node().get(node["NodeID"], {})
    parts = (
        f"{name} {node['Resources'].get(name, 0):g}, {free.get(name, 0):g} free" for name in bundle
    )
    return f"{node['NodeManagerAddress']}: {', '.join(parts)}"


def _amounts(bundle: dict[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in bundle.items())
