"""Which settings make two runs the same one; read before Prefect is imported."""

from collections.abc import Mapping
from typing import Any

from rollflow.engines.megatron.settings import PARALLEL
from rollflow.storage.objects import Store
from rollflow.storage.runs import RunRecord, config_differences, read_run

from .settings import RunSettings

MAY_CHANGE = (
    "steps",
    "cluster",
    "checkpoint",
    "store",
    "evals",
    "stop",
    "gates",
    "regression",
    "report",
)
"""Settings that do not decide what a committed step was: they may differ when a run goes on."""
LAYOUT = {"trainer": ("ranks",), "megatron": PARALLEL, "rollout": ("servers", "external")}
"""Settings, by table, of how the work is spread over ranks, servers and machines: they may differ too,
for they change what a step computes by rounding alone."""


def identity(config: RunSettings) -> dict[str, Any]:
    """The settings that decide what a step computes: those that a continued run must repeat.

    ``steps`` is one of them where the learning rate decays until the last step.
    """
    tree = config.model_dump(mode="json")
    trainer = config.trainer
    follows_steps = trainer.lr_decay_style != "constant" and not trainer.lr_decay_steps
    free = [key for key in MAY_CHANGE if key != "steps" or not follows_steps]
    decides = {key: value for key, value in tree.items() if key not in free}
    for table, names in LAYOUT.items():
        decides[table] = {k: v for k, v in decides[table].items() if k not in names}
    return decides


def recorded(config: RunSettings, record: RunRecord) -> dict[str, Any]:
    """The identity of a run of the store, as settings of today: an earlier version of rollflow knew
    fewer of them, and they had their defaults, or held more of them to decide.

    One that knew settings which are gone is given as it wrote it.
    """
    try:
        return identity(type(config).model_validate(record.settings))
    except ValueError:
        return record.config


def the_rest(config: RunSettings, decides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not in ``decides``, table by table."""
    tree = config.model_dump(mode="json")
    rest = {key: value for key, value in tree.items() if key not in decides}
    for table, names in LAYOUT.items():
        rest[table] = {k: v for k, v in tree[table].items() if k in names}
    return rest


def differences(config: RunSettings, source: str) -> dict[str, str]:
    """The settings that decide what a step computes and are not the source's, as ``old -> new``.

    One that the source's version of rollflow did not know has its default, which changes nothing.
    """
    record = read_run(Store(config.store), source)
    found = config_differences(record.config, identity(config))
    rescored = record.origin is not None and record.origin.kind == "rescore"
    found = {key: change for key, change in found.items() if not change.startswith("unset -> ")}
    changed = {key: change for key, change in found.items() if key != "name"}
    return changed | ({"rewards": "scored again"} if rescored else {})
