"""One training step: everything that happens to a committed batch.

The step is a function of (weights, optimizer, samples, settings) alone. Supervised and policy
losses take the same way; the algorithm says what it needs.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from rollflow.engines.algorithms.config import AlgorithmConfig, PolicyConfig
from rollflow.engines.algorithms.diagnostics import advantage_metrics, derive, group_metrics
from rollflow.engines.algorithms.metrics import Metrics
from rollflow.engines.algorithms.mismatch import mismatch_metrics
from rollflow.engines.algorithms.policy import (
    AdvantageFn,
    AdvantageInputs,
    LossFn,
    LossInputs,
    compute_advantages,
    compute_loss,
    needs,
)
from rollflow.engines.algorithms.returns import whiten
from rollflow.storage.samples import Sample

from .batch import MicroBatch, Row, cut_mini_batches, make_micro_batches, make_rows, scored_rewards
from .config import GatesConfig, TrainerConfig
from .forward import accumulate_gradients, all_reduce_data, logprobs_of, reduce_over_ranks
from .gates import check_first_update, check_mismatch
from .model import Model
from .optimizer import update
from .parallel import row_layout
from .reference import Reference


@dataclass(frozen=True)
class Learner:
    """What a step works on and by which rules."""

    model: Model
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    reference: Reference | None
    """The run's first weights; only where the loss has a KL term."""
    algorithm: AlgorithmConfig
    trainer: TrainerConfig
    gates: GatesConfig
    temperature: float
    """Of the rollout's sampling: log-probabilities are of the distribution it drew from."""
    device: str
    own_advantage: AdvantageFn | None = None
    """The function that ``algorithm.advantage`` names, where it names one."""
    own_loss: LossFn | None = None


@dataclass(frozen=True)
class _Work:
    """A micro-batch and what was computed for it before the first update."""

    batch: MicroBatch
    old_logprobs_M: Tensor | None = None
    ref_logprobs_M: Tensor | None = None
    advantages_M: Tensor | None = None


def train_on(learner: Learner, samples: Sequence[Sample], step: int) -> dict[str, float]:
    """Train on one batch, whose samples the weights of version ``step`` generated.

    Every rank calls it with the same samples and gets the same metrics, by slash name.

    Raises:
        GateError: trainer and rollout disagree, a first ratio is not 1, or a gradient is not finite.
        ValueError: no sample can be trained on, or there are fewer groups than updates.
    """
    started = time.perf_counter()
    rows = make_rows(samples, learner.algorithm, step, learner.own_advantage)
    if not rows:
        raise ValueError(
            f"step {step}: none of the batch's {len(samples)} samples can be trained on; all "
            "failed, lack a reward or have no trained token"
        )
    mini_batches = cut_mini_batches(rows, learner.trainer.updates_per_batch)
    work = [_start(learner, mini_batch) for mini_batch in mini_batches]
    work, metrics = _look_back(learner, work, rows, step)
    if needs(learner.algorithm).old_logprobs:
        work, found = _value(learner, work, rows)
        metrics |= found | group_metrics(scored_rewards(samples), [s.group_id for s in samples])
    old_logprob_s = time.perf_counter() - started
    metrics |= _updates(learner, work, step)
    metrics = derive(metrics)
    train_s = time.perf_counter() - started
    tokens = sum(len(row.tokens_t) for row in rows)
    return metrics | {
        "train/tokens": float(sum(len(row.trained_m) for row in rows)),
        "train/samples_skipped": float(len(samples) - len(rows)),
        "perf/old_logprob_s": old_logprob_s,
        "perf/train_s": train_s,
        "perf/train_tokens_per_s": tokens / train_s,
    }


def _start(learner: Learner, mini_batch: Sequence[Row]) -> list[_Work]:
    batches = make_micro_batches(
        mini_batch,
        learner.algorithm,
        rank=parallel_state.get_data_parallel_rank(),
        ranks=parallel_state.get_data_parallel_world_size(),
        max_tokens=learner.trainer.max_tokens_per_micro_batch,
        device=learner.device,
        layout=row_layout(learner.model),
        cost=learner.model.cost_of_row,
    )
    return [_Work(batch) for batch in batches]


def _look_back(
    learner: Learner, work: list[list[_Work]], rows: Sequence[Row], step: int
) -> tuple[list[list[_Work]], dict[str, float]]:
    """Log-probabilities under the weights as they stand, and under the reference; the first gate."""
    need = needs(learner.algorithm)
    metrics: dict[str, float] = {}
    if need.ref_logprobs:
        assert learner.reference is not None
        with learner.reference.in_place(learner.model):
            found = _logprobs(learner, work)
        work = [
            [replace(w, ref_logprobs_M=x) for w, x in zip(ws, xs, strict=True)]
            for ws, xs in zip(work, found, strict=True)
        ]
    if need.old_logprobs:
        found = _logprobs(learner, work)
        work = [
            [replace(w, old_logprobs_M=x) for w, x in zip(ws, xs, strict=True)]
            for ws, xs in zip(work, found, strict=True)
        ]
        metrics = reduce_over_ranks(_mismatch(work))
        if not any(row.stale for row in rows):
            check_mismatch(learner.gates, learner.model.dtype_name, metrics, step)
    return work, metrics


