"""``make chaos``: many kills, a table and ``results.json``; exit status 1 where one was not survived."""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .harness import (
    ROLLFLOW,
    VICTIMS,
    Kill,
    Row,
    Session,
    Training,
    left_behind,
    plan,
    prepare,
)
from .judge import Log, audit_findings, log_of, replay_findings


def run_sessions(
    folder: Path,
    seed: int,
    kills: int,
    per_session: int,
    parallel: int = 1,
    first: int = 0,
    told: Callable[[list[Row]], None] = lambda rows: None,
    store: str = "",
    engines: int = 2,
    mode: str = "sync",
    last: Callable[[Session], None] | None = None,
) -> list[Row]:
    """Kill ``kills`` times, ``per_session`` in one run; judge against a run that nobody killed.

    ``first`` is the number in the schedule of the first of them.

    ``parallel`` sessions go on at once, each in a folder and with a Prefect server of its own.
    ``told`` hears of all rows so far whenever a session has ended. ``store``, ``engines`` and
    ``mode`` as :class:`Training` has them. ``last`` is done to each session after its kills; it has
    two more steps for that, and a short lease.
    """
    training = Training(1 + 2 * per_session, store, engines, mode)
    if last is not None:
        training = replace(training, steps=training.steps + 2, lease_s=20)
    schedule = plan(seed, first + kills)
    groups = [
        [
            Kill(k.seed + number + i, k.process, k.phase, 1 + 2 * i, k.delay_s)
            for i, k in enumerate(schedule[number : number + per_session])
        ]
        for number in range(first, first + kills, per_session)
    ]

    with ThreadPoolExecutor(parallel) as pool:
        baseline = pool.submit(_undisturbed, folder / "undisturbed", training)
        sessions = [
            pool.submit(_session, folder / f"kills-{number}", training, group, baseline, last)
            for number, group in enumerate(groups)
        ]
        rows: list[Row] = []
        for done in as_completed(sessions):
            rows += done.result()
            told(rows)
    return sorted(rows, key=lambda row: row.seed)


def write_results(file: Path, rows: list[Row]) -> None:
    """Write one JSON object a kill."""
    ordered = sorted(rows, key=lambda row: row.seed)
    file.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in ordered) + "\n]\n")


@contextmanager
def _prepared(folder: Path, training: Training) -> Iterator[Session]:
    folder.mkdir(parents=True)
    prepare(folder, training)
    session = Session(folder, "chaos")
    try:
        yield session
    finally:
        session.stop()
        subprocess.run([*ROLLFLOW, "down"], cwd=folder, check=False, timeout=60)


def _undisturbed(folder: Path, training: Training) -> Log:
    if not training.repeats:
        return {}
    with _prepared(folder, training) as session:
        wrong = session.finish()
        if wrong:
            log = (folder / "chaos.log").read_text()[-3000:]
            raise RuntimeError(f"the undisturbed run: {wrong}\n{log}")
        return log_of(session)


def _session(
    folder: Path,
    training: Training,
    kills: list[Kill],
    baseline: Future[Log],
    last: Callable[[Session], None] | None,
) -> list[Row]:
    with _prepared(folder, training) as session:
        answers = [session.strike(kill) for kill in kills]
        if last is not None:
            last(session)
        return _judge(session, kills, answers, session.finish(), baseline.result())


def _judge(
    session: Session, kills: list[Kill], answers: list[float | str], ended: str, baseline: Log
) -> list[Row]:
    log = {} if ended else log_of(session)
    findings = [ended] if ended else audit_findings(session)
    findings += [f"left behind: {p}" for p in left_behind(session.folder)]
    findings += [] if ended else replay_findings(session)
    changed = [] if ended else session.changed_durable()
    rows = []
    for i, (kill, answer) in enumerate(zip(kills, answers, strict=True)):
        until = kills[i + 1].step if i + 1 < len(kills) else len(baseline or log)
        steps = range(kill.step, until)
        equal = all(log.get(step) == baseline[step] for step in steps if baseline) and not any(
            "different: " in f for f in findings
        )
        seconds = round(answer, 1) if isinstance(answer, float) else None
        note = "; ".join([*([answer] if isinstance(answer, str) else []), *findings])
        rows.append(
            Row(
                seed=kill.seed,
                process=kill.process,
                phase=kill.phase,
                step=kill.step,
                recovered=isinstance(answer, float) and not ended,
                digest_equal=equal,
                lost=len(changed) + sum("sample" in f for f in findings),
                seconds_to_training=seconds,
                note=note,
            )
        )
    return rows


def main() -> int:
    """Run the schedule; print the table; write ``results.json`` beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=72)
    parser.add_argument("--per-session", type=int, default=len(VICTIMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="start at this kill of the schedule")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep logs and stores here")
    parser.add_argument("--store", default="", help="URL under which the runs are kept")
    parser.add_argument("--mode", default="sync", help="rollout.mode of the training")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.json"))
    options = parser.parse_args()
    console = Console()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="rf-chaos-"))
    console.print(f"logs and stores: {folder}")
    rows = run_sessions(
        folder,
        options.seed,
        options.kills,
        options.per_session,
        options.parallel,
        options.first,
        lambda so_far: write_results(options.output, so_far),
        options.store,
        mode=options.mode,
    )
    write_results(options.output, rows)
    table = Table(
        "seed", "process", "phase", "recovered", "digest equal", "lost", "s to training", "note"
    )
    for row in rows:
        table.add_row(
            str(row.seed), row.process, row.phase, str(row.recovered), str(row.digest_equal),
            str(row.lost), str(row.seconds_to_training), row.note[:60],
        )  # fmt: skip
    console.print(table)
    good = sum(row.recovered and row.digest_equal and not row.lost and not row.note for row in rows)
    console.print(f"{good} of {len(rows)} kills survived without a trace")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
