"""The same batch gives the same weights again, bit for bit, also on a GPU."""

import os

import torch


def require_determinism() -> None:
    """Let this process use deterministic kernels alone; call it before anything is computed.

    An operation that has no such kernel raises RuntimeError from here on. Flash attention's
    backward pass is the one that pays for it: it no longer adds up in the order of arrival.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Nothing reads memory that it has not written; filling it would cost a write of all.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