def _value(
    learner: Learner, work: list[list[_Work]], rows: Sequence[Row]
) -> tuple[list[list[_Work]], dict[str, float]]:
    """What each token of the whole batch is worth, and what there is to watch of it."""
    metrics, sizes = Metrics(), [len(ws) for ws in work]
    flat = [w for ws in work for w in ws]
    if all(w.old_logprobs_M is not None for w in flat):  # on the last pipeline stage
        flat = [replace(w, advantages_M=_advantages(learner, w)) for w in flat]
        if isinstance(learner.algorithm, PolicyConfig) and learner.algorithm.whiten:
            whitened = whiten(
                [w.advantages_M for w in flat if w.advantages_M is not None],
                [w.batch.weights_M > 0 for w in flat],
                all_reduce_data,
            )
            flat = [replace(w, advantages_M=a) for w, a in zip(flat, whitened, strict=True)]
        mean_reward = sum(row.reward for row in rows) / len(rows)
        for w in flat:
            kept_M = w.batch.weights_M > 0
            assert w.advantages_M is not None
            metrics = metrics.merge(
                advantage_metrics(w.advantages_M[kept_M], w.batch.rewards_M[kept_M], mean_reward)
            )
    pieces = iter(flat)
    return [[next(pieces) for _ in range(n)] for n in sizes], reduce_over_ranks(metrics)


def _advantages(learner: Learner, work: _Work) -> Tensor:
    return compute_advantages(
        learner.algorithm,
        AdvantageInputs(
            outcomes_T=work.batch.outcomes_M,
            segments_T=work.batch.segments_M,
            old_logprobs_T=work.old_logprobs_M,
            ref_logprobs_T=work.ref_logprobs_M,
            teacher_logprobs_T=work.batch.teacher_logprobs_M,
        ),
    ).advantages_T


def _logprobs(learner: Learner, work: list[list[_Work]]) -> list[list[Tensor | None]]:
    found: list[list[Tensor | None]] = []
    for ws in work:
        batches = [w.batch for w in ws]
        # Only the last pipeline stage has any.
        logprobs = logprobs_of(learner.model, batches, learner.temperature)
        found.append([*logprobs] if logprobs else [None] * len(ws))
    return found


def _mismatch(work: list[list[_Work]]) -> Metrics:
    metrics = Metrics()
    for w in (w for ws in work for w in ws):
        if w.old_logprobs_M is not None:
            trained_M = w.batch.weights_M > 0
            rollout_M = w.batch.rollout_logprobs_M
            metrics = metrics.merge(mismatch_metrics(w.old_logprobs_M, rollout_M, trained_M))
    return metrics


def _updates(learner: Learner, work: list[list[_Work]], step: int) -> dict[str, float]:
    """One optimizer update for each mini-batch; metrics are over all of them."""
    total = Metrics()
    norms: list[float] = []
    rate = 0.0
    for number, ws in enumerate(work):

        def loss(
            i: int, logprobs_M: Tensor, entropy_M: Tensor, ws: list[_Work] = ws
        ) -> tuple[Tensor, Metrics]:
            return _loss(learner, ws[i], logprobs_M, entropy_M)

        batches = [w.batch for w in ws]
        piece = accumulate_gradients(learner.model, batches, learner.temperature, loss)
        if number == 0 and needs(learner.algorithm).old_logprobs:
            check_first_update(reduce_over_ranks(piece), step)
        norm, rate = update(learner.optimizer, learner.scheduler, step)
        norms.append(norm)
        total = total.merge(piece)
    return reduce_over_ranks(total) | {
        "train/grad_norm": sum(norms) / len(norms),
        "train/lr": rate,
    }


def _loss(
    learner: Learner, work: _Work, logprobs_M: Tensor, entropy_M: Tensor
) -> tuple[Tensor, Metrics]:
    policy = needs(learner.algorithm).old_logprobs
    return compute_loss(
        learner.algorithm,
        LossInputs(
            logprobs_T=logprobs_M,
            weights_T=work.batch.weights_M,
            entropy_T=entropy_M,
            advantages_T=work.advantages_M,
            old_logprobs_T=work.old_logprobs_M,
            ref_logprobs_T=work.ref_logprobs_M,
            rollout_logprobs_T=work.batch.rollout_logprobs_M if policy else None,
            segments_T=work.batch.segments_M,
        ),
        learner.own_loss,
    )
