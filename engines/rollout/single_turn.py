"""The generate function used where none is named: one prompt, one request, one sample."""

from rollflow.engines.hooks import GenerateContext, GenerateEngine
from rollflow.storage.samples import Prompt, Sample, Status

STATUS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


async def generate(engine: GenerateEngine, prompt: Prompt, context: GenerateContext) -> Sample:
    """Ask the engine once."""
    prompt_ids = engine.encode(prompt)
    answer = await engine.generate(prompt_ids, context.sampling, context.seed)
    return context.sample(
        prompt,
        engine.tokenizer.decode(prompt_ids),
        prompt_ids,
        answer.token_ids,
        engine.tokenizer.decode(answer.token_ids, skip_special_tokens=True),
        answer.logprobs,
        status=STATUS[answer.finish_reason],
        finish_reason=answer.finish_reason,
        policy_versions=[answer.policy_version] * len(answer.token_ids),
        cached_tokens=answer.cached_tokens,
        generate_s=answer.seconds,
    )
