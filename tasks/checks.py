"""Find mistakes in a run's settings before anything is started, Prefect included."""

import importlib.metadata
import json
from pathlib import Path

from rollflow.engines.algorithms.config import SftConfig, own_functions
from rollflow.engines.hooks import load_hook
from rollflow.engines.hooks.check import check_function
from rollflow.engines.megatron.settings import PARALLEL
from rollflow.engines.platform import Platform, detect
from rollflow.engines.rollout.experts import SWITCH
from rollflow.engines.rollout.server_args import gpus_per_server
from rollflow.storage.config import DataConfig
from rollflow.storage.prompts import PromptSet

from .settings import RunSettings
from .trackers import check_trackers


def check_settings(config: RunSettings) -> None:
    """Everything that can be checked without reading the data or writing to the store."""
    check_platform(config)
    check_hooks(config)
    check_model(config)
    check_critic(config)
    check_lengths(config)
    check_teacher(config)
    check_judge(config)
    check_groups(config)
    check_parallel(config)
    check_experts(config, detect(config.cluster.device))
    check_router_replay(config)
    check_trackers(config.report)


def check_platform(config: RunSettings) -> None:
    """The device exists, the dtype suits it, and there are GPUs enough."""
    platform = detect(config.cluster.device)
    if platform.device == "cpu" and config.model.dtype != "float32":
        raise ValueError(
            f"model.dtype = {config.model.dtype!r} on a CPU: use 'float32', or set cluster.device to 'cuda'"
        )
    if config.cluster.colocate:
        check_colocation(config, platform)
    elif platform.device == "cuda" and config.cluster.address == "local":
        tables = config.rollout.tables(config.sglang)
        servers = sum(gpus_per_server(table, platform.device) for _, table in tables)
        if others := config.rollout.external:
            servers += others.spares * gpus_per_server(config.sglang, platform.device)
        for frozen in (config.rollout.teacher, config.rollout.judge):
            if frozen and frozen.path:
                servers += frozen.servers * gpus_per_server(frozen.sglang, platform.device)
        if (needed := config.trainer.ranks + servers) > platform.gpus:
            raise ValueError(
                f"trainer.ranks = {config.trainer.ranks}, {len(tables)} servers of rollout.servers and "
                f"rollout.groups, and a teacher's and a judge's take {needed} GPUs, this machine has {platform.gpus}; "
                "make them fewer, or set cluster.colocate = true to share one"
            )


def check_colocation(config: RunSettings, platform: Platform) -> None:
    """One rank and one server can share a GPU, by turns."""
    if platform.device == "cpu":
        raise ValueError(
            "cluster.colocate = true on a CPU: there is no GPU to share; remove it (processes on a "
            "CPU share it anyway) or set cluster.device to 'cuda'"
        )
    if config.rollout.mode != "sync":
        raise ValueError(
            f"rollout.mode = {config.rollout.mode!r} generates while the trainer trains, but with "
            "cluster.colocate = true they take turns; set rollout.mode = 'sync'"
        )
    for name, frozen in (("teacher", config.rollout.teacher), ("judge", config.rollout.judge)):
        if frozen and frozen.path:
            raise ValueError(
                f"rollout.{name}.path = {frozen.path!r} with cluster.colocate = true: there is no GPU "
                f"for the {name}; give the url of one that runs elsewhere"
            )
    if config.rollout.external and config.rollout.external.spares:
        raise ValueError(
            f"rollout.external.spares = {config.rollout.external.spares} with cluster.colocate = true: "
            "there is no GPU for a spare; set it to 0"
        )
    for field, found in (
        ("trainer.ranks", config.trainer.ranks),
        ("rollout.servers and rollout.groups", len(config.rollout.tables({}))),
        ("GPUs of a server (sglang.tp_size x pp_size)", gpus_per_server(config.sglang, "cuda")),
    ):
        if found > 1:
            raise ValueError(
                f"{field} = {found} with cluster.colocate = true: this version shares one GPU "
                "between one rank and one server; set it to 1 or colocate to false"
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
    check_own_mathematics(config)


def check_generation(config: RunSettings) -> None:
    """Somebody answers the prompts: a server, or a function that needs none."""
    if not config.rollout.generates and not config.rollout.generate:
        raise ValueError(
            "rollout.servers = 0: nobody answers the prompts; set it to 1 or more, or give rollout.external, "
            "rollout.groups, or in rollout.generate a function that asks no server"
        )


def check_own_mathematics(config: RunSettings) -> None:
    """An advantage or a loss of the user's gives the right thing for an example."""
    for field, path in own_functions(config.algorithm).items():
        check_function(path, field)


def check_critic(config: RunSettings) -> None:
    """A critic that starts from weights of its own finds them, and its schedule has room."""
    if isinstance(config.algorithm, SftConfig) or (critic := config.algorithm.critic) is None:
        return
    if critic.path and not (Path(critic.path) / "config.json").is_file():
        raise ValueError(
            f"algorithm.critic.path = {critic.path!r} has no config.json; give the folder of a Hugging "
            "Face checkpoint"
        )
    updates = config.trainer.decay_updates(config.steps)
    if critic.lr_warmup_steps >= updates:
        raise ValueError(
            f"algorithm.critic.lr_warmup_steps = {critic.lr_warmup_steps} is not below the {updates} "
            "updates over which the learning rate decays; lower it"
        )


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


def check_lengths(config: RunSettings) -> None:
    """The longest answers fit into the model's context."""
    folder = Path(config.model.path)
    positions = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    context = config.sglang.get("context_length") or positions
    # A generate function of the user's own decides how long its requests are.
    asked = [("rollout.sampling", config.rollout.sampling)] if not config.rollout.generate else []
    # An evaluation of labels asks no server for answers.
    answers = [e for e in config.evals if not (e.generate or e.loss)]
    asked += [(f"evals {e.name}: sampling", e.sampling) for e in answers]
    for field, sampling in asked:
        if context and sampling.max_new_tokens >= context:
            raise ValueError(
                f"{field}.max_new_tokens = {sampling.max_new_tokens} leaves no room for a prompt in "
                f"the {context} tokens of the model's context (max_position_embeddings of "
                f"{config.model.path!r}, or sglang.context_length); make it smaller"
            )


def check_teacher(config: RunSettings) -> None:
    """A teacher of ours has the policy's vocabulary."""
    teacher = config.rollout.teacher
    if teacher is None or not teacher.path:
        return
    sizes = []
    for field, folder in (
        ("rollout.teacher.path", teacher.path),
        ("model.path", config.model.path),
    ):
        file = Path(folder) / "config.json"
        if not file.is_file():
            raise ValueError(
                f"{field} = {folder!r} has no config.json; give the folder of a Hugging Face checkpoint"
            )
        sizes.append(json.loads(file.read_text()).get("vocab_size"))
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"rollout.teacher.path = {teacher.path!r} has vocab_size {sizes[0]}, the policy {sizes[1]}; "
            "a teacher scores the policy's token ids, so give one with the same tokenizer"
        )


