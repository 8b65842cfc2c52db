"""One training step: everything that happens to a committed batch.

The step is a function of (weights, optimizer, samples, settings) alone. Supervised and policy
losses take the same way; the algorithm says what it needs.
"""

import time
from collections.abc import Sequence

from megatron.core import parallel_state
from torch import Tensor

from rollflow.engines.algorithms.config import AlgorithmConfig
from rollflow.engines.algorithms.diagnostics import derive, group_metrics
from rollflow.engines.algorithms.inputs import LossInputs, ValueInputs
from rollflow.engines.algorithms.metrics import Metrics
from rollflow.engines.algorithms.policy import compute_loss, compute_value_loss, needs
from rollflow.storage.samples import Sample

from .batch import MicroBatch, make_micro_batches
from .critic import Critic
from .forward import accumulate_gradients, accumulate_value_gradients, reduce_over_ranks
from .gates import check_first_update
from .learner import Learner
from .look_back import Work, agreement, check_agreement, look_back, needs_own_pass, value
from .optimizer import update
from .parallel import row_layout
from .router_replay import experts_of
from .rows import Row, cut_mini_batches, make_rows, scored_rewards


def train_on(learner: Learner, samples: Sequence[Sample], step: int) -> dict[str, float]:
    """Train on one batch, whose samples the weights of version ``step`` generated.

    Every rank calls it with the same samples and gets the same metrics, by slash name.

    Raises:
        GateError: trainer and rollout disagree, a first ratio is not 1, or a gradient is not finite.
        ValueError: no sample can be trained on, or there are fewer groups than updates.
    """
    started = time.perf_counter()
    experts = experts_of(learner.model.bridge.config) if learner.trainer.router_replay else None
    rows = make_rows(samples, learner.algorithm, step, learner.own_advantage, experts)
    if not rows:
        raise ValueError(
            f"step {step}: none of the batch's {len(samples)} samples can be trained on; all "
            "failed, lack a reward or have no trained token"
        )
    mini_batches = cut_mini_batches(rows, learner.trainer.updates_per_batch)
    work = [
        [Work(batch) for batch in cut_micro_batches(learner, mini_batch, learner.algorithm)]
        for mini_batch in mini_batches
    ]
    work, metrics = look_back(learner, work, rows, step)
    if needs(learner.algorithm).old_logprobs:
        work, found = value(learner, work, rows)
        groups, episodes = [s.group_id for s in samples], [s.episode_id for s in samples]
        metrics |= found | group_metrics(scored_rewards(samples), groups, episodes)
    old_logprob_s = time.perf_counter() - started
    if learner.critic is not None:
        metrics |= _update_critic(learner.critic, work, step)
    if learner.critic is None or step >= learner.critic.config.warmup_steps:
        metrics |= _updates(learner, work, rows, step)
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


def cut_micro_batches(
    learner: Learner, rows: Sequence[Row], algorithm: AlgorithmConfig
) -> list[MicroBatch]:
    """This rank's share of the rows, by the trainer's budget of tokens."""
    return make_micro_batches(
        rows,
        algorithm,
        rank=parallel_state.get_data_parallel_rank(),
        ranks=parallel_state.get_data_parallel_world_size(),
        max_tokens=learner.trainer.max_tokens_per_micro_batch,
        device=learner.device,
        layout=row_layout(learner.model),
        cost=learner.model.cost_of_row,
    )


def _update_critic(critic: Critic, work: list[list[Work]], step: int) -> dict[str, float]:
    """One update of the critic for each mini-batch, towards the returns found before the first."""
    total = Metrics()
    norms: list[float] = []
    for ws in work:

        def loss(i: int, values_M: Tensor, ws: list[Work] = ws) -> tuple[Tensor, Metrics]:
            w = ws[i]
            assert w.values_M is not None and w.returns_M is not None
            return compute_value_loss(
                critic.config, ValueInputs(values_M, w.values_M, w.returns_M, w.batch.weights_M)
            )

        piece = accumulate_value_gradients(critic.model, [w.batch for w in ws], loss)
        norms.append(update(critic.optimizer, critic.scheduler, step)[0])
        total = total.merge(piece)
    return reduce_over_ranks(total) | {"critic/grad_norm": sum(norms) / len(norms)}


def _updates(
    learner: Learner, work: list[list[Work]], rows: Sequence[Row], step: int
) -> dict[str, float]:
    """One optimizer update for each mini-batch; metrics are over all of them."""
    policy, before = needs(learner.algorithm).old_logprobs, needs_own_pass(learner)
    # Labels were not sampled: their likelihood is the model's own.
    temperature = learner.temperature if policy else 1.0
    total = Metrics()
    norms: list[float] = []
    rate = 0.0
    for number, ws in enumerate(work):

        def loss(
            i: int, logprobs_M: Tensor, entropy_M: Tensor, ws: list[Work] = ws
        ) -> tuple[Tensor, Metrics]:
            return _loss(learner, ws[i], logprobs_M, entropy_M)

        batches = [w.batch for w in ws]
        piece = accumulate_gradients(learner.model, batches, temperature, loss)
        if number == 0 and policy:
            found = reduce_over_ranks(piece)
            check_first_update(found, step)
            if not before:
                check_agreement(learner, found, rows, step)
        norm, rate = update(learner.optimizer, learner.scheduler, step)
        norms.append(norm)
        total = total.merge(piece)
    return reduce_over_ranks(total) | {
        "train/grad_norm": sum(norms) / len(norms),
        "train/grad_norm_max": max(norms),
        "train/lr": rate,
    }


def _loss(
    learner: Learner, work: Work, logprobs_M: Tensor, entropy_M: Tensor
) -> tuple[Tensor, Metrics]:
    policy = needs(learner.algorithm).old_logprobs
    old_M, watched = work.old_logprobs_M, Metrics()
    if policy and old_M is None:  # these weights are the old ones: the batch has one update
        old_M = logprobs_M.detach()
        watched = agreement(old_M, work.batch)
    loss, metrics = compute_loss(
        learner.algorithm,
        LossInputs(
            logprobs_T=logprobs_M,
            weights_T=work.batch.weights_M,
            entropy_T=entropy_M,
            advantages_T=work.advantages_M,
            old_logprobs_T=old_M,
            ref_logprobs_T=work.ref_logprobs_M,
            rollout_logprobs_T=work.batch.rollout_logprobs_M if policy else None,
            segments_T=work.batch.segments_M,
        ),
        learner.own_loss,
    )
    return loss, metrics.merge(watched)
