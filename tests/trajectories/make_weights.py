"""Makes the fixed weights that trajectories begin from: ``python -m tests.trajectories.make_weights``.

They are kept with the tests, so this runs only where the model itself is to be another. Rounded to
bfloat16 they take half the space; training computes in float32.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rollflow.flows.demo import FOLDERS
from rollflow.flows.recipes import arithmetic

from .trajectory import START, TEACHER, down


def main() -> None:
    """Keep what the demo begins GRPO with and what it ends with."""
    parser = argparse.ArgumentParser(prog="python -m tests.trajectories.make_weights")
    parser.add_argument("--demo", type=Path, help="folder where `rollflow demo` ran; else it runs")
    ran = parser.parse_args().demo
    if ran:
        _keep(ran)
        return
    with tempfile.TemporaryDirectory(prefix="rollflow-weights-") as name:
        try:
            subprocess.run([sys.executable, "-m", "rollflow", "demo"], cwd=name, check=True)
            _keep(Path(name))
        finally:
            down(Path(name))


def _keep(demo: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    for weights, place in (("warm", START), ("trained", TEACHER)):
        folder = demo / FOLDERS["cpu"] / weights
        shutil.rmtree(place, ignore_errors=True)
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(place)
        model = arithmetic.MODEL | {"torch_dtype": "bfloat16"}
        (place / "config.json").write_text(json.dumps(model, indent=2) + "\n")
        for file in folder.glob("token*.json"):
            shutil.copy(file, place / file.name)


if __name__ == "__main__":
    main()
