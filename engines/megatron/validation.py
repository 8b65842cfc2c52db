"""The loss of labelled samples under the weights as they are, without training on them."""

import math
from collections.abc import Sequence

from rollflow.engines.algorithms.config import SftConfig
from rollflow.engines.algorithms.metrics import Metrics, mean_of
from rollflow.storage.samples import Sample

from .forward import logprobs_of, reduce_over_ranks
from .learner import Learner
from .rows import make_rows
from .step import cut_micro_batches


def validation_loss(learner: Learner, samples: Sequence[Sample]) -> dict[str, float]:
    """Mean over all trained tokens; every rank calls it with the same samples.

    Returns:
        ``loss`` (nats per token), ``perplexity`` (its exponential), ``tokens``.
    """
    rows = make_rows(samples, SftConfig(), 0)
    batches = cut_micro_batches(learner, rows, SftConfig())
    metrics = Metrics()
    # Empty on all pipeline stages but the last.
    found = logprobs_of(learner.model, batches, temperature=1.0)
    for batch, logprobs_M in zip(batches, found, strict=False):
        metrics = metrics.merge(Metrics({"loss": mean_of(-logprobs_M[batch.weights_M > 0])}))
    [loss] = reduce_over_ranks(metrics).values()
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": float(sum(len(row.trained_m) for row in rows)),
    }
