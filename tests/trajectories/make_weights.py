"""Makes the fixed weights that trajectories begin from: ``python -m tests.trajectories.make_weights``.

They are kept with the tests, so this runs only where the model itself is to be another. Rounded to
bfloat16 they take half the space; training computes in float32.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rollflow.flows.recipes import arithmetic
from rollflow.storage.checkpoints import fetch_checkpoint, newest_checkpoint
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.runs import open_run

from .trajectory import MODEL, START, TEACHER, down

WARM = (
    *(
        "--name",
        "warm",
        "--model.path",
        "arithmetic/model",
        "--data.path",
        "arithmetic/train.jsonl",
    ),
    *("--steps", "1500", "--stop.at_least", "0.85", "--lr", "1e-3", "--trainer.ranks", "1"),
)
EVAL = (
    '{name = "heldout", every = %d, data = {path = "arithmetic/heldout.jsonl", shuffle = false}, '
    "sampling = {temperature = 0.0, max_new_tokens = 4}}"
)


def main() -> None:
    """Warm up, train on to a teacher, and keep both."""
    with tempfile.TemporaryDirectory(prefix="rollflow-weights-") as name:
        folder = Path(name)
        arithmetic.make(folder / "arithmetic", model=MODEL)
        try:
            _run(folder, "sft", "arithmetic_sft_cpu", *WARM, "--evals", f"[{EVAL % 20}]")
            _keep(folder, "warm", START)
            more = ("--name", "teacher", "--stop.at_least", "0.98", "--trainer.load", str(START))
            _run(folder, "sft", "arithmetic_sft_cpu", *WARM, "--evals", f"[{EVAL % 20}]", *more)
            _keep(folder, "teacher", TEACHER)
        finally:
            down(folder)


def _run(folder: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "rollflow", *words], cwd=folder, check=True)


def _keep(folder: Path, run: str, place: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    store = Store(StoreConfig(url=str(folder / ".rollflow/store")))
    checkpoint = newest_checkpoint(store, open_run(store, run))
    assert checkpoint is not None
    weights = fetch_checkpoint(store, checkpoint, folder) / "hf"
    shutil.rmtree(place, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.bfloat16)
    model.save_pretrained(place)
    (place / "config.json").write_text(json.dumps(MODEL, indent=2) + "\n")
    for file in (folder / "arithmetic/model").iterdir():
        if file.name != "config.json":
            shutil.copy(file, place / file.name)


if __name__ == "__main__":
    main()
