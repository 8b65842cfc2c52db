"""The settings of runs that are made from other runs, found before Prefect is imported."""

from collections.abc import Sequence

from rollflow.tasks.identity import differences

from .arguments import build_config, overlay, stored_settings, without_old_kind
from .config import RunConfig

NO_GATE = 1e9
GATES = ("logprob_gap_max", "logprob_gap_mean", "mismatch_kl")


def derived_config(store: str, source: str, name: str, words: Sequence[str]) -> RunConfig:
    """The settings of ``source`` under another name, with ``words`` laid over them.

    A table whose kind the words change (``algorithm.name``) keeps nothing of the old kind.
    """
    settings = without_old_kind(stored_settings(store, source), words)
    return build_config(overlay({**settings, "name": name}, words))


def replay_config(
    store: str, source: str, name: str, words: Sequence[str]
) -> tuple[RunConfig, dict[str, str]]:
    """The settings of a replay, and those of them that make it come out other than ``source``.

    Where there are any, the stored log-probabilities are of other weights from the second step on:
    gates that compare them are off then, unless the words set them.
    """
    config = derived_config(store, source, name, words)
    return gated(config, source, asked=bool(overlay({}, words).get("gates")))


def gated(config: RunConfig, source: str, *, asked: bool) -> tuple[RunConfig, dict[str, str]]:
    """The settings of a replay with gates that suit them, and what differs from ``source``."""
    changed = differences(config, source)
    if changed and not asked:
        gates = config.gates.model_copy(update=dict.fromkeys(GATES, NO_GATE))
        config = config.model_copy(update={"gates": gates})
    return config, changed
