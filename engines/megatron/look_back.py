"""What is computed for a batch before its first update: log-probabilities, values, advantages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from megatron.core import parallel_state
from torch import Tensor

from rollflow.engines.algorithms.config import PolicyConfig
from rollflow.engines.algorithms.diagnostics import advantage_metrics
from rollflow.engines.algorithms.inputs import AdvantageInputs
from rollflow.engines.algorithms.metrics import Metrics, mean_of
from rollflow.engines.algorithms.mismatch import mismatch_metrics
from rollflow.engines.algorithms.policy import compute_advantages, needs
from rollflow.engines.algorithms.returns import whiten

from .batch import MicroBatch
from .forward import all_reduce_data, logprobs_of, reduce_over_ranks, values_of
from .gates import check_mismatch
from .learner import Learner
from .rows import Row


@dataclass(frozen=True)
class Work:
    """A micro-batch and what was computed for it before the first update.

    Tensors are None where the algorithm does not ask for them, and on all pipeline stages but the
    last; old log-probabilities also where the first update's own forward pass gives them.
    """

    batch: MicroBatch
    old_logprobs_M: Tensor | None = None
    ref_logprobs_M: Tensor | None = None
    values_M: Tensor | None = None
    advantages_M: Tensor | None = None
    returns_M: Tensor | None = None


def look_back(
    learner: Learner, work: list[list[Work]], rows: Sequence[Row], step: int
) -> tuple[list[list[Work]], dict[str, float]]:
    """What the models say of the batch as they stand, and the reference; the first gate.

    The policy is asked only where :func:`needs_own_pass` says so; else :func:`agreement` and the gate
    are left to the pass that trains.
    """
    need = needs(learner.algorithm)
    metrics: dict[str, float] = {}
    if need.ref_logprobs:
        assert learner.reference is not None
        with learner.reference.in_place(learner.model):
            work = _each(work, "ref_logprobs_M", partial(_logprobs_of_reference, learner))
    if need.values:
        assert learner.critic is not None
        work = _each(work, "values_M", partial(values_of, learner.critic.model))
    if needs_own_pass(learner):
        work = _each(work, "old_logprobs_M", partial(_logprobs, learner))
        metrics = reduce_over_ranks(_mismatch(work))
        check_agreement(learner, metrics, rows, step)
    return work, metrics


def needs_own_pass(learner: Learner) -> bool:
    """Whether old log-probabilities take a forward pass before the first update.

    With one update a batch, the pass that trains is over the weights that they are of.
    """
    need, trainer = needs(learner.algorithm), learner.trainer
    return need.old_logprobs and (
        trainer.old_logprobs == "always"
        or trainer.updates_per_batch > 1
        or need.old_in_advantages
        or need.values  # a critic that warms up trains no policy
    )


def check_agreement(
    learner: Learner, metrics: Mapping[str, float], rows: Sequence[Row], step: int
) -> None:
    """The gate on ``mismatch/*``, for a batch that one version of the weights sampled."""
    if not any(row.stale for row in rows):
        check_mismatch(learner.gates, learner.model.dtype_name, metrics, step)


def agreement(logprobs_M: Tensor, batch: MicroBatch) -> Metrics:
    """``mismatch/*`` of a micro-batch: the policy's log-probabilities against the rollout's."""
    return mismatch_metrics(logprobs_M, batch.rollout_logprobs_M, batch.weights_M > 0)


def value(
    learner: Learner, work: list[list[Work]], rows: Sequence[Row]
) -> tuple[list[list[Work]], dict[str, float]]:
    """What each token of the whole batch is worth, and what there is to watch of it."""
    metrics, sizes = Metrics(), [len(ws) for ws in work]
    flat = [w for ws in work for w in ws]
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        flat = [_with_advantages(learner, w) for w in flat]
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
            if w.old_logprobs_M is not None and w.batch.teacher_logprobs_M is not None:
                apart_M = w.old_logprobs_M - w.batch.teacher_logprobs_M
                metrics = metrics.merge(Metrics({"train/kl_teacher": mean_of(apart_M[kept_M])}))
    pieces = iter(flat)
    return [[next(pieces) for _ in range(n)] for n in sizes], reduce_over_ranks(metrics)


def _with_advantages(learner: Learner, work: Work) -> Work:
    found = compute_advantages(
        learner.algorithm,
        AdvantageInputs(
            outcomes_T=work.batch.outcomes_M,
            segments_T=work.batch.segments_M,
            old_logprobs_T=work.old_logprobs_M,
            ref_logprobs_T=work.ref_logprobs_M,
            values_T=work.values_M,
            teacher_logprobs_T=work.batch.teacher_logprobs_M,
        ),
    )
    return replace(work, advantages_M=found.advantages_T, returns_M=found.returns_T)


def _each(
    work: list[list[Work]], field: str, look: Callable[[list[MicroBatch]], list[Tensor]]
) -> list[list[Work]]:
    """The work with what ``look`` finds for each micro-batch; only the last stage finds any."""
    done: list[list[Work]] = []
    for ws in work:
        found = look([w.batch for w in ws]) or [None] * len(ws)
        done.append([replace(w, **{field: x}) for w, x in zip(ws, found, strict=True)])
    return done


def _logprobs(learner: Learner, batches: list[MicroBatch]) -> list[Tensor]:
    return logprobs_of(learner.model, batches, learner.temperature)


def _logprobs_of_reference(learner: Learner, batches: list[MicroBatch]) -> list[Tensor]:
    """Another model: its routers choose for themselves."""
    return _logprobs(learner, [batch.routed_freely() for batch in batches])


def _mismatch(work: list[list[Work]]) -> Metrics:
    metrics = Metrics()
    for w in (w for ws in work for w in ws):
        if w.old_logprobs_M is not None:
            metrics = metrics.merge(agreement(w.old_logprobs_M, w.batch))
    return metrics
