"""Commands that make a run from another one, or from a model alone."""

import asyncio
import re
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from . import server
from .terminal import DEFAULT_STORE, StoreUrl, Words, console

if TYPE_CHECKING:
    from .config import RunConfig
    from .progress import RunSummary

Into = Annotated[str, Parameter(help="Name of the new run; repeat the command to go on with it.")]
Settings = Annotated[
    list[str] | None,
    Parameter(
        name="--set", help="A setting of the new run, e.g. algorithm.kl_coef=0.1; may be repeated."
    ),
]


def register(app: App) -> None:
    """Add the commands to the ``rollflow`` command."""
    for command in (fork, replay, rescore, rollout):
        app.command(command)


def fork(
    run: str,
    *words: Words,
    step: int,
    into: Into,
    set_: Settings = None,
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Continue a run from one of its checkpoints, by other settings, as a run of its own.

    Parameters
    ----------
    run
        name of the run.
    step
        step of the checkpoint.
    """
    from .derived import derived_config

    config = derived_config(store, run, into, _words(words, set_))
    ui = server.use_server()
    from .derive import fork as fork_flow

    _print(config, asyncio.run(fork_flow(config, run, step)), ui)


def replay(
    run: str,
    *words: Words,
    into: Into,
    steps: str = ":",
    set_: Settings = None,
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Train on the stored batches of a run again, without any rollout engine.

    With the same settings every checkpoint comes out the same, bit for bit (on a CPU).

    Parameters
    ----------
    run
        name of the run.
    steps
        a:b for steps a to b-1; either may be left out. From step a > 0 on it needs the checkpoint of a-1.
    """
    from .derived import replay_config

    first, end = _range(steps)
    config, changed = replay_config(store, run, into, _words(words, set_))
    for key, change in changed.items():
        console.print(f"differs from {run}: {key}: {change}", highlight=False)
    if changed:
        console.print("so gates on log-probabilities are off, unless gates.* are set")
    ui = server.use_server()
    from .derive import replay as replay_flow

    _print(config, asyncio.run(replay_flow(config, run, first, end)), ui)


def rescore(
    run: str,
    reward: str,
    into: Into,
    steps: str = ":",
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Score the stored samples of a run again; the new run holds the new rewards beside the old.

    Parameters
    ----------
    run
        name of the run.
    reward
        the reward function, pkg.mod:fn.
    steps
        a:b for steps a to b-1; either may be left out.
    """
    from .derived import derived_config

    first, end = _range(steps)
    config = derived_config(store, run, into, ["--rollout.reward", reward])
    server.use_server()
    from .derive import rescore as rescore_flow

    found = asyncio.run(rescore_flow(config, run, first, end))
    for step, (before, after) in sorted(found.rewards.items()):
        console.print(f"  step {step}: mean reward {before:.3f} -> {after:.3f}", highlight=False)
    console.print(f"{into}: {found.samples} samples, {found.changed} with another reward")
    console.print(f"  store:   {found.run.url}")
    console.print(f"  compare: rollflow rollouts diff {run} {into} --store {store}")


def rollout(config: str, *words: Words, weights_of: str = "", step: int | None = None) -> None:
    """Generate and score samples without training: as many batches as the settings have steps.

    Parameters
    ----------
    config
        TOML file, or the name of a recipe.
    weights_of
        run whose checkpoint generates; the weights at model.path unless given.
    step
        step of that checkpoint; the newest unless given.
    """
    from .arguments import load_config, recipes

    resolved = load_config(recipes().get(config, config), words)
    server.use_server()
    from .rollout import rollout as rollout_flow

    found = asyncio.run(rollout_flow(resolved, weights_of, step))
    console.print(f"{resolved.name}: {len(found.batches)} batches in {found.run.url}")
    console.print(f"  train on them: rollflow replay {resolved.name} --into NEW")


def _words(words: tuple[str, ...], settings: list[str] | None) -> list[str]:
    """Both ways of giving a setting as one: ``--set a.b=1`` is ``--a.b=1``."""
    for setting in settings or []:
        if "=" not in setting:
            raise ValueError(f"--set {setting}: give name=value, e.g. algorithm.kl_coef=0.1")
    return [*words, *(f"--{setting}" for setting in settings or [])]


def _range(text: str) -> tuple[int, int | None]:
    found = re.fullmatch(r"(\d*):(\d*)", text)
    if not found:
        raise ValueError(f"--steps {text}: give a:b for steps a to b-1, e.g. 0:100 or 20:")
    return int(found[1] or 0), int(found[2]) if found[2] else None


def _print(config: "RunConfig", summary: "RunSummary", ui: str) -> None:
    from .show import print_summary

    print_summary(config, summary, ui, console)
