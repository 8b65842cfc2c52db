"""Seeds for single requests on a CPU: SGLang's deterministic inference without its CUDA kernels.

By default SGLang ignores a request's ``sampling_seed``. With ``enable_deterministic_inference`` a
token is a pure function of log-probabilities, seed and position, whatever else is in the batch.
On a CPU three parts of that ask for CUDA; they are replaced here.
"""

import numpy as np
import torch


def install() -> None:
    """Make ``enable_deterministic_inference`` work on a CPU.

    Call it before SGLang's arguments are resolved, in each process that SGLang starts from nothing
    or in the one that they are forks of.
    """
    from sglang.srt import batch_invariant_ops, server_args
    from sglang.srt.layers import sampler

    if "torch_native" not in server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES:
        server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.append("torch_native")
    batch_invariant_ops.enable_batch_invariant_mode = _already_batch_invariant
    sampler.murmur_hash32 = murmur_hash32


def murmur_hash32(
    seed_R: torch.Tensor, positions_R: torch.Tensor, columns_V: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3 (32 bits) of (seed, position, column) for each pair, as uint32 [R, V].

    The same bits as SGLang's Triton kernel of this name: the seed counts as two blocks.
    """
    seed = seed_R.numpy().astype(np.uint64)[:, None]
    blocks = (
        (seed & 0xFFFFFFFF).astype(np.uint32),
        (seed >> np.uint64(32)).astype(np.uint32),
        positions_R.numpy().astype(np.uint32)[:, None],
        columns_V.numpy().astype(np.uint32)[None, :],
    )
    h = np.zeros((1, 1), np.uint32)
    for k in blocks:
        k = _rotate(k * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
        h = _rotate(h ^ k, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    h = h ^ np.uint32(4 * len(blocks))
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return torch.from_numpy(h ^ (h >> np.uint32(16)))


def _rotate(x: np.ndarray, bits: int) -> np.ndarray:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))


def _already_batch_invariant(enable_bmm: bool = True) -> None:
    """Nothing to switch: a row's log-probabilities depend on the batch by rounding only."""
