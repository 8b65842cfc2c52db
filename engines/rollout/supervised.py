"""A generate function that makes samples out of the labels: supervised fine-tuning."""

from rollflow.engines.hooks import GenerateContext, GenerateEngine
from rollflow.storage.samples import Prompt, Sample, Status


async def generate(engine: GenerateEngine, prompt: Prompt, context: GenerateContext) -> Sample:
    """Answer with the label and the end-of-text token; no server is asked.

    Log-probabilities are 0.0: nothing was sampled. Raises ValueError for a prompt without a label.
    """
    if prompt.label is None:
        raise ValueError(
            f"prompt {prompt.prompt_id} has no label to learn from; set data.label_key to its column"
        )
    prompt_ids = engine.encode(prompt)
    response_ids = engine.tokenizer.encode(prompt.label, add_special_tokens=False)
    if engine.tokenizer.eos_token_id is not None:
        response_ids.append(engine.tokenizer.eos_token_id)
    return context.sample(
        prompt,
        engine.tokenizer.decode(prompt_ids),
        prompt_ids,
        response_ids,
        prompt.label,
        [0.0] * len(response_ids),
        status=Status.COMPLETED,
        finish_reason="stop",
    )
