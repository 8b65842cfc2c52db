"""The way an algorithm's recipe takes from fixed weights, step by step, and the one that is kept.

Everything is real (SGLang, Megatron, Ray, Prefect) and deterministic, so a way is taken again bit
for bit on the same kind of processor. Another kind rounds differently: a few steps on, a token falls
out differently, and the two ways only stay near each other.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollflow.flows.arguments import load_config, recipes
from rollflow.flows.recipes import arithmetic
from rollflow.storage.config import StoreConfig
from rollflow.storage.manifests import find_batch
from rollflow.storage.objects import Store
from rollflow.storage.runs import open_run
from rollflow.storage.steps import read_steps

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Course:
    """From which weights a way begins, how much each of its steps is, and how long it is."""

    name: str
    prompts: int
    """In a batch; 8 samples each."""
    steps: int
    words: tuple[str, ...] = ()
    """Settings that differ from the recipe's."""

    @property
    def golden(self) -> Path:
        """The ways that are kept, by recipe."""
        return HERE / f"{self.name}.json"

    @property
    def start(self) -> Path:
        """Fixed weights that get a third to a half of the sums right when they sample."""
        return HERE / "weights" / self.name / "start"

    @property
    def teacher(self) -> Path:
        """Weights of the same model that get nearly all of them right."""
        return HERE / "weights" / self.name / "teacher"


FEW = Course("few_steps", prompts=8, steps=3)
"""What the suite takes: a small model, few samples."""
MANY = Course("many_steps", prompts=32, steps=50, words=("--lr", "5e-5"))
"""What learns: the demo's model. Batches are half of the recipes', which want a smaller rate."""
COURSES = {course.name: course for course in (FEW, MANY)}
MODEL = arithmetic.MODEL | {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "torch_dtype": "bfloat16",
}
"""The small one."""
RECIPES = [name for name in recipes() if name.startswith("arithmetic_") and name.endswith("_cpu")]
SETTINGS = (
    *("--model.dtype", "float32", "--evals", "[]", "--checkpoint.every", "1000"),
    *("--trainer.ranks", "1", "--rollout.servers", "1", "--rollout.deterministic", "true"),
    *("--rollout.n_samples_per_prompt", "8"),
    *("--trainer.lr_decay_style", "constant", "--trainer.lr_decay_steps", "1000"),
)
RATE = ("--lr", "2e-4", "--trainer.lr_warmup_steps", "15")
"""Of what learns by rewards, whatever its recipe has."""
SUPERVISED = (
    *("--rollout.servers", "0"),
    *("--stop", '{metric = "eval/heldout/loss", at_most = 0.0}'),
    *("--rollout.n_samples_per_prompt", "1", "--trainer.updates_per_batch", "1"),
    *("--lr", "5e-4", "--megatron.adam_beta2", "0.98", "--trainer.lr_warmup_steps", "0"),
)
EXACT_STEPS = 3
"""So many steps agree to the last count of right answers, whatever the processor."""
GAP = 1e-4
REWARD_APART = 0.05
"""Mean distance of the rewards of two ways on different processors."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What a run's steps gave, one entry each."""

    algorithm: str
    reward: list[float]
    """Mean of the batch; for supervised training 1.0, that of the labels."""
    loss: list[float]
    grad_norm: list[float]
    gap: float
    """Largest distance between trainer's and rollout's log-probability of a token (nats)."""
    digest: str
    """Of the weights after the last step."""

    def rise(self) -> float:
        """How much a mean of the last fifth is above one of the first: of the reward, or -loss."""
        values = [-x for x in self.loss] if self.algorithm == "sft" else self.reward
        part = max(len(values) // 5, 1)
        return statistics.fmean(values[-part:]) - statistics.fmean(values[:part])

    def differences(self, golden: "Trajectory") -> list[str]:
        """What is not as the golden trajectory has it, which may be longer."""
        found = [
            f"step {step}: {name} {mine:.6g}, golden {its:.6g}"
            for name in ("reward", "loss", "grad_norm")
            for step, (mine, its) in enumerate(
                zip(getattr(self, name), getattr(golden, name), strict=False)
            )
            if step < EXACT_STEPS and abs(mine - its) > 1e-3 * abs(its) + 1e-5
        ]
        apart = statistics.fmean(
            abs(a - b) for a, b in zip(self.reward, golden.reward, strict=False)
        )
        if apart > REWARD_APART:
            found.append(f"rewards are {apart:.3f} apart in the mean")
        if self.gap >= GAP:
            found.append(f"trainer and rollout differ by {self.gap:.1e} about a token")
        return found


def prepare(folder: Path) -> None:
    """Write the data; every trajectory in ``folder`` uses it."""
    arithmetic.make(folder / "arithmetic")


def words_of(recipe: str, course: Course, data: str = "arithmetic") -> list[str]:
    """What is laid over a recipe's settings for its trajectory; ``data``: the folder of the data."""
    algorithm = load_config(recipes()[recipe], ()).algorithm.name
    words = [
        *SETTINGS,
        *(() if algorithm == "sft" else RATE),
        *course.words,
        "--model.path",
        str(course.start),
        "--model.random_weights",
        "false",
    ]
    words += ["--data.path", f"{data}/train.jsonl", "--steps", str(course.steps)]
    words += ["--rollout.batch_size", str(course.prompts * (8 if algorithm == "sft" else 1))]
    if algorithm == "sft":
        heldout = f'{{name = "heldout", loss = true, data = {{path = "{data}/heldout.jsonl"}}}}'
        words += [*SUPERVISED, "--evals", f"[{heldout}]"]
    if algorithm == "distill":
        words += ["--rollout.teacher", f'{{path = "{course.teacher}"}}']
    if algorithm == "ppo":
        words += ["--algorithm.critic", "{lr = 2e-4, warmup_steps = 1}"]
    return words


def take(folder: Path, recipe: str, course: Course) -> Trajectory:
    """Train a recipe from the fixed weights; AssertionError where it fails."""
    config = load_config(recipes()[recipe], ())
    algorithm = config.algorithm.name
    command = "sft" if algorithm == "sft" else "train"
    done = subprocess.run(
        [sys.executable, "-m", "rollflow", command, recipe, *words_of(recipe, course)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    store = Store(StoreConfig(url=str(folder / ".rollflow/store")))
    run = open_run(store, config.name)
    records = read_steps(store, run)
    batches = [find_batch(store, run, record.step) for record in records]
    return trajectory(
        algorithm,
        [batch.metrics for batch in batches if batch is not None],
        [record.metrics for record in records],
        records[-1].weights_digest,
    )


def trajectory(
    algorithm: str,
    generated: Sequence[Mapping[str, float]],
    trained: Sequence[Mapping[str, float]],
    digest: str,
) -> Trajectory:
    """Of the metrics of each step's batch and of its training."""

    def column(metric: str) -> list[float]:
        return [float(f"{metrics.get(metric, 0.0):.7g}") for metrics in trained]

    return Trajectory(
        algorithm,
        [metrics["rollout/reward"] for metrics in generated],
        column("train/loss"),
        column("train/grad_norm"),
        max(column("mismatch/logprob_gap_max")),
        digest,
    )


def down(folder: Path) -> None:
    """Stop the Prefect server of ``folder``."""
    subprocess.run([sys.executable, "-m", "rollflow", "down"], cwd=folder, timeout=100)


def golden(course: Course) -> dict[str, Trajectory]:
    """The kept trajectories by recipe; none where the file is not there yet."""
    if not course.golden.exists():
        return {}
    return {name: Trajectory(**row) for name, row in json.loads(course.golden.read_text()).items()}
