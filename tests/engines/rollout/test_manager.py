"""The rollout engine with real servers, router and store. The tests share one engine, in order."""

import asyncio
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import ray
import torch
from external_parts import Engine, answers, attached, until
from ray.exceptions import RayError
from rollout_parts import (
    BroadcastTrainer,
    Caller,
    Listener,
    RolloutParts,
    StubTrainer,
    as_sample,
    ask,
    logprob_gap,
    reward_model,
    sample_of,
    session_of,
)

from rollflow.engines import cluster
from rollflow.engines.config import ModelConfig
from rollflow.engines.rewards import remote
from rollflow.engines.rollout.client import GenerateClient, Scope, requests_of
from rollflow.engines.rollout.config import RolloutConfig
from rollflow.engines.rollout.config_servers import JudgeConfig
from rollflow.engines.rollout.fleet import Fleet
from rollflow.engines.rollout.frozen import Frozen
from rollflow.engines.rollout.grader import Grader
from rollflow.engines.rollout.router import Router
from rollflow.engines.rollout.server import ServerError, ServerInfo
from rollflow.engines.rollout.slot import Slot
from rollflow.storage.manifests import read_batch
from rollflow.storage.samples import Status

pytestmark = pytest.mark.slow


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
    first, second = rollout.urls
    answers = [ask(first, 1), ask(second, 1), ask(first, 2)]
    tokens = [a["output_ids"] for a in answers]
    assert tokens[0] == tokens[1] != tokens[2]


