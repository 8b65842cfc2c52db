"""Settings of servers: what SGLang and its router take, groups, other models, engines of others."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rollflow.engines.config import Setting, check_table, dataclass_settings
from rollflow.storage.config import Config

SGLANG_OWNED = {
    "model_path": "use model.path",
    "tokenizer_path": "use model.path",
    "host": "servers listen on loopback",
    "port": "ports are chosen free",
    "dtype": "use model.dtype",
    "device": "use cluster.device",
    "trust_remote_code": "use model.trust_remote_code",
    "random_seed": "use rollout.seed",
    "disaggregation_mode": "use the role of rollout.groups",
}
"""SGLang's arguments that rollflow sets, and why or what to use instead."""

KEYED_POLICIES = ("manual", "consistent_hashing")
"""The router's policies that send requests of one key to one server."""
POLICIES = (
    "round_robin",
    "random",
    "cache_aware",
    "power_of_two",
    "prefix_hash",
    *KEYED_POLICIES,
)
PREFILL_POLICIES = (*POLICIES, "bucket")

ROUTER_OWNED = {
    "pd_disaggregation": "give rollout.groups the roles prefill and decode",
    "prefill_urls": "give rollout.groups the role prefill",
    "decode_urls": "give rollout.groups the role decode",
    "worker_urls": "use rollout.servers",
    "host": "the router listens on loopback",
    "port": "the port is chosen free",
}


def sglang_settings() -> dict[str, Setting]:
    """Every setting that the ``[sglang]`` table takes; empty without SGLang."""
    return dataclass_settings("sglang", "srt/server_args.py", "ServerArgs")


def router_settings() -> dict[str, Setting]:
    """Every setting that the ``[router]`` table takes; empty without sglang-router."""
    return dataclass_settings("sglang_router", "router_args.py", "RouterArgs")


def check_sglang(given: Mapping[str, Any], table: str = "sglang") -> None:
    """Refuse names that SGLang's ``ServerArgs`` lacks or rollflow owns, values of a wrong type, and more
    than all of a GPU's memory."""
    check_table(table, given, sglang_settings(), SGLANG_OWNED)
    share = given.get("mem_fraction_static")
    if isinstance(share, int | float) and not 0 < share < 1:
        raise ValueError(
            f"{table}.mem_fraction_static = {share} is no share of the memory; give one between 0 and 1"
        )


def check_router(given: Mapping[str, Any]) -> None:
    """Refuse names that the router's ``RouterArgs`` lacks or rollflow owns, and values of a wrong type."""
    check_table("router", given, router_settings(), ROUTER_OWNED)


class FrozenConfig(Config):
    """A model that is not trained: on servers of its own, or on some that run already."""

    path: str = ""
    """Hugging Face folder; servers of its own are started."""
    servers: int = Field(default=1, gt=0)
    """SGLang servers for ``path``, behind a router of their own."""
    sglang: dict[str, Any] = Field(default_factory=dict)
    """Any field of SGLang's ServerArgs, for these servers."""
    url: str = ""
    """In place of ``path``: an SGLang server or router that runs already, ``http://host:port``."""

    @model_validator(mode="after")
    def _is_one_place(self) -> Self:
        name = f"rollout.{type(self).__name__.removesuffix('Config').lower()}"
        if bool(self.path) == bool(self.url):
            raise ValueError(
                f"{name}: path = {self.path!r} and url = {self.url!r}; give one of them"
            )
        check_sglang(self.sglang, f"{name}.sglang")
        return self


class TeacherConfig(FrozenConfig):
    """Asked for the log-probability of every token that the policy samples: a model with the policy's
    tokenizer."""


class JudgeConfig(FrozenConfig):
    """Asked by reward and generate functions, which get its URL: any model that SGLang serves."""


class GroupConfig(Config):
    """Servers of ours that are alike, with SGLang arguments of their own."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Its servers are ``<name>-0``, ``<name>-1``, ..., in logs and errors."""
    servers: int = Field(default=1, gt=0)
    """SGLang server processes."""
    sglang: dict[str, Any] = Field(default_factory=dict)
    """Any field of SGLang's ServerArgs, laid over the ``[sglang]`` table for these servers."""
    role: Literal["", "prefill", "decode"] = ""
    """Which half of a request these servers do, where prefill and decode are apart."""

    @model_validator(mode="after")
    def _is_known(self) -> "GroupConfig":
        check_sglang(self.sglang, f"rollout.groups {self.name}: sglang")
        return self


class ExternalConfig(Config):
    """SGLang servers that somebody else runs, beside ``rollout.servers`` or in their place."""

    urls: list[str] = Field(min_length=1)
    """``http://host:port`` of each."""
    weights: str
    """Folder, or URL of any fsspec store, where the trainer writes new weights for them: each version
    as a Hugging Face folder in a folder of the run's own. The servers read it."""
    seen_as: str = ""
    """Path under which the servers see ``weights``, where that is another one: a mount of the
    network file system, or of the bucket. SGLang loads new weights from files alone."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds that a server may take to answer at the start of the run, and to load weights; and how
    long a run waits for one of them where none is left."""
    health_every_s: float = Field(default=10.0, gt=0)
    """Seconds between two health checks."""
    slow_s: float = Field(default=30.0, gt=0)
    """A health check that takes longer has failed."""
    spares: int = Field(default=0, ge=0)
    """Servers of our own that are started, at most, once one of these is left out."""

    @field_validator("urls")
    @classmethod
    def _can_be_reached(cls, urls: list[str]) -> list[str]:
        cleaned = [url.rstrip("/") for url in urls]
        for url in cleaned:
            if not re.fullmatch(r"https?://[^/\s]+:\d+", url):
                raise ValueError(
                    f"rollout.external.urls: {url!r} is not of the form http://host:port"
                )
        if twice := {url for url in cleaned if cleaned.count(url) > 1}:
            raise ValueError(f"rollout.external.urls: {min(twice)!r} is named twice")
        return cleaned

    @field_validator("weights")
    @classmethod
    def _is_the_same_everywhere(cls, weights: str) -> str:
        is_local = "://" not in weights or weights.startswith("file://")
        return str(Path(weights.removeprefix("file://")).absolute()) if is_local else weights

    @model_validator(mode="after")
    def _can_be_read(self) -> "ExternalConfig":
        if "://" in self.weights and not self.seen_as:
            raise ValueError(
                f"rollout.external.weights = {self.weights!r} is no folder, and SGLang loads new "
                "weights from files alone; mount the store where the servers run and set "
                "rollout.external.seen_as to its path there"
            )
        return self
