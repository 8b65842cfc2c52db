"""The arguments of a slime launch script as our settings, and what has no counterpart."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollflow.engines.megatron.config import MEGATRON_OWNED, megatron_settings

from .arguments import literal, value_of
from .config import SLIME_NAMES

RENAMED: dict[str, str] = {
    **{name.replace("_", "-"): setting for name, setting in SLIME_NAMES.items()},
    "rollout-shuffle": "data.shuffle",
    "rollout-seed": "data.seed",
    "rollout-batch-size": "rollout.batch_size",
    "rollout-num-gpus-per-engine": "sglang.tp_size",
    "eps-clip-c": "algorithm.dual_clip",
    "gamma": "algorithm.gamma",
    "lambd": "algorithm.lam",
    "value-clip": "algorithm.critic.value_clip",
    "critic-lr": "algorithm.critic.lr",
    "num-critic-only-steps": "algorithm.critic.warmup_steps",
    "normalize-advantages": "algorithm.whiten",
    "max-tokens-per-gpu": "trainer.max_tokens_per_micro_batch",
    "lr-decay-style": "trainer.lr_decay_style",
    "lr-warmup-iters": "trainer.lr_warmup_steps",
    "lr-decay-iters": "trainer.lr_decay_steps",
    "lr-wsd-decay-iters": "trainer.lr_wsd_decay_steps",
    "lr-wsd-decay-style": "trainer.lr_wsd_decay_style",
    "seed": "trainer.seed",
    "save-interval": "checkpoint.every",
    "save": "store.url",
    "ref-load": "trainer.ref_load",
    "use-rollout-routing-replay": "trainer.router_replay",
}
"""slime's word -> our setting, where the value stays what it is."""
IMPLIED = {
    "use-dynamic-batch-size": "micro-batches are always packed by tokens",
    "balance-data": "data parallel ranks are always balanced, by FLOPs",
    "use-kl-loss": "algorithm.kl_coef, or algorithm.kl_watch where it is 0",
    "kl-loss-coef": "algorithm.kl_coef",
    "kl-coef": "algorithm.kl_coef with algorithm.kl_in = 'reward'",
    "advantage-estimator": "algorithm.name",
    "loss-type": "algorithm.name",
    "calculate-per-token-loss": "algorithm.reduction",
    "use-tis": "algorithm.correction",
    "tis-clip": "algorithm.correction.high",
    "tis-clip-low": "algorithm.correction.low",
    "accumulate-allreduce-grads-in-fp32": "gradients are always reduced in float32",
    "attention-backend": "packed attention is chosen by device",
    "rotary-base": "config.json of the model decides it",
    "vocab-size": "config.json of the model decides it",
    "padded-vocab-size": "config.json of the model decides it",
    "swiglu": "config.json of the model decides it",
    "use-rotary-position-embeddings": "config.json of the model decides it",
    "disable-bias-linear": "config.json of the model decides it",
    "group-query-attention": "config.json of the model decides it",
    "norm-epsilon": "config.json of the model decides it",
    "untie-embeddings-and-output-weights": "config.json of the model decides it",
    "rotary-percent": "config.json of the model decides it",
    "post-self-attn-layernorm": "config.json of the model decides it",
    "post-mlp-layernorm": "config.json of the model decides it",
    "no-rope-fusion": "rotary positions are gathered for packed rows",
    "bf16": "model.dtype",
    "actor-num-nodes": "counted in trainer.ranks",
    "actor-num-gpus-per-node": "counted in trainer.ranks",
    "rollout-num-gpus": "counted in rollout.servers",
    "global-batch-size": "counted in trainer.updates_per_batch",
    "eval-interval": "evals.every",
    "eval-prompt-data": "evals",
    "n-samples-per-eval-prompt": "evals.n_samples_per_prompt",
    "eval-max-response-len": "evals.sampling.max_new_tokens",
    "eval-temperature": "evals.sampling.temperature",
    "eval-top-p": "evals.sampling.top_p",
    "eval-top-k": "evals.sampling.top_k",
    "kl-loss-type": "algorithm.kl_type",
    "rm-type": "rollout.reward",
    "load": "a run goes on from its own store; trainer.load names other first weights",
    "max-position-embeddings": "config.json of the model decides it",
}
"""slime's words that need no counterpart, or are counted together; and why."""
ALGORITHMS = {
    **{name: name for name in ("grpo", "gspo", "cispo", "ppo")},
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
    "on_policy_distillation": "distill",
}
KL_TYPES = {"low_var_kl": "low_var", "k1": "k1", "k2": "k2", "k3": "k3", "kl": "k1"}


