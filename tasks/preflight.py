"""Find every mistake before an engine starts: settings, hooks, data, model, store, run."""

import importlib.metadata
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from rollflow.engines.algorithms.config import own_function
from rollflow.engines.hooks import load_hook
from rollflow.engines.megatron.settings import PARALLEL
from rollflow.engines.platform import detect
from rollflow.storage.checkpoints import newest_valid_checkpoint
from rollflow.storage.config import DataConfig
from rollflow.storage.objects import Store
from rollflow.storage.prompts import PromptSet, load_prompts
from rollflow.storage.refs import CheckpointRef, RunRef
from rollflow.storage.runs import Origin, create_run

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
MAY_CHANGE = ("steps", "cluster", "checkpoint", "store", "evals", "stop", "gates")
"""Settings that do not decide what a committed step was: they may differ when a run goes on."""
LAYOUT = {"trainer": ("ranks",), "megatron": PARALLEL}
"""Settings, by table, of how the model is spread over ranks: they may differ too, for they change
what a step computes by rounding alone."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What there is to do: the run, where it stands and what it starts from."""

    run: RunRef
    next_step: int
    checkpoint: CheckpointRef | None


@task(name="preflight", cache_policy=NO_CACHE)
async def preflight(config: RunSettings, origin: Origin | None = None) -> RunPlan:
    """Check everything that can be checked without an engine, then open or create the run.

    ``origin`` says where a new run comes from that does not begin by itself.

    Raises:
        ValueError: names field, value and fix.
    """
    check_platform(config)
    check_hooks(config)
    check_model(config)
    check_parallel(config)
    store = Store(config.store)
    prompts = load_prompts(store, config.data)
    check_template("data", config.data, config.model.path, prompts)
    for source in config.sources:
        check_template("sources", source, config.model.path, load_prompts(store, source))
    for dataset in config.evals:
        eval_prompts = load_prompts(store, dataset.data)
        check_template(f"evals {dataset.name}", dataset.data, config.model.path, eval_prompts)
    _check_enough("data", config.data, len(prompts.prompts), config.rollout.batch_size)
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
    return create_run(store, config.name, decides, versions(), code_revision(), rest, origin)


def find_plan(config: RunSettings, run: RunRef) -> RunPlan:
    """Where the run stands now: its newest checkpoint that is whole, and the step after it.

    Damaged checkpoints are named; the batches since the one taken are in the log.
    """
    checkpoint, damaged = newest_valid_checkpoint(Store(config.store), run)
    for error in damaged:
        print(f"{config.name}: a checkpoint is not used: {error}")
    return RunPlan(run, checkpoint.step + 1 if checkpoint else 0, checkpoint)


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


def the_rest(config: RunSettings, decides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not in ``decides``, table by table."""
    tree = config.model_dump(mode="json")
    rest = {key: value for key, value in tree.items() if key not in decides}
    for table, names in LAYOUT.items():
        rest[table] = {k: v for k, v in tree[table].items() if k in names}
    return rest


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


def check_platform(config: RunSettings) -> None:
    """The device exists and the dtype suits it."""
    platform = detect(config.cluster.device)
    if platform.device == "cpu" and config.model.dtype != "float32":
        raise ValueError(
            f"model.dtype = {config.model.dtype!r} on a CPU: use 'float32', or set cluster.device to 'cuda'"
        )


def check_hooks(config: RunSettings) -> None:
    """Every hook can be imported and has the right signature."""
    rollout = config.rollout
    load_hook(rollout.reward, "group_reward" if rollout.group_reward else "reward")
    if rollout.generate:
        load_hook(rollout.generate, "generate")
    for kind, path in config.hooks.named():
        load_hook(path, kind)
    if ":" in rollout.buffer.priority:
        load_hook(rollout.buffer.priority, "priority")
    for dataset in config.evals:
        if dataset.reward:
            load_hook(dataset.reward, "group_reward" if dataset.group_reward else "reward")
        if dataset.generate:
            load_hook(dataset.generate, "generate")
    if path := own_function(config.algorithm, "advantage"):
        load_hook(path, "advantage")
    if path := own_function(config.algorithm, "loss"):
        load_hook(path, "loss")


def check_model(config: RunSettings) -> None:
    """The model's folder holds what both engines need."""
    folder = Path(config.model.path)
    needed = ["config.json", "tokenizer_config.json"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"model.path = {config.model.path!r} has no {missing[0]}; "
            "give the folder of a Hugging Face checkpoint"
        )
    if not config.model.random_weights and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model.path = {config.model.path!r} has no *.safetensors; "
            "add the weights or set model.random_weights = true"
        )
    architectures = json.loads((folder / "config.json").read_text()).get("architectures")
    if not architectures:
        raise ValueError(f"model.path = {config.model.path!r}: config.json names no architectures")


def check_template(field: str, data: DataConfig, model: str, prompts: PromptSet) -> None:
    """Chat messages can be rendered: the template is asked for, and there is one."""
    if data.apply_chat_template:
        folder = Path(model)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        if not settings.get("chat_template") and not any(folder.glob("chat_template.*")):
            raise ValueError(
                f"{field}.apply_chat_template = true but the tokenizer in {model!r} has no chat template"
            )
    elif chat := next((p for p in prompts.prompts if not isinstance(p.prompt, str)), None):
        raise ValueError(
            f"{field}.apply_chat_template = false but prompt {chat.prompt_id} is a list of chat "
            "messages; set it to true"
        )


def check_parallel(config: RunSettings) -> None:
    """The ranks can be laid out as the ``[megatron]`` table asks."""
    tensor, pipeline, context, expert = (int(config.megatron.get(n, 1)) for n in PARALLEL[:-1])
    expert_tensor = int(config.megatron.get(PARALLEL[-1], tensor))
    for words, width in (
        ("tensor x pipeline x context", tensor * pipeline * context),
        ("expert x expert tensor x pipeline", expert * expert_tensor * pipeline),
    ):
        if width < 1 or config.trainer.ranks % width:
            raise ValueError(
                f"trainer.ranks = {config.trainer.ranks} is no multiple of {width} ({words} "
                "parallel size in [megatron]); change one of them"
            )


def _check_enough(field: str, data: DataConfig, rows: int, wanted: int) -> None:
    if rows == 0:
        raise ValueError(f"{field}.path = {data.path!r} has no usable row")
    if rows < wanted:
        print(f"{field}: {rows} prompts for batches of {wanted}; a batch will span epochs")
