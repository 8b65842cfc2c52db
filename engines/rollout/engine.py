"""What a generate hook works with: the tokenizer, the prompt's tokens, and the servers."""

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rollflow.engines.hooks import Completion
from rollflow.engines.rewards.remote import URL as REWARD_URL
from rollflow.storage.config import DataConfig
from rollflow.storage.samples import Message, Prompt

from .client import GenerateClient

TOOLS = "tools"
"""Key in a prompt's metadata: what the chat template tells the model that it may call."""
ENCODED = 512
"""Texts whose tokens are kept: all samples of a group ask for those of one."""


class RolloutEngine:
    """A :class:`~rollflow.engines.hooks.GenerateEngine` for the prompts of one dataset."""

    def __init__(
        self,
        tokenizer: Any,
        data: DataConfig,
        client: GenerateClient | None,
        *,
        routed_experts: bool = False,
        together: bool = False,
    ) -> None:
        """``together``: requests of a group that come at the same moment go to a server as one."""
        self.tokenizer = tokenizer
        self._encode = lru_cache(ENCODED)(self._encoded)
        self._routed_experts = routed_experts
        self._together = together
        self._data = data
        self._client = client

    @property
    def judge_url(self) -> str:
        """Where ``rollout.judge`` answers; empty where there is none."""
        return os.environ.get(REWARD_URL, "")

    @property
    def template(self) -> str:
        """Digest of the chat template that renders the prompts; empty for plain text."""
        if not self._data.apply_chat_template:
            return ""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:12]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. ValueError for messages without a chat template."""
        if isinstance(prompt.prompt, str) and not self._data.apply_chat_template:
            return [*self._encode(prompt.prompt)]
        text = self.render(prompt, _messages(prompt))
        return [*self._encode(text, add_special_tokens=False)]

    def _encoded(self, text: str, **how: Any) -> list[int]:
        return self.tokenizer.encode(text, **how)

    def render(
        self, prompt: Prompt, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> str:
        """Text of messages by the chat template; the prompt's metadata may have ``tools`` for it.

        ValueError where the settings ask for no template.
        """
        if not self._data.apply_chat_template:
            raise ValueError(
                f"prompt {prompt.prompt_id} is a list of messages; "
                "set data.apply_chat_template = true to render it"
            )
        return self.tokenizer.apply_chat_template(
            list(messages),
            tools=prompt.metadata.get(TOOLS),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self._data.chat_template_kwargs,
        )

    def reject(self, prompt: Prompt) -> str | None:
        """Why a prompt cannot be used, or None: it is longer than ``max_prompt_tokens``."""
        limit = self._data.max_prompt_tokens
        if limit is None or (tokens := len(self.encode(prompt))) <= limit:
            return None
        return f"prompt has {tokens} tokens, more than max_prompt_tokens = {limit}"

    async def generate(
        self, input_ids: list[int], sampling: dict[str, Any], seed: int
    ) -> Completion:
        """Continue ``input_ids``; RuntimeError where the run has no servers."""
        if self._client is None:
            raise RuntimeError("rollout.servers = 0: there is no engine to generate with")
        return await self._client.generate(
            input_ids,
            sampling,
            seed,
            routed_experts=self._routed_experts,
            together=self._together,
        )


def _messages(prompt: Prompt) -> list[Message]:
    if isinstance(prompt.prompt, str):
        return [{"role": "user", "content": prompt.prompt}]
    return prompt.prompt
