"""The program by which a private Ray starts a worker: it puts the environment in place and becomes the worker.

Ray's own imports all of Ray for that, half of what a worker takes until it is there. This one knows what our
clusters ask for, and leaves the rest to Ray's.
"""

import sys


def main(arguments: list[str]) -> None:
    """Become the worker that Ray describes in ``arguments``."""
    import json
    import os
    from pathlib import Path

    given: dict[str, str] = {}
    rest: list[str] = []
    for word in arguments:
        name, _, value = word.partition("=")
        if name in ("--serialized-runtime-env-context", "--language"):
            given[name] = value
        else:
            rest.append(word)
    context = json.loads(given.get("--serialized-runtime-env-context") or "{}")
    variables = context.pop("env_vars", None) or {}
    python = context.pop("py_executable", None) or sys.executable
    asks_more = any(context.values()) or any("$" in value for value in variables.values())
    if asks_more or given.get("--language") != "PYTHON" or python != sys.executable:
        worker = next(word for word in rest if not word.startswith("-"))
        rays_own = str(Path(worker).with_name("setup_worker.py"))
        os.execv(sys.executable, [sys.executable, rays_own, *arguments])
    os.environ.update(variables)
    os.execv(python, [python, *rest])


if __name__ == "__main__":
    del sys.path[0]  # this folder, in which modules have names of Python's own
    main(sys.argv[1:])
