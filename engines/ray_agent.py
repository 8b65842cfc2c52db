"""What a private Ray starts as its dashboard's agent: a process that offers nothing, for there is no dashboard.

Ray wants one at all times. Its own takes a second and a half of a core until it is there, and goes on measuring.
"""

import sys

NOT_OFFERED = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
"""Ray reads each from a file of its session's folder; -1 is that of a service that is not in use."""
LOOK_S = 1.0


def main(arguments: list[str]) -> None:
    """Say that nothing is offered, then live as long as the raylet that started this process."""
    import os
    import time
    from pathlib import Path

    raylet = int(os.environ.get("RAY_RAYLET_PID") or os.getppid())  # it may have ended already
    given = dict(word.split("=", 1) for word in arguments if word.startswith("--") and "=" in word)
    session = Path(given["--session-dir"])
    for name in NOT_OFFERED:
        file = session / f"{name}_{given['--node-id']}"
        part = file.with_suffix(".part")
        part.write_text("-1")
        part.replace(file)
    while os.getppid() == raylet and session.is_dir():
        time.sleep(LOOK_S)


if __name__ == "__main__":
    del sys.path[0]  # this folder, in which modules have names of Python's own
    main(sys.argv[1:])
