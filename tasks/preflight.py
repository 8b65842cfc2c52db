"""Find every mistake before an engine starts: settings, hooks, data, model, store, run."""

import contextlib
import importlib.metadata
import subprocess
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from rollflow.storage.checkpoints import newest_valid_checkpoint
from rollflow.storage.config import DataConfig
from rollflow.storage.objects import Store
from rollflow.storage.prompts import PromptSet, load_prompts
from rollflow.storage.refs import CheckpointRef, RunRef
from rollflow.storage.runs import (
    ConfigMismatch,
    Origin,
    RunNotFound,
    config_differences,
    create_run,
    read_run,
)

from .checks import check_settings, check_template
from .identity import identity, recorded, the_rest
from .settings import RunSettings

PACKAGES = (
    "rollflow",
    "torch",
    "megatron-core",
    "mbridge",
    "sglang",
    "sglang-router",
    "transformers",
    "ray",
    "prefect",
    "pyarrow",
)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What there is to do: the run, where it stands and what it starts from."""

    run: RunRef
    next_step: int
    checkpoint: CheckpointRef | None
    damaged: tuple[str, ...] = ()
    """Newer checkpoints that are not used: the object that is damaged, and how."""


@task(name="preflight", cache_policy=NO_CACHE)
async def preflight(config: RunSettings, origin: Origin | None = None) -> RunPlan:
    """Check everything that can be checked without an engine, then open or create the run.

    ``origin`` says where a new run comes from that does not begin by itself.

    Raises:
        ValueError: names field, value and fix.
    """
    check_settings(config)
    store = Store(config.store)
    prompts = _check_data(store, "data", config.data, config.model.path)
    for i, source in enumerate(config.sources):
        _check_data(store, f"sources[{i}]", source, config.model.path)
    for dataset in config.evals:
        _check_data(store, f"evals {dataset.name}: data", dataset.data, config.model.path)
    if len(prompts.prompts) < (wanted := config.rollout.batch_size):
        print(
            f"data: {len(prompts.prompts)} prompts for batches of {wanted}; a batch will span epochs"
        )
    if prompts.skipped:
        first = prompts.skipped[0]
        print(
            f"{len(prompts.skipped)} malformed rows of {config.data.path} are skipped, "
            f"the first at {first.where}: {first.reason}"
        )
    return find_plan(config, open_or_create(config, origin))


def open_or_create(config: RunSettings, origin: Origin | None = None) -> RunRef:
    """The run of these settings; ``ConfigMismatch`` where its name has others."""
    decides = identity(config)
    rest = the_rest(config, decides)
    store = Store(config.store)
    with contextlib.suppress(RunNotFound):
        record = read_run(store, config.name)
        if differences := config_differences(recorded(config, record), decides):
            raise ConfigMismatch(config.name, differences)
        decides = record.config
    try:
        return create_run(store, config.name, decides, versions(), code_revision(), rest, origin)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"store.url = {config.store.url!r}: no run can be written there ({error}); give another place"
        ) from error


def find_plan(config: RunSettings, run: RunRef) -> RunPlan:
    """Where the run stands now: its newest checkpoint that is whole, and the step after it.

    The batches since that one are in the log.
    """
    checkpoint, damaged = newest_valid_checkpoint(Store(config.store), run)
    next_step = checkpoint.step + 1 if checkpoint else 0
    return RunPlan(run, next_step, checkpoint, tuple(str(error) for error in damaged))


def versions() -> dict[str, str]:
    """Versions of the packages that compute, as installed."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def code_revision() -> str:
    """Git revision of rollflow's own source, with ``+`` where it was changed; empty without git."""
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _check_data(store: Store, field: str, data: DataConfig, model: str) -> PromptSet:
    """The prompts of a dataset; what is wrong with them is said of ``field``."""
    try:
        prompts = load_prompts(store, data)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    check_template(field, data, model, prompts)
    usual = DataConfig.model_fields["label_key"].default
    if data.label_key != usual and all(prompt.label is None for prompt in prompts.prompts):
        raise ValueError(
            f"{field}.label_key = {data.label_key!r}: no row has a label there; give the column's name, or "
            "leave it out"
        )
    return prompts
