"""The rollout engine with real servers, router and store. The tests share one engine, in order."""

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import torch
from ray.exceptions import RayError
from rollout_parts import RolloutParts, StubTrainer

from rollflow.engines import cluster
from rollflow.storage.manifests import read_batch
from rollflow.storage.samples import Sample, Status


def logprob_gap(folder: Path, samples: list[Sample]) -> float:
    """Largest difference to the log-probabilities that transformers gives with these weights."""
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    gaps: list[float] = []
    for sample in samples:
        tokens = torch.tensor([sample.prompt_ids + sample.response_ids])
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(model(tokens).logits[0], dim=-1)
        start = len(sample.prompt_ids)
        expected_R = logprobs_TV[start - 1 : -1].gather(1, tokens[0, start:, None])[:, 0]
        gaps.append((expected_R - torch.tensor(sample.rollout_logprobs)).abs().max().item())
    return max(gaps)


def ask(url: str, seed: int = 0) -> dict[str, Any]:
    sampling = {"temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True}
    body = {
        "input_ids": [4, 5, 12, 4, 6, 13],
        "sampling_params": {**sampling, "sampling_seed": seed},
        "return_logprob": True,
    }
    return httpx.post(f"{url}/generate", json=body, timeout=60).raise_for_status().json()


def as_sample(answer: dict[str, Any]) -> Sample:
    ids, meta = answer["output_ids"], answer["meta_info"]
    n = len(ids)
    logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
    return Sample(
        run="run", step=0, group_id="g", index=0, prompt_id="p", source_row=0, episode_id="e",
        prompt_text="", response_text="", prompt_ids=[4, 5, 12, 4, 6, 13], response_ids=ids,
        loss_mask=[True] * n, rollout_logprobs=logprobs, policy_versions=[0] * n,
        status=Status.COMPLETED, finish_reason="length",
    )  # fmt: skip


def session_of(leader: int) -> set[int]:
    return {p.pid for p in psutil.process_iter() if os.getsid(p.pid) == leader}


def test_a_step_is_generated_scored_and_committed(rollout: RolloutParts):
    generated = rollout.call("generate", 0, 0)
    assert (generated.groups, generated.samples) == (8, 32)
    batch = rollout.call("write", rollout.call("score", generated))
    samples = read_batch(rollout.store, batch)
    assert len({s.sample_id for s in samples}) == batch.rows == 32
    assert {s.status for s in samples} == {Status.TRUNCATED}
    assert {s.reward for s in samples} == {400.0}
    assert {v for s in samples for v in s.policy_versions} == {0}
    assert batch.metrics["rollout/reward"] == batch.metrics["rollout/response_len"] == 400.0
    assert batch.metrics["rollout/failed"] == 0.0
    assert len({s.seed for s in samples}) == 32
    assert logprob_gap(rollout.models[0], samples[::8]) < 1e-4


def test_writing_a_written_step_again_gives_the_same_batch(rollout: RolloutParts):
    groups = rollout.call("generate", 1, 0)
    first = rollout.call("write", rollout.call("score", groups))
    assert rollout.call("write", groups).digest == first.digest


def test_generating_a_step_anew_gives_up_the_first_attempt(rollout: RolloutParts):
    first = rollout.manager.generate.remote(4, 0)
    second = rollout.call("generate", 4, 0)
    batch = rollout.call("write", rollout.call("score", second))
    assert len(read_batch(rollout.store, batch)) == 32
    with pytest.raises(RayError):
        ray.get(first, timeout=60)


def test_an_evaluation_is_committed_once_and_covers_every_prompt(rollout: RolloutParts):
    first = rollout.call("evaluate", "heldout", 0, 0)
    assert (first.rows, first.groups) == (40, 40)
    assert 1 <= first.metrics["eval/heldout/reward"] <= 4
    assert rollout.call("evaluate", "heldout", 0, 0).digest == first.digest


def test_a_seed_gives_the_same_tokens_on_every_server(rollout: RolloutParts):
    first, second = rollout.call("server_urls")
    answers = [ask(first, 1), ask(second, 1), ask(first, 2)]
    tokens = [a["output_ids"] for a in answers]
    assert tokens[0] == tokens[1] != tokens[2]


def test_servers_and_router_listen_on_loopback_only(rollout: RolloutParts):
    info = rollout.call("info")
    pids = set().union(*(session_of(pid) for pid in info.pids))
    listening = {
        c.laddr.ip
        for c in psutil.net_connections("inet")
        if c.pid in pids and c.status == psutil.CONN_LISTEN and c.laddr
    }
    assert listening == {"127.0.0.1"}


def test_a_killed_server_loses_no_sample_and_comes_back_with_the_right_weights(
    rollout: RolloutParts, ray_cluster: Path
):
    cluster.start_actor(StubTrainer, "trainer-0", str(rollout.models[1]))
    trainer = cluster.find_actor("trainer-0")
    rollout.call("attach_trainer", ["trainer-0"], "rollout-tests")
    ray.get(trainer.push_weights.remote(rollout.call("server_urls"), 1))
    before = rollout.call("info")
    ray_cluster.write_text(str(before.pids[0]))

    groups = rollout.call("generate", 2, 1)
    assert not ray_cluster.exists(), "the server was to be killed while others generate"
    samples = read_batch(rollout.store, rollout.call("write", rollout.call("score", groups)))
    assert len(samples) == 32
    assert {s.status for s in samples} == {Status.TRUNCATED}
    assert {v for s in samples for v in s.policy_versions} == {1}
    assert logprob_gap(rollout.models[1], samples[::4]) < 1e-4

    ray.get(rollout.manager.info.remote(whole=True), timeout=240)
    rollout.call("score", rollout.call("generate", 3, 1))
    after = rollout.call("info")
    assert len(after.server_urls) == 2
    assert before.pids[0] not in after.pids
    assert ray.get(trainer.pushes.remote())[-1] == ([after.server_urls[0]], 1)
    for url in after.server_urls:
        answer = ask(url)
        assert answer["meta_info"]["weight_version"] == "1"
        assert logprob_gap(rollout.models[1], [as_sample(answer)]) < 1e-4


def test_no_process_outlives_a_manager_that_was_killed(rollout: RolloutParts):
    info = rollout.call("info")
    processes = [psutil.Process(pid) for leader in info.pids for pid in session_of(leader)]
    assert len(processes) >= 8  # two guards, servers, schedulers, detokenizers; the router's two
    os.kill(info.manager_pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
