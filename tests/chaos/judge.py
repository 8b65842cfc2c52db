"""What a finished run's log says, and whether it is sound and can be trained again from itself."""

import subprocess

from rollflow.storage.audit import audit_run
from rollflow.storage.steps import read_steps

from .harness import DEADLINE_S, ROLLFLOW, Session

Log = dict[int, tuple[str, dict[str, float]]]
"""Weights digest and metrics by step."""


def log_of(session: Session) -> Log:
    """Weights digest and metrics (no seconds) of each committed step."""
    steps = read_steps(session.store, session.run)
    return {
        s.step: (
            s.weights_digest,
            {k: v for k, v in s.metrics.items() if not k.startswith("perf/") and "cache" not in k},
        )
        for s in steps
    }


def audit_findings(session: Session) -> list[str]:
    """What an audit of the finished run finds, leftovers included."""
    report = audit_run(session.store, session.run)
    return [f"{f.name}: {f.reason}" for f in report.findings] + [
        f"left over: {leftover.url}" for leftover in report.leftovers
    ]


def replay_findings(session: Session) -> list[str]:
    """What differs when the finished run is trained again from its log, nothing generated."""
    command = [
        *(*ROLLFLOW, "audit", session.name, "--recompute"),
        *("--store", session.store.root),
    ]
    done = subprocess.run(
        command, cwd=session.folder, capture_output=True, text=True, timeout=DEADLINE_S
    )
    if done.returncode == 0:
        return []
    lines = [line.strip() for line in done.stdout.splitlines() if "different: " in line]
    return lines or [f"the replay failed: {done.stderr[-300:]}"]
