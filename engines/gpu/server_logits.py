"""Logits of an SGLang server's decoding steps on a GPU: left in bfloat16, as the output layer computes them.

SGLang copies them to float32 first, which takes as long as the product for a large vocabulary. The same
numbers are drawn from either way; where something is to be added to them, they are made float32 then.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any

from .sampler import BACKEND

KNOWN = ("0.5.17", "0.5.18")
"""Versions of SGLang whose own way this was compared with."""


def install() -> None:
    """Have SGLang's models and sampler do so in this process, before its model is built."""
    if importlib.metadata.version("sglang") not in KNOWN:
        return
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.runtime_context import get_exec, get_spec

    def wanted() -> bool:
        """Only our sampler reads them so; a draft of several tokens has readers of its own, and a
        deterministic server products of its own."""
        settings = get_exec()
        return (
            settings.kernel.sampling_backend == BACKEND
            and not settings.deterministic.enable_deterministic_inference
            and not get_spec().speculative_algorithm
        )

    logits, ready = LogitsProcessor._get_logits, ModelRunner._preprocess_logits
    setattr(LogitsProcessor, logits.__name__, leaving(logits, wanted))
    setattr(ModelRunner, ready.__name__, preparing(ready))


def leaving(whole: Callable[..., Any], wanted: Callable[[], bool]) -> Callable[..., Any]:
    """``whole``, which gives float32 logits, with a short way for plain steps of decoding.

    Both write into the buffer that all CUDA graphs share; here its first half is filled.
    """

    def _get_logits(
        self: Any,
        hidden_states: Any,
        lm_head: Any,
        logits_metadata: Any,
        embedding_bias: Any = None,
        use_logits_buffer: bool = True,
    ) -> Any:
        import torch

        buffer = logits_metadata.next_token_logits_buffer if use_logits_buffer else None
        if (
            buffer is None
            or embedding_bias is not None
            or not logits_metadata.forward_mode.is_decode()
            or not is_plain(self, hidden_states, lm_head, buffer)
            or torch.compiler.is_compiling()  # never tried; it would copy what a view writes
            or not wanted()
        ):
            rest = (lm_head, logits_metadata, embedding_bias, use_logits_buffer)
            return whole(self, hidden_states, *rest)
        half = buffer.view(-1).view(torch.bfloat16)[: buffer.numel()].view(buffer.shape)
        return torch.mm(hidden_states, lm_head.weight.T, out=half)

    return _get_logits


def is_plain(processor: Any, hidden_states: Any, lm_head: Any, buffer: Any) -> bool:
    """Whether the logits are the product of one GPU's states and weights in bfloat16, and no more."""
    import torch

    weight = getattr(lm_head, "weight", None)
    return (
        weight is not None
        and weight.dtype == hidden_states.dtype == torch.bfloat16
        and not hasattr(lm_head, "set_lora")
        and type(getattr(lm_head, "quant_method", None)).__name__ in UNQUANTISED
        and buffer.is_contiguous()
        and tuple(buffer.shape) == (len(hidden_states), len(weight))
        and len(weight) == processor.vocab_size
        and processor.logit_scale is None
        and not processor.final_logit_softcapping
        and not processor.use_fp32_lm_head
        and processor.rl_on_policy_target is None
        and not processor.do_tensor_parallel_all_gather
        and not processor.do_tensor_parallel_all_gather_dp_attn
    )


UNQUANTISED = ("NoneType", "UnquantizedEmbeddingMethod", "UnquantizedLinearMethod")


def preparing(whole: Callable[..., None]) -> Callable[..., None]:
    """``whole``, which adds what requests ask for to their logits; those are float32 then."""

    def _preprocess_logits(self: Any, logits_output: Any, sampling_info: Any) -> None:
        if adds(sampling_info):
            logits_output.next_token_logits = logits_output.next_token_logits.float()
        whole(self, logits_output, sampling_info)

    return _preprocess_logits


def adds(info: Any) -> bool:
    """Whether a penalty, a bias, a grammar or a function of the user's changes the batch's logits."""
    penalties = info.penalizer_orchestrator
    return bool(
        info.acc_additive_penalties is not None
        or info.acc_scaling_penalties is not None
        or (penalties is not None and penalties.is_required)
        or info.logit_bias is not None
        or info.has_custom_logit_processor
        or info.grammars
    )
