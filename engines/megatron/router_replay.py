"""Router replay: layers with a mixture of experts send each token where the servers sent it.

Trainer and servers compute a router's scores with different roundings, and after a tie goes another
way a token passes through other experts. With the servers' choice stored in the samples, the
trainer's router keeps its scores, and their gradient, but not its choice
(https://arxiv.org/abs/2510.11370).

The choice travels with the packed row that every layer is given. So a layer finds the right one in
whatever order micro-batches are run forward, backward and, under recomputation, forward again.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from .rows import Experts

SETTING = "moe_enable_routing_replay"
"""Of megatron-core: each router gets an object that can answer in its place."""


def experts_of(config: Any) -> Experts:
    """Those of megatron-core's TransformerConfig.

    Raises:
        ValueError: the model has no experts.
    """
    if config.num_moe_experts is None:
        raise ValueError(
            "trainer.router_replay = true with a dense model: it has no router; set it to false"
        )
    return Experts(config.num_layers, config.moe_router_topk, config.num_moe_experts)


def replay_routers(chunks: list[Any]) -> None:
    """Have the routers of a model that was built with ``SETTING`` follow the packed rows."""
    RouterReplay.clear_global_router_replay_instances()  # each is known by its router
    for chunk in chunks:
        for layer in chunk.modules():
            if isinstance(getattr(getattr(layer, "mlp", None), "router", None), TopKRouter):
                layer.register_forward_pre_hook(_follow, with_kwargs=True)


def on_the_row(experts_SLK: Tensor, source_T: Tensor) -> Tensor:
    """The choice for each token of a rank's row, [T, layers, experts per token].

    ``source_T`` says where each token stands among the ``S`` of all samples, -1 for padding, which
    goes to the first experts.
    """
    any_K = torch.arange(experts_SLK.shape[2], dtype=experts_SLK.dtype)
    real_T = (source_T >= 0)[:, None, None]
    return torch.where(real_T, experts_SLK[source_T.clamp(min=0)], any_K)


def _follow(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a layer is run: its router answers as the row says, or by itself."""
    router = layer.mlp.router
    experts_TLK = kwargs["packed_seq_params"].experts_TLK
    if experts_TLK is None:
        router.router_replay.clear_router_replay_action()
        return
    chosen_TK = experts_TLK[:, router.layer_number - 1]
    if router.config.sequence_parallel:  # each tensor parallel rank has a part of the row
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        chosen_TK = chosen_TK.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
    router.router_replay.target_topk_idx = chosen_TK.long()
    router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
