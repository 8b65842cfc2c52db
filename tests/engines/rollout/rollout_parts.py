"""What the tests and the actors under test share; both import this module by its bare name."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray

from rollflow.engines import cluster
from rollflow.engines.config import ModelConfig
from rollflow.engines.hooks import GenerateContext, GenerateEngine
from rollflow.engines.rollout import single_turn
from rollflow.engines.rollout.config import EvalConfig, HooksConfig, RolloutConfig, SamplingConfig
from rollflow.engines.weights import PushResult, flush
from rollflow.storage.config import DataConfig, StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.samples import Prompt, Sample, Status
from tests.engines import deaths

VICTIM = "ROLLFLOW_TEST_VICTIM"
"""Environment variable: a file that holds the pid of a server which is to be killed."""
KILL_AT_CALL = 12

calls = 0


def length(sample: Sample) -> float:
    return float(len(sample.response_ids))


def judged(sample: Sample) -> float:
    """A plain reward, in a process of its own: it asks the judge."""
    url = os.environ["ROLLFLOW_REWARD_URL"]
    text = sample.prompt_text + sample.response_text
    body = {"input": text, "model": "judge"}
    answer = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).raise_for_status()
    return answer.json()["data"][0]["embedding"][-1]


async def generate_and_kill_a_server(
    engine: GenerateEngine, prompt: Prompt, context: GenerateContext
) -> Sample:
    """As usual, but the 12th answer of a process kills a server while others still generate."""
    global calls
    sample = await single_turn.generate(engine, prompt, context)
    calls += 1
    victim = Path(os.environ[VICTIM])
    if calls >= KILL_AT_CALL and victim.exists():
        pid = int(victim.read_text())
        victim.rename(victim.with_suffix(".done"))
        for process in psutil.Process(pid).children():
            process.kill()
    return sample


class StubTrainer:
    """Answers like a trainer rank: its weights are those of a checkpoint folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.pushed: list[tuple[list[str], int]] = []

    def push_weights(self, urls: list[str], version: int, place: str = "") -> PushResult:
        self.pushed.append((urls, version))
        for url in urls:
            body = {"model_path": self.folder, "weight_version": str(version), "flush_cache": False}
            with httpx.Client(base_url=url, timeout=60) as client:
                answer = client.post("/update_weights_from_disk", json=body)
                assert answer.raise_for_status().json()["success"]
                flush(client)
        return PushResult(version, "", 0, 0.0, tuple(urls))

    def pushes(self) -> list[tuple[list[str], int]]:
        return self.pushed


class BroadcastTrainer:
    """A trainer rank that broadcasts: its weights are those of a checkpoint folder."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import Qwen3ForCausalLM

        from rollflow.engines.channel import Channel

        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.named = [(name, p.detach()) for name, p in model.named_parameters()]
        self.channel = Channel("gloo", 30)
        self.victim = 0
        """Process that is killed in the middle of the next push; 0 for none."""
        self.pushed: list[tuple[list[str], int, list[str]]] = []

    def kill_next_time(self, pid: int) -> None:
        self.victim = pid

    def push_weights(self, urls: list[str], version: int, place: str = "") -> Any:
        result = self.channel.push(self.weights(), urls, version, bucket_bytes=1 << 14)
        self.pushed.append((urls, version, [url for url, _ in result.failed]))
        return result

    def weights(self) -> Iterator[tuple[str, Any]]:
        for i, named in enumerate(self.named):
            if i == len(self.named) // 2 and self.victim:
                deaths.kill(psutil.Process(self.victim).children(recursive=True))
                self.victim = 0
            yield named

    def pushes(self) -> list[tuple[list[str], int, list[str]]]:
        return self.pushed


class Listener:
    """Notes in which order it is called."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def hear(self, name: str) -> None:
        self.heard.append(name)

    def told(self) -> list[str]:
        return self.heard


class Caller:
    """A process of its own that calls listeners."""

    def __init__(self, names: list[str], namespace: str) -> None:
        self.listeners = [ray.get_actor(name, namespace=namespace) for name in names]
        self.order = ray.get_actor(cluster.ORDER, namespace=namespace)

    async def call(self, who: str, times: int) -> None:
        for i in range(times):
            await cluster.hand_out(self.order, self.listeners, "hear", f"{who}{i}")


