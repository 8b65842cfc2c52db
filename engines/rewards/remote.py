"""Reward models that somebody else serves: one POST a sample."""

import os
from typing import Any, cast

import httpx

from rollflow.storage.samples import Sample

URL = "ROLLFLOW_REWARD_URL"
"""Environment variable: where :func:`remote` and :func:`sglang` ask. With ``rollout.judge`` it is the
judge's."""
TIMEOUT_S = 30.0
"""Of one request; ``rollout.reward_timeout_s`` bounds the whole call."""


async def remote(sample: Sample) -> Any:
    """POST prompt, response, label and metadata as JSON; the answer is the reward.

    A number, or an object with ``reward`` and named parts. Raises ValueError where the environment
    names no URL, httpx.HTTPError where the service refuses or does not answer.
    """
    return await _post(
        _url(),
        {
            "prompt": sample.prompt_text,
            "response": sample.response_text,
            "label": sample.label,
            "metadata": sample.metadata,
        },
    )


async def sglang(sample: Sample) -> float:
    """The score that a reward model gives, served by SGLang (``--is-embedding``).

    It is asked with the text of prompt and response together; where it gives several numbers the
    last is the score. A server is asked at ``/classify``; its router, which does not pass that on,
    at ``/v1/embeddings``. Raises as :func:`remote` does.
    """
    url, text = _url(), sample.prompt_text + sample.response_text
    try:
        answer = await _post(f"{url}/classify", {"text": text})
    except httpx.HTTPStatusError as error:
        if error.response.status_code != 404:
            raise
        answer = (await _post(f"{url}/v1/embeddings", {"input": text, "model": "default"}))["data"]
    scored: Any = cast(list[Any], answer)[0] if isinstance(answer, list) else answer
    return float(scored["embedding"][-1])


async def _post(url: str, body: dict[str, Any]) -> Any:
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        response = await client.post(url, json=body)
        response.raise_for_status()
        return response.json()


def _url() -> str:
    if not (url := os.environ.get(URL)):
        raise ValueError(f"{URL} is not set; give the URL of the reward model's service")
    return url.rstrip("/")
