"""SGLang's sampler on a GPU: plain draws by one kernel in place of a dozen passes over the logits.

A draw is plain where neither top-p, top-k nor min-p cut the distribution and nothing but the token's
own log-probability is asked for; all others are SGLang's own.
"""

from collections.abc import Callable
from typing import Any

BACKEND = "rollflow"
"""Name of the sampler in SGLang's ``sampling_backend``."""


def install() -> None:
    """Make ``BACKEND`` known to SGLang in this process, before its model is built."""
    from sglang.srt.layers.sampler import register_sampler_backend

    register_sampler_backend(BACKEND, lambda: sampler_class()())


def sampler_class() -> type[Any]:
    """The subclass of SGLang's Sampler; made here because SGLang is heavy to import."""
    from sglang.srt.layers import sampler

    class OnePassSampler(sampler.Sampler):
        def forward(
            self,
            logits_output: Any,
            sampling_info: Any,
            return_logprob: bool,
            top_logprobs_nums: list[int],
            token_ids_logprobs: list[list[int]],
            positions: Any,
        ) -> Any:
            rest = (return_logprob, top_logprobs_nums, token_ids_logprobs, positions)
            if sampler.SGLANG_RETURN_ORIGINAL_LOGPROB or not is_plain(
                sampling_info, top_logprobs_nums, token_ids_logprobs
            ):
                # A decoding step's may be bfloat16, see server_logits; SGLang divides and adds in place.
                logits_output.next_token_logits = logits_output.next_token_logits.float()
                return super().forward(logits_output, sampling_info, *rest)
            logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info)
            tokens, logprobs = _draw()(logits, sampling_info.temperatures)
            if return_logprob:
                logits_output.next_token_logprobs = logprobs
            self._sync_token_ids_across_tp(tokens, sampling_info)
            return tokens

        def _sample_from_probs(
            self, probs: Any, sampling_info: Any, positions: Any, simple_sampling_case: bool
        ) -> Any:
            if simple_sampling_case:
                return super()._sample_from_probs(probs, sampling_info, positions, True)
            return sampler.top_k_top_p_min_p_sampling_from_probs_torch(
                probs,
                sampling_info.top_ks,
                sampling_info.top_ps,
                sampling_info.min_ps,
                sampling_info.need_min_p_sampling,
                sampling_info.sampling_seed,
                positions,
            )

    return OnePassSampler


def is_plain(info: Any, top_logprobs_nums: list[int], token_ids_logprobs: list[Any]) -> bool:
    """Whether every request of the batch asks for a plain draw."""
    return not (
        info.is_all_greedy
        or info.need_top_p_sampling
        or info.need_top_k_sampling
        or info.need_min_p_sampling
        or info.sampling_seed is not None
        or any(getattr(info, "return_sampling_masks", None) or [])
        or any(number > 0 for number in top_logprobs_nums or [])
        or any(ids is not None for ids in token_ids_logprobs or [])
    )


def _draw() -> Callable[[Any, Any], tuple[Any, Any]]:
    from .sampling_kernel import draw

    return draw
