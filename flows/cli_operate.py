"""Commands around the Prefect server: the local stack, deployments, and runs that a worker does."""

import asyncio
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from cyclopts import App

from rollflow.storage.config import StoreConfig

from . import server, stack
from .terminal import DEFAULT_STORE, StoreUrl, Words, console


def register(app: App) -> None:
    """Add the commands to the ``rollflow`` command."""
    for command in (up, down, status, doctor, deploy, submit, schedule, pause, cancel):
        app.command(command)


def up(*, foreground: bool = False, at_once: int | None = None, beside: int | None = None) -> None:
    """Start the local stack: Prefect server, every flow deployed, and a worker that runs them.

    Parameters
    ----------
    foreground
        stay, and keep server and worker alive until Ctrl-C.
    at_once
        runs that train at the same time; the others queue. 1 unless given.
    beside
        evaluations, scorings and conversions at the same time. 1 unless given.
    """
    if foreground:
        stack.keep(at_once or 1, beside or 1)
        return
    if (at_once or beside) and stack.running():
        raise ValueError(
            "the stack runs already; `rollflow deploy --at-once N --beside N` changes how many run at once"
        )
    console.print(f"Prefect UI: {stack.up(at_once or 1, beside or 1)}")
    console.print("  start a run there (Deployments), or: rollflow submit CONFIG")
    console.print("  what goes on: rollflow status; to stop it all: rollflow down")


def down() -> None:
    """Stop the local stack: the worker with its flows, and the Prefect server."""
    ended = stack.down()
    console.print(f"stopped: {', '.join(ended)}" if ended else "no local Prefect server runs")


def status() -> None:
    """Show the local stack and what the runs of this folder are doing."""
    from .show import print_queue, print_status

    process, local = stack.worker(), server.running()
    console.print(f"Prefect server: {local.url if local else 'not running here'}", highlight=False)
    worker = f"pid {process.pid}" if process else "not running here"
    console.print(f"worker:         {worker}", highlight=False)
    print_status(console)
    if api := os.environ.get("PREFECT_API_URL") or (local.api_url if local else ""):
        print_queue(api, console)


def doctor() -> None:
    """Check this machine for everything that rollflow needs; each fault comes with its mending."""
    from .doctor import examine

    findings = examine()
    for finding in findings:
        mark = "[green]ok[/]     " if finding.ok else "[red]MISSING[/]"
        console.print(f"{mark} {finding.what}: {finding.found}", highlight=False)
        if not finding.ok:
            console.print(f"        mend: {finding.mend}", highlight=False)
    if not all(finding.ok for finding in findings if finding.needed):
        raise SystemExit(1)


def deploy(
    *presets: Path,
    pool: str = "rollflow",
    folder: Path | None = None,
    at_once: int = 1,
    beside: int = 1,
    yaml: bool = False,
) -> None:
    """Tell the Prefect server of every flow, recipe and automation; again whenever they changed.

    Parameters
    ----------
    presets
        TOML files of your own, each a deployment with these settings filled in, like the recipes.
    pool
        work pool; made as a process pool where there is none of that name.
    folder
        folder that the runs start in; this one unless given.
    at_once
        runs that train at the same time; the others queue.
    beside
        evaluations, scorings and conversions at the same time.
    yaml
        print deploy/prefect.yaml, for `prefect deploy`, and tell nobody.
    """
    if yaml:
        from .prefect_yaml import as_yaml

        print(as_yaml(), end="")
        return
    ui = server.use_server()
    from .deployments import Placement, names
    from .deployments import deploy as deploy_all

    where = Placement(pool, (folder or Path.cwd()).resolve(), at_once, beside)
    for flow, found in names(asyncio.run(deploy_all(where, presets))).items():
        console.print(f"{flow}: {', '.join(found)}", highlight=False)
    console.print(f"Prefect UI: {ui}; a worker: prefect worker start --pool {pool}")


def submit(config: str, *words: Words, at: datetime | None = None) -> None:
    """Hand a run to the worker of the Prefect server, now or at a time; it queues for the cluster.

    Parameters
    ----------
    config
        TOML file, or the name of a recipe.
    at
        local time at which it starts, e.g. 2027-01-31T22:00.
    """
    from rollflow.tasks.checks import check_settings

    from .arguments import load_config, recipes

    resolved = load_config(recipes().get(config, config), words)
    check_settings(resolved)
    ui = server.find_server()
    from . import remote

    flow = "sft" if resolved.algorithm.name == "sft" else "train"
    found = asyncio.run(remote.submit(flow, resolved, at))
    console.print(f"{found.name}: {flow} {found.when}: {ui}/runs/flow-run/{found.id}")
    if not os.environ.get("PREFECT_API_URL") and not stack.worker():
        console.print("no worker runs in this folder: it waits until `rollflow up` starts one")


def schedule(
    what: Literal["train", "sft", "evaluate"],
    run: str,
    *words: Words,
    cron: str,
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Start a flow by the clock: evaluate a run's newest checkpoint, or let a run go on.

    The UI lists, pauses and removes schedules, on the page of the flow's deployment.

    Parameters
    ----------
    what
        flow.
    run
        name of a stored run for evaluate; else a TOML file, or the name of a recipe.
    cron
        minute hour day month weekday, in UTC.
    """
    from rollflow.storage.objects import Store
    from rollflow.storage.runs import open_run
    from rollflow.tasks.checks import check_settings

    from .arguments import load_config, recipes

    if what == "evaluate":
        open_run(Store(StoreConfig(url=store)), run)
        parameters: dict[str, Any] = {"run": run, "store": {"url": store}}
        name = f"evaluate-{run}"
    else:
        resolved = load_config(recipes().get(run, run), words)
        check_settings(resolved)
        if (what == "sft") != (resolved.algorithm.name == "sft"):
            raise ValueError(
                f"algorithm.name = {resolved.algorithm.name!r} in a schedule of {what}: take "
                f"{'train' if what == 'sft' else 'sft'}, or other settings"
            )
        parameters, name = {"config": resolved.model_dump(mode="json")}, resolved.name
    server.find_server()
    from . import remote

    found = asyncio.run(remote.schedule(what, json.loads(json.dumps(parameters)), cron, name))
    console.print(f"{found.name}: {what} {found.when}")


def pause(run: str) -> None:
    """Suspend a run that a worker does: it ends after its current step and frees the cluster.

    Parameters
    ----------
    run
        name of the run; `rollflow resume` lets it go on.
    """
    server.find_server()
    from . import remote

    found = asyncio.run(remote.suspend(run))
    console.print(f"{run}: suspended (flow run {found.id}); `rollflow resume {run}` goes on")


def cancel(run: str) -> None:
    """Cancel a run that a worker does; what it committed stays, and a retry goes on from there.

    Parameters
    ----------
    run
        name of the run.
    """
    server.find_server()
    from . import remote

    found = asyncio.run(remote.cancel(run))
    console.print(f"{run}: flow run {found.id} is cancelled")
