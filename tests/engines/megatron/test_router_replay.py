"""The trainer's routers choose what a server's chose. One SGLang server behind the router tells."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from safetensors.torch import load_file, save_file

from rollflow.engines.algorithms.config import GrpoConfig
from rollflow.engines.checksums import server_name
from rollflow.engines.config import ModelConfig
from rollflow.engines.megatron.config import TrainerConfig
from rollflow.engines.megatron.router_replay import on_the_row
from rollflow.engines.megatron.rows import Experts, sample_experts
from rollflow.engines.rollout.client import GenerateClient
from rollflow.engines.rollout.experts import SWITCH, went_on
from rollflow.engines.rollout.ports import PortLease
from rollflow.engines.rollout.process import OwnedProcess
from rollflow.engines.rollout.router import Router
from rollflow.engines.rollout.server import wait_until_up
from rollflow.engines.rollout.server_args import server_arguments
from rollflow.engines.weights import push
from rollflow.storage.manifests import find_batch
from rollflow.storage.samples import EXPERTS_DTYPE

EXPERTS = Experts(layers=3, per_token=2, count=4)
LONG = {"max_new_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("qwen3_moe", num_hidden_layers=EXPERTS.layers)


@pytest.fixture(scope="module")
def generated(model, make_samples, tmp_path_factory):
    """(samples that a server generated, an answer that was stopped on the way and went on).

    The server was pushed the model's weights first, and told their checksums back.
    """
    return asyncio.run(_generate(model, make_samples(0), tmp_path_factory.mktemp("server")))


async def _generate(model, samples, folder):
    lease = PortLease()
    url = f"http://127.0.0.1:{lease.port}"
    table = {SWITCH: True, "skip_tokenizer_init": True, "weight_version": "0"}
    arguments = server_arguments(
        ModelConfig(path=str(model)), table, "cpu", port=lease.port, seed=1
    )
    server = OwnedProcess("server", arguments, folder / "log", "cpu")
    router = Router({}, folder, "cpu", 60)

    async def abort(request):
        async with client._session.post(f"{url}/abort_request", json={"abort_all": True}):
            return

    async def ready():
        return

    client: GenerateClient = GenerateClient(
        router.url, timeout_s=60, max_retries=1, wait_ready=ready, abort=abort
    )

    async def answer(number, sample):
        sampling = {"max_new_tokens": 4 + number, "temperature": 1.0, "ignore_eos": True}
        got = await client.generate(sample.prompt_ids, sampling, number, routed_experts=True)
        return replace(
            sample,
            response_ids=got.token_ids,
            loss_mask=[True] * len(got.token_ids),
            rollout_logprobs=got.logprobs,
            policy_versions=[0] * len(got.token_ids),
            routed_experts=got.routed_experts,
        )

    try:
        await asyncio.gather(
            wait_until_up("server", server, f"{url}/model_info", 120), router.wait_until_up(120)
        )
        weights = sorted(
            load_file(model / "model.safetensors").items(), key=lambda item: server_name(item[0])
        )
        await asyncio.to_thread(push, weights, [url], 0, timeout_s=60)
        await router.register(url, 120)
        done = await asyncio.gather(*(answer(n, s) for n, s in enumerate(samples)))
        going = asyncio.create_task(client.generate([1, 2, 3], LONG, 5, routed_experts=True))
        while not client._in_flight:
            await asyncio.sleep(0)
        await client.hold()
        client.release()
        return done, await going
    finally:
        await client.close()
        await router.stop()
        server.kill()
        lease.release()


@pytest.fixture
def routes(monkeypatch):
    """What every router of this process chose, in order: [tokens, experts] of bool."""
    seen = []
    routing = TopKRouter.routing

    def watched(self, *args, **kwargs):
        probs, chosen = routing(self, *args, **kwargs)
        seen.append((self.layer_number - 1, chosen))
        return probs, chosen

    monkeypatch.setattr(TopKRouter, "routing", watched)
    return seen


@pytest.fixture(scope="module")
def perturbed(model, tmp_path_factory):
    """The model with other routers."""
    folder = tmp_path_factory.mktemp("perturbed")
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    for name, weight in weights.items():
        if "mlp.gate.weight" in name:
            weight += 0.05 * torch.randn_like(weight)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def train(one_rank, run, samples, path, *, replay):
    """The metrics of a step on the samples."""
    trainer = TrainerConfig(
        max_tokens_per_micro_batch=1 << 20, router_replay=replay, old_logprobs="always"
    )
    changes = {"model": ModelConfig(path=str(path)), "trainer": trainer}
    with one_rank(**changes, algorithm=GrpoConfig()) as rank:
        batch = find_batch(run.store, run.ref, 0) or run.commit(0, samples)
        return rank.train(batch).metrics


def test_a_server_tells_where_each_token_went(generated):
    for sample in generated[0]:
        tokens = len(sample.prompt_ids) + len(sample.response_ids) - 1
        chosen = sample_experts(sample, EXPERTS)
        assert chosen.shape == (tokens, EXPERTS.layers, EXPERTS.per_token)
        assert (chosen[:, :, 0] != chosen[:, :, 1]).all()


def test_an_answer_that_was_stopped_and_went_on_tells_of_all_its_tokens(generated):
    answer = generated[1]
    rows = 3 + len(answer.token_ids) - 1
    assert len(answer.token_ids) == LONG["max_new_tokens"]
    assert len(answer.routed_experts) == 2 * rows * EXPERTS.layers * EXPERTS.per_token


def test_what_was_told_before_an_answer_went_on_stays():
    assert went_on(b"1122", b"xxxx33") == b"112233"
    assert went_on(b"1122", None) == b"1122"
    assert went_on(None, b"33") == b"33"


@pytest.mark.parametrize("routers", ["the server's", "others"])
def test_routers_choose_what_the_server_chose(
    one_rank, run, generated, model, perturbed, routes, routers
):
    """Without replay too where their weights are the server's: the two number tokens and layers alike."""
    samples = generated[0]
    same = routers == "the server's"
    train(one_rank, run, samples, model if same else perturbed, replay=not same)
    named = torch.cat([sample_experts(s, EXPERTS) for s in samples]).long()
    assert [layer for layer, _ in routes] == 2 * [0, 1, 2]  # the old log-probabilities, training
    for layer, chosen in routes:
        assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, named[:, layer], True))