async def test_each_of_a_group_in_one_request_has_the_tokens_of_its_seed(rollout: RolloutParts):
    posts = []

    class Counting(GenerateClient):
        async def _post(self, body: dict[str, Any], headers: Any) -> Any:
            posts.append(body)
            return await super()._post(body, headers)

    async def ready() -> None:
        pass

    client = Counting(
        rollout.call("info").router_url, timeout_s=60, max_retries=0, wait_ready=ready
    )
    sampling = {"temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True}
    prompt = [4, 5, 12, 4, 6, 13]
    with requests_of(Scope(), set()):
        found = await asyncio.gather(
            *(client.generate(prompt, sampling, seed, together=True) for seed in range(4))
        )
    await client.close()
    assert [len(body["input_ids"]) for body in posts] == [4]
    url = rollout.urls[0]
    alone = [ask(url, seed)["output_ids"] for seed in range(4)]
    assert [answer.token_ids for answer in found] == alone
    assert len(set(map(tuple, alone))) == 4


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
    rollout.call("attach_trainer", ["trainer-0"], "rollout-tests", 240.0)
    ray.get(trainer.push_weights.remote(rollout.urls, 1))
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


async def test_a_server_takes_new_weights_while_it_is_asked_for_its_health(rollout: RolloutParts):
    async def ask_on() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            while True:
                (await client.get(f"{rollout.urls[0]}/health_generate")).raise_for_status()

    asking = [asyncio.create_task(ask_on()) for _ in range(8)]
    trainer = StubTrainer(str(rollout.models[1]))
    for _ in range(10):
        await asyncio.to_thread(trainer.push_weights, rollout.urls[:1], 1)
    assert not any(task.done() for task in asking)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    assert logprob_gap(rollout.models[1], [as_sample(ask(rollout.urls[0]))]) < 1e-4


async def test_servers_of_others_get_the_weights_as_files_and_answer_with_them(
    rollout: RolloutParts, engines: list[Engine], tmp_path: Path
):
    async with attached(rollout, engines, tmp_path) as (fleet, others, client):
        async with fleet.serving(1):
            samples = await answers(client, 8, 32)
        assert logprob_gap(rollout.models[1], samples) < 1e-4
        assert all(engine.answers("/generate") > 2 for engine in engines)
        for version in (2, 3):
            async with fleet.serving(version):
                assert fleet.accepts(f"{version}-{others.label.partition('-')[2]}")
        [place] = (tmp_path / "weights").iterdir()
        assert sorted(p.name for p in place.iterdir()) == ["v000002", "v000003"]
        assert others.notices == []


async def test_a_server_of_others_that_falls_silent_is_left_out_and_taken_back(
    rollout: RolloutParts, engines: list[Engine], tmp_path: Path
):
    silent = engines[1]
    async with (
        attached(rollout, engines, tmp_path, slow_s=2.0) as (fleet, others, client),
        fleet.serving(1),
    ):
        work = asyncio.create_task(answers(client, 16, 400))
        await until(lambda: silent.answers("/generate") > 4)
        await silent.fall_silent()
        assert logprob_gap(rollout.models[1], (await work)[::4]) < 1e-4
        [notice] = others.notices
        # Whichever it was asked first: its health, or what it holds.
        assert f"{silent.url} gets no requests: " in notice
        assert "took more than 2 s" in notice
        assert others.in_service == 1
        await silent.recover()
        await until(lambda: others.in_service == 2)
        asked = silent.answers("/generate")
        await answers(client, 8, 4)
        assert silent.answers("/generate") > asked


async def test_weights_that_somebody_else_loaded_answer_no_request(
    rollout: RolloutParts, engines: list[Engine], tmp_path: Path
):
    async with (
        attached(rollout, engines, tmp_path, health_every_s=1.0) as (fleet, others, client),
        fleet.serving(1),
    ):
        # A flush would end the server if it came while a health check is on its way.
        body = {
            "model_path": str(rollout.models[0]),
            "weight_version": "7",
            "flush_cache": False,
        }
        async with httpx.AsyncClient(base_url=engines[0].behind, timeout=60) as theirs:
            answer = await theirs.post("/update_weights_from_disk", json=body)
            assert answer.raise_for_status().json()["success"]
        samples = await answers(client, 8, 16)
        assert logprob_gap(rollout.models[1], samples) < 1e-4
        [notice, *_] = others.notices
        assert f"{engines[0].url} gets no requests: it holds weights '7'" in notice
        await until(lambda: others.in_service == 2)


async def test_one_that_comes_and_goes_has_to_prove_itself_longer_and_longer(
    rollout: RolloutParts, engines: list[Engine], tmp_path: Path
):
    async with attached(rollout, engines, tmp_path) as (fleet, others, _), fleet.serving(1):
        for times in (1, 2):
            await engines[0].die()
            await until(lambda: others.in_service == 1)
            notice = others.notices[-1]
            assert "Cannot connect" in notice
            assert f"after {times} good health check" in notice
            await engines[0].live()
            await until(lambda: others.in_service == 2)
        assert "(left out 2 times)" in notice


async def test_where_no_server_is_left_each_is_named_with_its_reason(
    rollout: RolloutParts, engines: list[Engine], tmp_path: Path
):
    async with attached(rollout, engines, tmp_path, timeout_s=4.0, slow_s=2.0) as (
        fleet,
        others,
        client,
    ):
        others.publish = None  # no trainer: the model's own files are published
        with pytest.raises(ServerError) as caught:
            async with fleet.serving(1):
                assert len(await answers(client, 1, 4)) == 1
                await engines[0].die()
                await engines[1].fall_silent()
                await answers(client, 1, 4)
        assert f"{engines[0].url}: " in str(caught.value)
        assert f"{engines[1].url}: a health check took more than" in str(caught.value)
    with pytest.raises(ServerError, match=r"did not answer /health within 0 s"):
        async with attached(rollout, engines, tmp_path, timeout_s=0.1):
            pass


async def test_a_wrong_engine_is_refused_at_start(
    rollout: RolloutParts, engines: list[Engine], tmp_path: Path
):
    parts = SimpleNamespace(models=rollout.models)
    engines[1].lacks = "/update_weights_from_disk"
    with pytest.raises(ValueError, match=rf"{engines[1].url} is SGLang .*, which has no /update"):
        async with attached(rollout, engines, tmp_path):
            pass
    engines[1].lacks = ""
    for change, message in (
        ({"vocab_size": 20}, "another vocabulary than the policy's 20 tokens"),
        ({"vocab_size": 10}, "another vocabulary than the policy's 10 tokens"),
        ({"architectures": ["LlamaForCausalLM"]}, r"the policy is a \['LlamaForCausalLM'\]"),
    ):
        policy = tmp_path / "policy"
        shutil.copytree(rollout.models[0], policy, dirs_exist_ok=True)
        config = json.loads((rollout.models[0] / "config.json").read_text())
        (policy / "config.json").write_text(json.dumps({**config, **change}))
        parts.models = (policy, rollout.models[1])
        with pytest.raises(ValueError, match=message):
            async with attached(parts, engines, tmp_path):  # pyright: ignore[reportArgumentType]
                pass


async def test_a_server_of_ours_takes_the_place_of_one_that_is_left_out(
    rollout: RolloutParts, engines: list[Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ours = engines[1].behind

    async def never_ends() -> str:
        return await asyncio.get_running_loop().create_future()

    async def stop() -> None:
        pass

    async def bring_up(fleet: Fleet, slot: Slot) -> None:
        verbs = {"wait_for_end": never_ends, "stop": stop}
        slot.actor = SimpleNamespace(**{k: SimpleNamespace(remote=v) for k, v in verbs.items()})
        slot.info = ServerInfo(ours, 0, 0)

    monkeypatch.setattr(Fleet, "_bring_up", bring_up)
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    await engines[0].die()
    settings = {"spares": 1, "timeout_s": 2.0}
    async with attached(rollout, engines[:1], tmp_path, **settings) as (fleet, others, client):

        async def load(url: str, version: int) -> str:
            trainer = StubTrainer(str(rollout.models[1]))
            await asyncio.to_thread(trainer.push_weights, [url], version)
            return ""

        fleet.load_weights = load
        async with fleet.serving(1):
            samples = await answers(client, 4, 16)
            assert logprob_gap(rollout.models[1], samples) < 1e-4
            assert f"{engines[0].url} gets no requests" in others.notices[0]
            assert "spare-0 of our own was started" in others.notices[1]
            await engines[0].live()
            await until(lambda: others.in_service == 1)


@pytest.mark.parametrize("policy", [{}, {"policy": "consistent_hashing"}])
async def test_requests_of_a_group_go_to_one_server_as_long_as_it_is_up(
    engines: list[Engine], tmp_path: Path, policy: dict[str, str]
):
    async def ready() -> None:
        pass

    router = Router(policy, tmp_path, "cpu", 60, keyed=True)
    client = GenerateClient(
        router.url, timeout_s=60, max_retries=4, wait_ready=ready, affinity="group"
    )

    async def ask(group: int, index: int) -> None:
        with requests_of(Scope(), set(), f"group-{group}#{index}"):
            await client.generate([4, group], {"max_new_tokens": 1}, index)

    try:
        await router.wait_until_up(60)
        for engine in engines:
            await router.register(engine.url, 60)
        await asyncio.gather(*(ask(i % 12, i // 12) for i in range(48)))
        first, second = (engine.prompts for engine in engines)
        assert first | second == {(4, i) for i in range(12)}
        assert first & second == set()
        assert first
        assert second
        await engines[0].die()
        await asyncio.gather(*(ask(i, 5) for i in range(12)))
        assert len(engines[1].prompts) == 12
    finally:
        await client.close()
        await router.stop()


async def test_a_judge_served_by_sglang_is_reached_by_both_kinds_of_rewards(
    ray_cluster: Path,
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    score = reward_model(tmp_path / "judge", models[0])
    config = JudgeConfig(path=str(tmp_path / "judge"), sglang={"is_embedding": True})
    settings = RolloutConfig(reward="rollout_parts:length")
    policy = ModelConfig(path=str(models[0]))
    judge = Frozen("judge", config, settings, policy, {}, "cpu", tmp_path)
    graders = [Grader(f, 60) for f in ("rollout_parts:judged", f"{remote.__name__}:sglang")]
    samples = [
        replace(sample_of([4, 5], [0.0, 0.0]), prompt_text=f"1{i}+20=", response_text=f"3{i}")
        for i in range(4)
    ]
    try:
        await judge.start()
        monkeypatch.setenv(remote.URL, judge.url)
        for grader in graders:
            await grader.start()
            for sample in await grader.score_group(samples):
                assert sample.reward == pytest.approx(
                    score(sample.prompt_text + sample.response_text), abs=1e-4
                ), sample.metadata
        assert len({score(f"1{i}+20=3{i}") for i in range(4)}) == 4
    finally:
        for grader in graders:
            await grader.stop()
        await judge.stop()


@pytest.mark.skipif(torch.cuda.is_available(), reason="checksums of a CPU server")
def test_a_server_that_dies_in_the_middle_of_a_broadcast_and_the_others_get_the_weights_after_all(
    rollout: RolloutParts, ray_cluster: Path
):
    def push(urls: list[str], version: int) -> Any:
        return ray.get(trainer.push_weights.remote(urls, version))

    cluster.start_actor(BroadcastTrainer, "broadcaster", str(rollout.models[1]))
    trainer = cluster.find_actor("broadcaster")
    rollout.call("attach_trainer", ["broadcaster"], "rollout-tests", 240.0)
    first, second = rollout.urls
    assert push([first, second], 11).servers == (first, second)
    before = rollout.call("info")
    ray.get(trainer.kill_next_time.remote(before.pids[0]))
    result = push([first, second], 12)
    assert dict(result.failed).keys() == {first, second}
    assert first in dict(result.failed)[second]
    rollout.call("score", rollout.call("generate", 11, 12))
    ray.get(rollout.manager.info.remote(whole=True), timeout=240)
    rollout.call("score", rollout.call("generate", 12, 12))
    after = rollout.call("info")
    assert before.pids[0] not in after.pids
    third = next(url for url in after.server_urls if url != second)
    later = ray.get(trainer.pushes.remote())[2:]
    assert {urls[0] for urls, _, failed in later if not failed} >= {second, third}
    both = push(after.server_urls, 13)
    assert both.servers == tuple(after.server_urls)
    for url in after.server_urls:
        answer = ask(url)
        assert answer["meta_info"]["weight_version"] == "13"
        assert logprob_gap(rollout.models[1], [as_sample(answer)]) < 1e-4
    cluster.kill_actors(["broadcaster"])


async def test_calls_of_two_processes_reach_all_ranks_in_one_order(ray_cluster: Path):
    ranks, callers = ["rank-0", "rank-1", "rank-2"], ["caller-0", "caller-1"]
    cluster.start_order()
    for name in ranks:
        cluster.start_actor(Listener, name)
    for name in callers:
        cluster.start_actor(Caller, name, ranks, "rollout-tests")
    started = [cluster.find_actor(name).call.remote(f"{name}:", 200) for name in callers]
    for i in range(200):
        await cluster.call(ranks, "hear", f"flow:{i}", timeout_s=60)
    await asyncio.gather(*started)
    first, second, third = await cluster.call(ranks, "told", timeout_s=60)
    assert len(first) == 600
    assert first == second == third
    cluster.kill_actors([*callers, cluster.ORDER])
    with pytest.raises(cluster.EngineDiedError, match="engine 'order' is not running"):
        await cluster.call(ranks, "told", timeout_s=60)
    cluster.kill_actors(ranks)


def test_no_process_outlives_a_manager_that_was_killed(rollout: RolloutParts):
    info = rollout.call("info")
    processes = [psutil.Process(pid) for leader in info.pids for pid in session_of(leader)]
    assert len(processes) >= 8  # two guards, servers, schedulers, detokenizers; the router's two
    os.kill(info.manager_pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
