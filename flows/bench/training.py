"""Our Megatron step against the same model in plain transformers, on the same batches."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rollflow.flows.recipes import arithmetic
from rollflow.tasks.measure import compare_training

STEPS = 8
SAMPLES = 64


async def measure(console: Console) -> dict[str, Any]:
    """Supervised steps of both, one after the other, one process and one thread each."""
    folder = Path(".rollflow/arithmetic")
    arithmetic.make(folder)
    found = await compare_training(str(folder / "model"), STEPS, SAMPLES)
    table = Table(
        "step", "tokens/s", "tokens/CPU s", "seconds", title=f"Training, median of {STEPS} steps"
    )
    for name, label in (
        ("megatron", "rollflow on megatron-core"),
        ("transformers", "transformers"),
    ):
        one = found[name]
        rates = (f"{one['tokens_per_s']:.0f}", f"{one['tokens_per_cpu_s']:.0f}")
        table.add_row(label, *rates, f"{one['seconds']:.3f}")
    console.print(table)
    console.print(
        f"megatron-core against transformers: {found['ratio']:.2f} times as fast, "
        f"{found['cpu_ratio']:.2f} times by CPU seconds; largest difference of a loss {found['loss_gap']:.1e}"
    )
    return found