@dataclass
class Translation:
    """Our settings, and what could not be translated with the reason."""

    tree: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    implied: dict[str, str] = field(default_factory=dict)

    def put(self, dotted: str, value: Any) -> None:
        """Set a setting by its dotted name."""
        place = self.tree
        *tables, last = dotted.split(".")
        for table in tables:
            place = place.setdefault(table, {})
        place[last] = value


def from_slime(words: Sequence[str]) -> Translation:
    """Translate the words of a slime command, e.g. ``--rollout-batch-size 32 --lr 1e-6``."""
    given = _given(words)
    out = Translation()
    megatron = megatron_settings()
    for word, values in given.items():
        value = value_of([], values)
        name = word.replace("-", "_")
        if word in RENAMED:
            out.put(RENAMED[word], value_of(RENAMED[word].split("."), values))
        elif word in IMPLIED:
            out.implied[word] = IMPLIED[word]
        elif word.startswith("sglang-"):
            out.put(f"sglang.{name.removeprefix('sglang_')}", value)
        elif word.startswith("router-"):
            out.put(f"router.{name.removeprefix('router_')}", value)
        elif name in MEGATRON_OWNED:
            out.implied[word] = MEGATRON_OWNED[name]
        elif name in megatron:
            out.put(f"megatron.{name}", value)
        else:
            out.missing[word] = f"no counterpart (value {value!r})"
    _together(given, out)
    return out


def to_toml(tree: dict[str, Any]) -> str:
    """The settings as a TOML file: plain values first, then tables."""
    lines: list[str] = []
    _table("", tree, lines)
    return "\n".join(lines).strip() + "\n"


def _given(words: Sequence[str]) -> dict[str, list[str]]:
    given: dict[str, list[str]] = {}
    last = ""
    for word in words:
        if word.startswith("--"):
            last, _, value = word[2:].partition("=")
            given[last] = [value] if value else []
        elif not last:
            raise ValueError(f"{word!r} stands where a --setting is expected")
        else:
            given[last].append(word)
    return given


