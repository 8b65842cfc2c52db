"""Passes over micro-batches through megatron-core's schedules: log-probabilities, or gradients."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from rollflow.engines.algorithms.logprobs import target_logprobs
from rollflow.engines.algorithms.metrics import Metrics
from rollflow.engines.cpu.megatron import cuda_means_cpu

from .batch import MicroBatch
from .model import Model
from .model_parts import output_layer, without_output_layer

LossFn = Callable[[int, Tensor, Tensor], tuple[Tensor, Metrics]]
"""(number of the micro-batch, log-probs [M], entropies [M]) -> (its share of the loss, metrics)."""
ValueLossFn = Callable[[int, Tensor], tuple[Tensor, Metrics]]
"""(number of the micro-batch, values [M]) -> (its share of the loss, metrics)."""
_Read = Callable[[MicroBatch, Tensor], tuple[Tensor, ...]]
"""(micro-batch, the model's output at the places it predicts) -> numbers of those places."""


def logprobs_of(
    model: Model, micro_batches: Sequence[MicroBatch], temperature: float
) -> list[Tensor]:
    """Log-probabilities of the trained tokens, [M] for each micro-batch, without a gradient.

    Empty on a rank that does not hold the last pipeline stage.
    """

    def keep(number: int, logprobs_M: Tensor, entropy_M: Tensor) -> tuple[Tensor, Any]:
        return logprobs_M.sum(), logprobs_M.detach()

    # What is compiled with gradients rounds as the training pass does, to which this is compared.
    with torch.set_grad_enabled(model.on_gpu):
        read = _read_logprobs(model, temperature)
        return _run(model, micro_batches, read, keep, forward_only=True)


def values_of(model: Model, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """A critic's values before each trained token, [M] for each micro-batch, without a gradient.

    Empty on a rank that does not hold the last pipeline stage.
    """

    def keep(number: int, values_M: Tensor) -> tuple[Tensor, Any]:
        return values_M.sum(), values_M

    with torch.no_grad():
        return _run(model, micro_batches, _read_values, keep, forward_only=True)


def accumulate_gradients(
    model: Model, micro_batches: Sequence[MicroBatch], temperature: float, loss_fn: LossFn
) -> Metrics:
    """Gradient of the mini-batch's loss, summed over micro-batches and ranks, into the model.

    The metrics are of the micro-batches of this data parallel rank.
    """
    return _accumulate(model, micro_batches, _read_logprobs(model, temperature), loss_fn)


def accumulate_value_gradients(
    model: Model, micro_batches: Sequence[MicroBatch], loss_fn: ValueLossFn
) -> Metrics:
    """The same for a critic."""
    return _accumulate(model, micro_batches, _read_values, loss_fn)


def _accumulate(
    model: Model,
    micro_batches: Sequence[MicroBatch],
    read: _Read,
    loss_fn: Callable[..., tuple[Tensor, Metrics]],
) -> Metrics:
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
        chunk.module.zero_grad(set_to_none=True)
    metrics = Metrics()
    for piece in _run(model, micro_batches, read, loss_fn, forward_only=False):
        metrics = metrics.merge(piece)
    return metrics


def reduce_over_ranks(metrics: Metrics) -> dict[str, float]:
    """The scalars over all ranks that hold data, the same on every rank."""
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    values = [metrics.reduce(all_reduce_data).values() if last else {}]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        pipeline: Any = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast_object_list(
            values,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=pipeline,
        )
    return values[0]


def _read_logprobs(model: Model, temperature: float) -> _Read:
    """Log-probabilities of the next tokens and entropies."""
    vocab_rank = parallel_state.get_tensor_model_parallel_rank()
    split = parallel_state.get_tensor_model_parallel_world_size() > 1

    def read(batch: MicroBatch, output_HX: Tensor) -> tuple[Tensor, Tensor]:
        logits_HV = output_HX
        if model.trained_tokens_only:
            logits_HV = output_layer(model.chunks[-1], output_HX)
        return target_logprobs(
            logits_HV,
            batch.targets_M[batch.held_H],
            temperature=temperature,
            vocab_start=vocab_rank * logits_HV.shape[1],
            vocab_size=model.vocab_size,
            all_reduce=_all_reduce_vocab if split else None,
        )

    return read


def _read_values(batch: MicroBatch, output_H1: Tensor) -> tuple[Tensor]:
    return (output_H1[:, 0].float(),)


def _run(
    model: Model,
    micro_batches: Sequence[MicroBatch],
    read: _Read,
    loss_fn: Callable[..., tuple[Tensor, Any]],
    *,
    forward_only: bool,
) -> list[Any]:
    def loss(number: int, batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, Any]:
        output_TX = output.squeeze(1) if model.trained_tokens_only else output[0]
        held = read(batch, output_TX.index_select(0, batch.places_H))
        share, kept = loss_fn(number, *(_of_all_tokens(own_H, batch) for own_H in held))
        # The count is megatron-core's divisor of a sum over tokens; our weights divide already.
        return share, torch.zeros((), dtype=torch.int, device=share.device), kept

    def forward_step(batches: Iterator[tuple[int, MicroBatch]], chunk: Any) -> tuple[Tensor, Any]:
        number, batch = next(batches)
        inputs: dict[str, Any] = {
            "input_ids": batch.tokens_T[None],
            "position_ids": batch.packed.positions_T[None],
            "attention_mask": None,
            "packed_seq_params": batch.packed,
        }
        if not model.trained_tokens_only:
            return chunk(**inputs), partial(loss, number, batch)
        if model.dtype is torch.bfloat16:
            inputs["fp32_output"] = False
        with without_output_layer(chunk):
            output_T1D = chunk(**inputs)
        return output_T1D, partial(loss, number, batch)

    for chunk in model.chunks:
        chunk.config.finalize_model_grads_func = _finalize
    iterators = [iter(list(enumerate(micro_batches))) for _ in model.chunks]
    with cuda_means_cpu():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=model.chunks,
            num_microbatches=len(micro_batches),
            seq_length=max(len(batch.tokens_T) for batch in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _of_all_tokens(own_H: Tensor, batch: MicroBatch) -> Tensor:
    """What the context parallel ranks computed for their tokens, as [M] on each of them.

    Each then computes the whole loss of the micro-batch, and its gradient reaches its own tokens.
    """
    if parallel_state.get_context_parallel_world_size() == 1:
        return own_H
    others_M = own_H.new_zeros(len(batch.targets_M))
    others_M[batch.held_H] = own_H.detach()
    dist.all_reduce(others_M, group=parallel_state.get_context_parallel_group())
    return others_M.index_put((batch.held_H,), own_H)


def _finalize(chunks: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
    finalize_model_grads(chunks, None, **options)


def _all_reduce_vocab(tensor: Tensor, op: Literal["sum", "max"]) -> None:
    group = parallel_state.get_tensor_model_parallel_group()
    dist.all_reduce(tensor, _OPS[op], group=group)


def all_reduce_data(tensor: Tensor, op: Literal["sum", "max"]) -> None:
    """Reduce a tensor in place over the ranks that hold other samples.

    Context parallel ranks have the same numbers, of all tokens.
    """
    dist.all_reduce(tensor, _OPS[op], group=parallel_state.get_data_parallel_group())


_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
