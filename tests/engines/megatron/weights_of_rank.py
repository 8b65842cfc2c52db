"""The weights and gradients that a live rank holds."""

from rollflow.engines.megatron.actor import TrainerRank
from rollflow.engines.megatron.export import export_weights


def weights_of_rank(rank: TrainerRank | None) -> dict:
    """Copies under Hugging Face names, as numpy arrays; every rank of a model takes part."""
    assert rank is not None
    model = rank._rank_live._learner.model
    return {name: tensor.cpu().numpy().copy() for name, tensor in export_weights(model)}


def gradients_of_rank(rank: TrainerRank | None) -> dict:
    """The gradients that stand after a step, summed over ranks, as the weights they belong to.

    Exporting is linear in the weights, so what holds the gradients comes out under their names.
    """
    assert rank is not None
    model = rank._rank_live._learner.model
    parameters = [p for chunk in model.chunks for p in chunk.parameters()]
    held = [p.data for p in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.main_grad.clone()
        return weights_of_rank(rank)
    finally:
        for parameter, data in zip(parameters, held, strict=True):
            parameter.data = data
