"""What servers answer to a request: tokens with their log-probabilities, or a fault."""

from typing import Any

from rollflow.engines.gpu.server_answers import told_logprobs
from rollflow.engines.hooks import Completion
from rollflow.engines.published import version_of

from .experts import told_experts, went_on


class RequestRefusedError(ValueError):
    """The server will never accept this request, e.g. a prompt longer than the context."""


class ServerFaultError(Exception):
    """An answer that another attempt may better."""


def completion_of(answer: dict[str, Any], seconds: float, asked: int | None) -> Completion:
    """``asked``: tokens of a request whose answer has routed experts; ServerFaultError where it lacks them."""
    meta = answer["meta_info"]
    version = version_of(meta["weight_version"])
    experts = None
    if asked is not None and answer["output_ids"]:
        try:
            experts = told_experts(meta, asked + len(answer["output_ids"]) - 1)
        except ValueError as error:
            raise ServerFaultError(str(error)) from error
    return Completion(
        token_ids=answer["output_ids"],
        logprobs=told_logprobs(meta),
        finish_reason=meta["finish_reason"]["type"],
        policy_version=version,
        cached_tokens=meta.get("cached_tokens", 0),
        seconds=seconds,
        policy_versions=[version] * len(answer["output_ids"]),
        routed_experts=experts,
    )


def joined(first: Completion, second: Completion) -> Completion:
    """An answer and how it went on. Cached tokens are of the first request: later ones find ours."""
    return Completion(
        token_ids=[*first.token_ids, *second.token_ids],
        logprobs=[*first.logprobs, *second.logprobs],
        finish_reason=second.finish_reason,
        policy_version=second.policy_version,
        cached_tokens=first.cached_tokens if first.token_ids else second.cached_tokens,
        seconds=first.seconds + second.seconds,
        policy_versions=[*first.policy_versions, *second.policy_versions],
        routed_experts=went_on(first.routed_experts, second.routed_experts),
    )
