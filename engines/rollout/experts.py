"""The experts that a server sent each token to, as it tells them and as a sample keeps them.

Rows stand for all tokens but the last, from the prompt's first: [tokens - 1, layers, experts per
token], see ``Sample.routed_experts``.
"""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from rollflow.storage.samples import EXPERTS_DTYPE

SWITCH = "enable_return_routed_experts"
"""Of SGLang's arguments: the servers keep what their routers choose."""
ASKING = "rollflow-experts-"
"""Begins the id of a request that asks for them: the router drops the field that would ask."""
TOLD_DTYPE = "<i4"
"""As servers tell them, in base64."""


def ask_by_id() -> None:
    """In a server's process, before it is launched: answer such requests with experts."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    normalize = GenerateReqInput.normalize_batch_and_arguments

    def normalize_as_asked(self: Any) -> None:
        if isinstance(self.rid, str) and self.rid.startswith(ASKING):
            self.return_routed_experts = True
        normalize(self)

    GenerateReqInput.normalize_batch_and_arguments = normalize_as_asked


def told_experts(meta: Mapping[str, Any], rows: int) -> bytes:
    """What an answer's ``meta_info`` tells of ``rows`` tokens.

    Raises:
        ValueError: nothing, or of another number of tokens.
    """
    told = np.frombuffer(base64.b64decode(meta.get("routed_experts") or ""), TOLD_DTYPE)
    if not told.size or told.size % rows:
        raise ValueError(f"{told.size} routed experts for {rows} tokens")
    if told.min() < 0:
        raise ValueError(f"a token of {rows} went to no expert")
    return told.astype(EXPERTS_DTYPE).tobytes()


def went_on(first: bytes | None, second: bytes | None) -> bytes | None:
    """The experts of an answer that was cut off and went on: each token's as it was first computed
    from. ``second`` tells of all tokens, those of the first part as they were computed again."""
    if first is None or second is None:
        return first or second
    return first + second[len(first) :]