def test_replay_brings_the_trainer_of_other_routers_nearer_to_the_servers(
    one_rank, run, generated, perturbed
):
    gaps = {}
    for replay in (False, True):
        metrics = train(one_rank, run, generated[0], perturbed, replay=replay)
        gaps[replay] = metrics["mismatch/logprob_gap_mean"], metrics["mismatch/kl"]
    print(f"gap, KL without replay {gaps[False]}, with {gaps[True]}")
    assert gaps[True][0] < gaps[False][0]
    assert gaps[True][1] < gaps[False][1]


def test_padding_goes_to_experts_that_differ():
    rows = torch.tensor([[[3, 1]], [[2, 0]]], dtype=torch.int16)
    assert on_the_row(rows, torch.tensor([1, -1, 0])).tolist() == [[[2, 0]], [[0, 1]], [[3, 1]]]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (None, "has no routed_experts, which trainer.router_replay needs"),
        (np.zeros(6, EXPERTS_DTYPE), "routed_experts has 6 numbers where 3 tokens, 3 layers"),
        (np.full(18, 7, EXPERTS_DTYPE), "names expert 7 of 4"),
    ],
)
def test_experts_that_cannot_be_replayed_are_refused_by_the_sample(make_samples, told, message):
    [sample, *_] = make_samples(0)
    sample = replace(
        sample, prompt_ids=[1, 2], response_ids=[3, 4], loss_mask=[True] * 2,
        rollout_logprobs=[0.0] * 2, policy_versions=[0] * 2,
        routed_experts=None if told is None else told.tobytes(),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"sample {sample.sample_id}.*{message}"):
        sample_experts(sample, EXPERTS)


def test_a_dense_model_cannot_replay(one_rank):
    with (
        pytest.raises(ValueError, match="dense model"),
        one_rank(trainer=TrainerConfig(router_replay=True)),
    ):
        pass