def _together(given: dict[str, list[str]], out: Translation) -> None:
    """What several words of slime's say together."""

    def number(word: str, default: int) -> int:
        return int(given.get(word, [str(default)])[0])

    out.tree.setdefault("name", "from-slime")
    gpus = number("actor-num-nodes", 1) * number("actor-num-gpus-per-node", 8)
    out.put("trainer.ranks", gpus)
    per_engine = number("rollout-num-gpus-per-engine", 1)
    rollout_gpus = gpus if "colocate" in given else number("rollout-num-gpus", gpus)
    out.put("rollout.servers", max(1, rollout_gpus // per_engine))
    if "global-batch-size" in given:
        samples = number("rollout-batch-size", 32) * number("n-samples-per-prompt", 8)
        out.put(
            "trainer.updates_per_batch", max(1, samples // number("global-batch-size", samples))
        )
    out.put("model.dtype", "bfloat16")
    if "load" in given and given["load"] != given.get("save"):
        out.put("trainer.load", given["load"][0])
    _algorithm(given, out)
    _reward(given, out)
    if "colocate" in given:
        if gpus == 1:
            out.put("cluster.colocate", True)
        else:
            out.missing["colocate"] = (
                f"one server and one rank may share one GPU (cluster.colocate); of {gpus}, each rank and "
                "server here has its own: give it more GPUs, or lower trainer.ranks and rollout.servers"
            )
    if "partial-rollout" in given:
        _partial(number("over-sampling-batch-size", 0) > number("rollout-batch-size", 32), out)
    _evals(given, number, out)


def _partial(over_samples: bool, out: Translation) -> None:
    """slime has no bound on how old a continued answer is, and cuts nothing without over-sampling."""
    if over_samples:
        out.put("rollout.max_staleness", 1)
        out.missing["partial-rollout"] = (
            "rollout.early_stop = true, and a bound that slime has not: rollout.max_staleness = 1"
        )
    else:
        del out.tree["rollout"]["early_stop"]
        out.implied["partial-rollout"] = "no more groups are begun than are trained on: none is cut"


def _algorithm(given: dict[str, list[str]], out: Translation) -> None:
    if given.get("loss-type") == ["sft_loss"]:
        out.tree["algorithm"] = {"name": "sft"}
        return
    estimator = given.get("advantage-estimator", ["grpo"])[0]
    if estimator in ALGORITHMS:
        out.put("algorithm.name", ALGORITHMS[estimator])
    else:
        out.missing["advantage-estimator"] = f"no counterpart (value {estimator!r})"
    if "calculate-per-token-loss" in given:
        out.put("algorithm.reduction", "token")
    if "eps-clip" in given and "eps-clip-high" not in given:
        out.put("algorithm.eps_clip_high", literal(given["eps-clip"][0]))
    if "entropy-coef" in given:
        out.put("algorithm.entropy_coef", float(given["entropy-coef"][0]))
    if "use-tis" in given:
        out.put("algorithm.correction.high", float(given.get("tis-clip", ["2"])[0]))
        out.put("algorithm.correction.low", float(given.get("tis-clip-low", ["0"])[0]))
    _kl(given, out)


def _kl(given: dict[str, list[str]], out: Translation) -> None:
    """slime has two: one in the loss where ``--use-kl-loss`` is given, one in the reward."""
    in_loss = float(given.get("kl-loss-coef", ["0"])[0]) if "use-kl-loss" in given else None
    in_reward = float(given.get("kl-coef", ["0"])[0])
    kind = given.get("kl-loss-type", ["k1"])[0]
    if in_loss and in_reward:
        out.missing["kl-coef"] = (
            f"{in_reward:g} beside --kl-loss-coef: one KL is taken, that of the loss"
        )
    if kind not in KL_TYPES:
        out.missing["kl-loss-type"] = f"no counterpart (value {kind!r})"
    if in_reward and not in_loss:
        out.put("algorithm.kl_coef", in_reward)
        out.put("algorithm.kl_in", "reward")
        out.put("algorithm.kl_type", KL_TYPES.get(kind, "k1"))
        return
    out.put("algorithm.kl_coef", in_loss or 0.0)
    if in_loss:
        out.put("algorithm.kl_in", "loss")
    elif in_loss is not None:
        out.put("algorithm.kl_watch", True)
    if in_loss is not None:
        out.put("algorithm.kl_type", KL_TYPES.get(kind, "k3"))


def _reward(given: dict[str, list[str]], out: Translation) -> None:
    if "rm-type" in given and "custom-rm-path" not in given:
        out.put("rollout.reward", "my_reward:score")
        del out.implied["rm-type"]
        out.missing["rm-type"] = (
            f"{given['rm-type'][0]!r}: write a reward function and name it in rollout.reward, where "
            "my_reward:score stands"
        )


def _evals(
    given: dict[str, list[str]], number: Callable[[str, int], int], out: Translation
) -> None:
    pairs = given.get("eval-prompt-data", [])
    evals: list[dict[str, Any]] = []
    for name, path in zip(pairs[::2], pairs[1::2], strict=True):
        sampling: dict[str, Any] = {}
        for word, key in (
            ("eval-max-response-len", "max_new_tokens"),
            ("eval-temperature", "temperature"),
            ("eval-top-p", "top_p"),
            ("eval-top-k", "top_k"),
        ):
            if word in given:
                sampling[key] = literal(given[word][0])
        sampling.setdefault("temperature", float(given.get("rollout-temperature", ["1"])[0]))
        data = {k: v for k, v in out.tree.get("data", {}).items() if k not in ("path", "shuffle")}
        evals.append(
            {
                "name": name,
                "every": number("eval-interval", 0),
                "n_samples_per_prompt": number("n-samples-per-eval-prompt", 1),
                "sampling": sampling,
                "data": {**data, "path": path, "shuffle": False},
            }
        )
    if evals:
        out.tree["evals"] = evals


def _table(prefix: str, tree: dict[str, Any], lines: list[str]) -> None:
    tables = {k: v for k, v in tree.items() if isinstance(v, dict)}
    lists = {k: v for k, v in tree.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    for key, value in tree.items():
        if key not in tables and key not in lists:
            lines.append(f"{key} = {json.dumps(value)}")
    for key, value in tables.items():
        lines += ["", f"[{prefix}{key}]"]
        _table(f"{prefix}{key}.", value, lines)
    for key, values in lists.items():
        for value in values:
            lines += ["", f"[[{prefix}{key}]]"]
            _table(f"{prefix}{key}.", value, lines)
