"""The weights that a live rank holds."""

from rollflow.engines.megatron.actor import TrainerRank
from rollflow.engines.megatron.export import export_weights


def weights_of_rank(rank: TrainerRank | None) -> dict:
    """Copies under Hugging Face names, as numpy arrays; every rank of a model takes part."""
    assert rank is not None
    model = rank._rank_live._learner.model
    return {name: tensor.cpu().numpy().copy() for name, tensor in export_weights(model)}
