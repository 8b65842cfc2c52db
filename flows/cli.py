"""The ``rollflow`` command. Heavy imports wait until a command needs them."""

import asyncio
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App
from rich.console import Console
from rich.text import Text

from rollflow.storage.integrity import ManifestError

from . import (
    cli_buffer,
    cli_config,
    cli_convert,
    cli_derive,
    cli_hooks,
    cli_look,
    cli_operate,
    server,
)
from .terminal import DEFAULT_STORE, StoreUrl, Words, console, quiet_prefect

if TYPE_CHECKING:
    from .config import RunConfig

DAMAGED = (
    "`rollflow audit RUN` names every damaged object of a run: bring it back from a copy, or go on "
    "from a checkpoint before it by `rollflow fork RUN --step STEP --into OTHER`"
)
SIGNALLED = {"KeyboardInterrupt": 130, "TerminationSignal": 143}
"""Exit status by what Python and Prefect raise at SIGINT and SIGTERM. The names alone: Prefect is not
imported by commands that do without."""

app = App(
    name="rollflow",
    help="Reinforcement-learning post-training of language models as a workflow.",
    suppress_keyboard_interrupt=False,  # main() gives it its exit status
)
cli_look.register(app)
cli_derive.register(app)
cli_operate.register(app)
app.command(cli_hooks.app)
app.command(cli_buffer.app)
app.command(cli_convert.convert)
app.command(cli_config.config)


def main() -> None:
    """Entry point: run a command; a mistake is one message on stderr and exit status 1."""
    quiet_prefect()
    sys.path.insert(0, str(Path.cwd()))  # hooks in the working folder can be imported
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("ROLLFLOW_TRACEBACK"):
            raise
        stderr = Console(stderr=True, soft_wrap=True)
        text = f"{error}; {DAMAGED}" if isinstance(error, ManifestError) else str(error)
        stderr.print("[bold red]error:[/]", Text(text), highlight=False)
        sys.exit(1)
    except BaseException as error:  # a signal, unless it is somebody's SystemExit
        if (status := SIGNALLED.get(type(error).__name__)) is None:
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(status)


@app.command
def train(config: str, *words: Words, dry_run: bool = False) -> None:
    """Train by reinforcement learning; a run of that name goes on from where it last committed.

    Parameters
    ----------
    config
        TOML file, or the name of a recipe.
    dry_run
        print the resolved settings and stop.
    """
    _run("train", config, words, dry_run)


@app.command
def sft(config: str, *words: Words, dry_run: bool = False) -> None:
    """Fine-tune on the labels of a dataset.

    Parameters
    ----------
    config
        TOML file, or the name of a recipe.
    dry_run
        print the resolved settings and stop.
    """
    _run("sft", config, words, dry_run)


@app.command
def evaluate(config: str, *words: Words, step: int | None = None, dry_run: bool = False) -> None:
    """Evaluate a checkpoint of a run on the datasets of its ``evals``.

    Parameters
    ----------
    config
        TOML file, or the name of a recipe.
    step
        step of the checkpoint; the newest unless given.
    dry_run
        print the resolved settings and stop.
    """
    _run("evaluate", config, words, dry_run, step=step)


@app.command
def demo(
    seed: int = 0, seconds_install: float = 0.0, store: str = "", *, gpu: bool = False
) -> None:
    """Train a tiny model on arithmetic: supervised warm-up, then GRPO, all real parts, on a CPU.

    Parameters
    ----------
    seed
        seed of data order, weights and sampling.
    seconds_install
        seconds that the installation took, for the report.
    store
        where the runs are kept, e.g. s3://bucket/prefix.
    gpu
        a small model instead, on one GPU.
    """
    ui = server.use_server()
    from .demo import run_demo

    asyncio.run(run_demo(seed, seconds_install, store, ui, console, gpu=gpu))


@app.command
def bench(
    only: list[str] | None = None,
    output: Path = Path(".rollflow/bench.json"),
    shape: list[str] | None = None,
    new_tokens: int | None = None,
    steps: int | None = None,
    part: list[str] | None = None,
) -> None:
    """Measure where an iteration's time goes and what the recovery from a kill takes.

    Parameters
    ----------
    only
        parts to measure, all but orchestration unless given: iteration, recovery, storage, training,
        conversion, modes, tail, gpu, orchestration.
    output
        JSON file for the figures.
    shape
        of the part gpu: 0.6b, 1.7b or 4b; the first two unless given.
    new_tokens
        of each answer in the whole iterations of such a shape; 512 unless given.
    steps
        whole iterations of such a shape; 8 unless given, of which the first 3 are not counted.
    part
        of such a shape: "training alone", "generation alone", "whole iterations",
        "training, not deterministic" or "split" (two GPUs); all unless given.
    """
    server.use_server()
    from .bench import run_bench

    given = {"new_tokens": new_tokens, "steps": steps, "parts": part}
    size = {name: value for name, value in given.items() if value is not None}
    asyncio.run(run_bench(only or [], output, console, shape or [], size))


@app.command
def resume(run: str, *words: Words, store: StoreUrl = DEFAULT_STORE) -> None:
    """Continue a run from its log, with the settings that it was started with.

    A flow run of it that was suspended goes on by its worker; else it goes on here.

    Parameters
    ----------
    run
        name of the run.
    """
    from .arguments import build_config, overlay, stored_settings

    settings = stored_settings(store, run)
    if not words:
        server.use_server()
        from . import remote

        if suspended := asyncio.run(remote.resume(run)):
            console.print(f"{run}: flow run {suspended.id} goes on by its worker")
            return
    _run_flow("train", build_config(overlay(settings, words)))


@app.command
def audit(run: str, store: StoreUrl = DEFAULT_STORE, recompute: bool = False) -> None:
    """Verify a run: every checksum, every sample trained on once, policy versions in order.

    Parameters
    ----------
    run
        name of the run.
    recompute
        also train every stored batch again and compare all weights, bit for bit.
    """
    if recompute:
        server.use_server()  # before Prefect is imported, which reads its settings then
    from .audit import audit_stored, recompute_stored

    findings = audit_stored(store, run, console)
    if recompute:
        findings += asyncio.run(recompute_stored(store, run, console))
    if findings:
        sys.exit(1)


def _run(
    name: str, path: str, words: tuple[str, ...], dry_run: bool, **options: int | None
) -> None:
    from .arguments import load_config, recipes

    config = load_config(recipes().get(path, path), words)
    if dry_run:
        console.print_json(json.dumps(config.model_dump(mode="json")))
        return
    _run_flow(name, config, **options)


def _run_flow(name: str, config: "RunConfig", **options: int | None) -> None:
    """Run a flow; what it waits for is named before each wait that a busy machine makes long."""
    from rollflow.tasks.checks import check_settings

    check_settings(config)  # the flow does so too, once Prefect has taken it
    ui = server.use_server()
    console.print(f"{config.name}: {name}, in Prefect at {ui}")
    from . import evaluate as evaluating
    from . import train as training
    from .show import print_summary

    flows = {"train": training.train, "sft": training.sft, "evaluate": evaluating.evaluate}
    try:
        summary = asyncio.run(flows[name](config, **options))
    except BaseException as error:
        if type(error).__name__ in SIGNALLED and name != "evaluate":
            url = config.store.url
            where = "" if url == DEFAULT_STORE else f" --store {shlex.quote(url)}"
            resume = "" if config.store.options else f", or `rollflow resume {config.name}{where}`,"
            print(f"the same command{resume} goes on from the log", file=sys.stderr)
        raise
    print_summary(config, summary, ui, console)
