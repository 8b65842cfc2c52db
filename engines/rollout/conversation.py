"""A finished conversation as tokens, and which of them the assistant wrote."""

from collections.abc import Callable, Sequence

from rollflow.storage.samples import Message

TRAINED = "step_loss_mask"
"""Key of an assistant's message: 0 where it is read, not learned. slime's name."""


class TemplateError(ValueError):
    """The chat template renders earlier turns differently once later ones follow."""


def spans(
    messages: Sequence[Message], render: Callable[..., str], eos: str
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and find the assistant's turns in it.

    Args:
        messages: the whole conversation.
        render: ``render(messages, add_generation_prompt=...)`` gives their text.
        eos: text of the end-of-turn token; "" where there is none.

    Returns:
        The text, and (start, stop) of each turn to learn, in characters: from where generation
        would begin up to and with the end-of-turn token.

    Raises:
        TemplateError: a turn is not where its own beginning says.
        ValueError: there is no turn to learn.
    """
    text = render(messages, add_generation_prompt=False)
    found: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get(TRAINED, 1):
            continue
        before = render(messages[:i], add_generation_prompt=True)
        if not text.startswith(before):
            raise TemplateError(
                f"message {i}: the chat template renders what precedes it differently in the whole "
                "conversation; give each turn as a row of its own"
            )
        found.append((len(before), _stop(text, messages[: i + 1], len(before), render, eos)))
    if not found:
        raise ValueError(
            "no message to learn: none has the role 'assistant'"
            f" (or all have {TRAINED} = 0); add one, or give a label"
        )
    return text, found


def tokens(
    text: str, turns: Sequence[tuple[int, int]], encode: Callable[[str], list[int]]
) -> tuple[list[int], list[int], list[bool]]:
    """Encode piece by piece, as generation would see it.

    Returns:
        Tokens before the first turn, R tokens from there on, and for each of these whether it is
        the assistant's own.
    """
    prompt_ids = encode(text[: turns[0][0]])
    response_ids: list[int] = []
    mask: list[bool] = []
    stops = [start for start, _ in turns[1:]] + [turns[-1][1]]
    for (start, stop), end in zip(turns, stops, strict=True):
        for piece, own in ((text[start:stop], True), (text[stop:end], False)):
            ids = encode(piece) if piece else []
            response_ids += ids
            mask += [own] * len(ids)
    return prompt_ids, response_ids, mask


def _stop(
    text: str, messages: Sequence[Message], start: int, render: Callable[..., str], eos: str
) -> int:
    """Where the last of ``messages``, whose turn begins at ``start``, ends in the whole text."""
    through = render(messages, add_generation_prompt=False)
    if text.startswith(through):
        end = text.rfind(eos, start, len(through)) if eos else -1
        return end + len(eos) if end >= 0 else len(through)
    end = text.find(eos, start) if eos else -1
    if end < 0:
        raise TemplateError(
            f"message {len(messages) - 1}: its end cannot be found in the rendered conversation; "
            "give each turn as a row of its own"
        )
    return end + len(eos)
