"""A generate function that makes samples out of labels and conversations: supervised fine-tuning."""

from functools import partial
from typing import Any

from rollflow.engines.hooks import GenerateContext, GenerateEngine
from rollflow.storage.samples import Message, Prompt, Sample, Status

from .conversation import spans, tokens


async def generate(engine: GenerateEngine, prompt: Prompt, context: GenerateContext) -> Sample:
    """Answer with the label and the end-of-text token; no server is asked.

    A prompt without a label that is a list of messages is learned turn by turn: each message of the
    assistant, unless it has ``step_loss_mask = 0``. Log-probabilities are 0.0: nothing was sampled.
    Raises ValueError for a prompt with neither.
    """
    if prompt.label is None:
        if not isinstance(prompt.prompt, str):
            return _turns(engine, prompt, prompt.prompt, context)
        raise ValueError(
            f"prompt {prompt.prompt_id} has no label to learn from; set data.label_key to its column"
        )
    prompt_ids = engine.encode(prompt)
    response_ids = engine.tokenizer.encode(prompt.label, add_special_tokens=False)
    if engine.tokenizer.eos_token_id is not None:
        response_ids.append(engine.tokenizer.eos_token_id)
    return _sample(
        engine.tokenizer, prompt, context, prompt_ids, response_ids, [True] * len(response_ids)
    )


def _turns(
    engine: GenerateEngine, prompt: Prompt, messages: list[Message], context: GenerateContext
) -> Sample:
    tokenizer = engine.tokenizer
    try:
        render = partial(engine.render, prompt)
        text, turns = spans(messages, render, tokenizer.eos_token or "")
    except ValueError as error:
        raise ValueError(f"prompt {prompt.prompt_id}: {error}") from error
    encoded = tokens(text, turns, lambda piece: tokenizer.encode(piece, add_special_tokens=False))
    return _sample(tokenizer, prompt, context, *encoded)


def _sample(
    tokenizer: Any,
    prompt: Prompt,
    context: GenerateContext,
    prompt_ids: list[int],
    response_ids: list[int],
    loss_mask: list[bool],
) -> Sample:
    return context.sample(
        prompt,
        tokenizer.decode(prompt_ids),
        prompt_ids,
        response_ids,
        prompt.label if prompt.label is not None else tokenizer.decode(response_ids),
        [0.0] * len(response_ids),
        loss_mask=loss_mask,
        status=Status.COMPLETED,
        finish_reason="stop",
    )
