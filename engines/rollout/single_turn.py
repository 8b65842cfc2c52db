"""The generate function used where none is named: one prompt, one request, one sample."""

from rollflow.engines.hooks import GenerateContext, GenerateEngine
from rollflow.storage.samples import Prompt, Sample, Status

from .experts import went_on

STATUS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}
DEFAULT_NEW_TOKENS = 128
"""SGLang's own, where the sampling parameters name none."""


async def generate(engine: GenerateEngine, prompt: Prompt, context: GenerateContext) -> Sample:
    """Ask the engine once; a sample that was cut off goes on from its last token."""
    begun = context.partial
    prompt_ids = begun.prompt_ids if begun else engine.encode(prompt)
    before = begun.response_ids if begun else []
    sampling = context.sampling
    if before:
        limit = sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
        sampling = {**sampling, "max_new_tokens": limit - len(before)}
    answer = await engine.generate([*prompt_ids, *before], sampling, context.seed)
    response_ids = [*before, *answer.token_ids]
    return context.sample(
        prompt,
        engine.tokenizer.decode(prompt_ids),
        prompt_ids,
        response_ids,
        engine.tokenizer.decode(response_ids, skip_special_tokens=True),
        [*(begun.rollout_logprobs if begun else []), *answer.logprobs],
        loss_mask=[*(begun.loss_mask if begun else []), *[True] * len(answer.token_ids)],
        status=STATUS[answer.finish_reason],
        finish_reason=answer.finish_reason,
        policy_versions=[*(begun.policy_versions if begun else []), *answer.policy_versions],
        cached_tokens=answer.cached_tokens,
        generate_s=answer.seconds + (begun.generate_s if begun else 0.0),
        routed_experts=went_on(begun.routed_experts if begun else None, answer.routed_experts),
    )
