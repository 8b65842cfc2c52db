"""Makes the fixed weights that trajectories begin from: ``python -m tests.trajectories.make_weights FOLDER``.

``FOLDER`` is where a demo ran: its weights after the warm-up and after training are kept with the tests.
This runs only where the model itself is to be another; then ``golden.json`` is to be written anew.
Rounded to bfloat16 they take half the space; training computes in float32.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rollflow.flows.demo import FOLDERS
from rollflow.flows.recipes.arithmetic import MODEL

from .trajectory import START, TEACHER


def main() -> None:
    """Keep what a demo left."""
    left = Path(sys.argv[1]) / FOLDERS["cpu"]
    _keep(left / "warm", START)
    _keep(left / "trained", TEACHER)


def _keep(weights: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.bfloat16)
    model.save_pretrained(place)
    config = {**MODEL, "torch_dtype": "bfloat16"}
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in weights.iterdir():
        if "token" in file.name:
            shutil.copy(file, place / file.name)


if __name__ == "__main__":
    main()
