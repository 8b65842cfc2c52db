"""Makes the fixed weights that trajectories begin from: ``python -m tests.trajectories.make_weights [FOLDER]``.

They are kept with the tests, so this runs only where a model itself is to be another; then the kept
trajectories are to be written anew. With ``FOLDER``, in which a demo ran, it keeps the demo's weights
after its warm-up and after its training. Without, it trains the small model of the suite. Rounded to
bfloat16 they take half the space; training computes in float32.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rollflow.flows.demo import FOLDERS
from rollflow.flows.recipes import arithmetic
from rollflow.storage.checkpoints import fetch_checkpoint, newest_checkpoint
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.runs import open_run

from .trajectory import FEW, MANY, MODEL, down

WARM = (
    *("--name", "warm", "--model.path", "arithmetic/model"),
    *("--data.path", "arithmetic/train.jsonl"),
    *("--steps", "1500", "--stop.at_least", "0.85", "--lr", "1e-3", "--trainer.ranks", "1"),
    *("--rollout.batch_size", "256", "--trainer.updates_per_batch", "1"),
)
EVAL = (
    '{name = "heldout", every = 20, data = {path = "arithmetic/heldout.jsonl", shuffle = false}, '
    "sampling = {temperature = 0.0, max_new_tokens = 4}}"
)


def main() -> None:
    """Keep a demo's weights, or warm the small model up, train it on to a teacher, and keep both."""
    if len(sys.argv) > 1:
        left = Path(sys.argv[1]) / FOLDERS["cpu"]
        _keep(left / "warm", MANY.start)
        _keep(left / "trained", MANY.teacher)
        return
    with tempfile.TemporaryDirectory(prefix="rollflow-weights-") as name:
        folder = Path(name)
        arithmetic.make(folder / "arithmetic", model=MODEL)
        try:
            _train(folder)
            _keep(_weights(folder, "warm"), FEW.start)
            more = ("--name", "teacher", "--stop.at_least", "0.98")
            _train(folder, *more, "--trainer.load", str(FEW.start))
            _keep(_weights(folder, "teacher"), FEW.teacher)
        finally:
            down(folder)


def _train(folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "rollflow", "sft", "arithmetic_sft_cpu", *WARM]
    subprocess.run([*command, "--evals", f"[{EVAL}]", *words], cwd=folder, check=True)


def _weights(folder: Path, run: str) -> Path:
    store = Store(StoreConfig(url=str(folder / ".rollflow/store")))
    checkpoint = newest_checkpoint(store, open_run(store, run))
    assert checkpoint is not None
    return fetch_checkpoint(store, checkpoint, folder) / "hf"


def _keep(weights: Path, place: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shutil.rmtree(place, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.bfloat16)
    model.save_pretrained(place)
    config = json.loads((weights / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in weights.iterdir():
        if "token" in file.name:
            shutil.copy(file, place / file.name)


if __name__ == "__main__":
    main()