class RolloutParts:
    """The rollout engine under test and what the tests look at."""

    def __init__(self, folder: Path, models: tuple[Path, Path], prompts: Path) -> None:
        store = StoreConfig(url=str(folder / "store"))
        self.models = models
        self.store = Store(store)
        self.run = RunRef("run", self.store.run_url("run"))
        data = DataConfig(path=str(prompts))
        greedy = SamplingConfig(temperature=0.0, max_new_tokens=4)
        self.log_dir = folder / "logs"
        self.arguments: list[Any] = [
            self.run,
            store,
            ModelConfig(path=str(models[0])),
            [data],
            RolloutConfig(
                batch_size=8,
                n_samples_per_prompt=4,
                servers=2,
                seed=3,
                shard_groups=4,
                reward="rollout_parts:length",
                generate="rollout_parts:generate_and_kill_a_server",
                sampling=SamplingConfig(max_new_tokens=400, ignore_eos=True),
            ),
            HooksConfig(),
            [EvalConfig(name="heldout", data=data, sampling=greedy)],
            {},
            {},
            "cpu",
            str(self.log_dir),
        ]
        self.manager: Any = None

    @property
    def urls(self) -> list[str]:
        return self.call("info").server_urls

    def call(self, method: str, *args: object) -> Any:
        return ray.get(getattr(self.manager, method).remote(*args), timeout=240)


def logprob_gap(folder: Path, samples: list[Sample]) -> float:
    """Largest difference to the log-probabilities that transformers gives with these weights.

    Prints where they are apart, if they are: from some token on the context differs, at one the draw does.
    """
    import torch
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    gaps: list[float] = []
    for sample in samples:
        tokens = torch.tensor([sample.prompt_ids + sample.response_ids])
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(model(tokens).logits[0], dim=-1)
        start = len(sample.prompt_ids)
        expected_R = logprobs_TV[start - 1 : -1].gather(1, tokens[0, start:, None])[:, 0]
        gap_R = (expected_R - torch.tensor(sample.rollout_logprobs)).abs()
        if gap_R.max() > 1e-5:
            apart = {i: f"{gap_R[i]:.1e}" for i in (gap_R > 1e-5).nonzero().flatten().tolist()}
            print(f"{sample.sample_id}: {start} tokens of prompt, answer apart at {apart}")
        gaps.append(gap_R.max().item())
    return max(gaps)


def ask(url: str, seed: int = 0) -> dict[str, Any]:
    """What a server answers to one request for 16 tokens."""
    sampling = {"temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True}
    body = {
        "input_ids": [4, 5, 12, 4, 6, 13],
        "sampling_params": {**sampling, "sampling_seed": seed},
        "return_logprob": True,
    }
    return httpx.post(f"{url}/generate", json=body, timeout=60).raise_for_status().json()


def as_sample(answer: dict[str, Any]) -> Sample:
    logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    return sample_of(answer["output_ids"], logprobs)


def sample_of(ids: list[int], logprobs: list[float]) -> Sample:
    n = len(ids)
    return Sample(
        run="run", step=0, group_id="g", index=0, prompt_id="p", source_row=0, episode_id="e",
        prompt_text="", response_text="", prompt_ids=[4, 5, 12, 4, 6, 13], response_ids=ids,
        loss_mask=[True] * n, rollout_logprobs=logprobs, policy_versions=[0] * n,
        status=Status.COMPLETED, finish_reason="length",
    )  # fmt: skip


def session_of(leader: int) -> set[int]:
    """The processes that one process started, and theirs."""
    found: set[int] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            if os.getsid(process.pid) == leader:
                found.add(process.pid)
    return found


def reward_model(folder: Path, policy: Path) -> Callable[[str], float]:
    """A random reward model with the policy's tokenizer, kept in ``folder``.

    SGLang's head has a bias, which transformers' has not: where a file lacks it, it is random.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

    torch.manual_seed(7)
    config = Qwen3Config.from_pretrained(policy, num_labels=1)
    model = Qwen3ForSequenceClassification(config).float().eval()
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "score.bias": torch.tensor([0.25])}, folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.save_pretrained(folder)

    def score(text: str) -> float:
        with torch.no_grad():
            return model(torch.tensor([tokenizer.encode(text)])).logits.item() + 0.25

    return score