def check_judge(config: RunSettings) -> None:
    """A judge of ours is a model's folder."""
    judge = config.rollout.judge
    if judge and judge.path and not (Path(judge.path) / "config.json").is_file():
        raise ValueError(
            f"rollout.judge.path = {judge.path!r} has no config.json; give the folder of a Hugging "
            "Face checkpoint"
        )


def check_groups(config: RunSettings) -> None:
    """Prefill and decode servers can be described, not started."""
    apart = [group.name for group in config.rollout.groups if group.role]
    if apart:
        raise ValueError(
            f"rollout.groups {', '.join(apart)}: the settings are sound, but this version does not "
            "start prefill and decode servers; leave out the roles"
        )


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


def check_experts(config: RunSettings, platform: Platform) -> None:
    """A mixture of experts: servers build the model that the trainer does, and can prove it."""
    model = json.loads((Path(config.model.path) / "config.json").read_text())
    if not model.get("num_experts") or not config.rollout.generates:
        return
    what = f"model.path = {config.model.path!r} is a mixture of experts"
    if platform.device == "cuda":
        raise ValueError(
            f"{what}: what its servers hold on a GPU cannot be verified in this version; set "
            "cluster.device = 'cpu' or take a dense model"
        )
    if model.get("mlp_only_layers") or model.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"{what} with dense layers between (mlp_only_layers, decoder_sparse_step of its "
            "config.json), for which SGLang builds layers of experts; train it "
            "without servers only"
        )
    if model.get("tie_word_embeddings"):
        raise ValueError(
            f"{what} with tie_word_embeddings, for which SGLang keeps an output layer that is not "
            "tied; untie the weights of the checkpoint, or train it without servers only"
        )


def check_router_replay(config: RunSettings) -> None:
    """There are experts, the servers can tell which they chose, and the trainer can follow."""
    if not config.trainer.router_replay:
        return
    megatron, sglang = config.megatron, config.sglang
    model = json.loads((Path(config.model.path) / "config.json").read_text())
    recomputed = megatron.get("recompute_modules") or ()
    refusals = {
        f"model.path = {config.model.path!r} is a dense model: it has no router": not model.get(
            "num_experts"
        ),
        "algorithm.name = 'sft': labels were not generated, so there is no choice to replay": isinstance(
            config.algorithm, SftConfig
        ),
        "rollout.servers = 0: nobody tells which experts were chosen": not config.rollout.generates,
        f"sglang.{SWITCH} = false: the servers would not tell": sglang.get(SWITCH) is False,
        "sglang.pp_size above 1: a server tells of its last stage alone": sglang.get("pp_size", 1)
        > 1,
        "sglang.tokenizer_worker_num above 1: only a server's first process is told what is asked": (
            sglang.get("tokenizer_worker_num", 1) > 1
        ),
        "sglang 0.5.17, which may tell of another request than its own while steps overlap; install "
        "0.5.18 or set sglang.disable_overlap_schedule = true": (
            _is_installed("sglang", "0.5.17") and not sglang.get("disable_overlap_schedule")
        ),
        "megatron.moe_router_fusion = true: a fused router cannot be told": bool(
            megatron.get("moe_router_fusion")
        ),
        "megatron.moe_router_load_balancing_type = 'sinkhorn': such a router cannot be told": (
            megatron.get("moe_router_load_balancing_type") == "sinkhorn"
        ),
        "megatron.recompute_modules with 'moe' over pipeline stages: a router that is run again by "
        "itself cannot know its micro-batch; use recompute_granularity = 'full'": (
            "moe" in recomputed and int(megatron.get(PARALLEL[1], 1)) > 1
        ),
    }
    for reason, holds in refusals.items():
        if holds:
            raise ValueError(f"trainer.router_replay = true cannot work with {reason}")


def _is_installed(package: str, version: str) -> bool:
    try:
        return importlib.metadata.version(package) == version
    except importlib.metadata.PackageNotFoundError:
        return False
