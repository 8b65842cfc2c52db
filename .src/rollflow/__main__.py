"""``python -m rollflow``: the ``rollflow`` command."""

from rollflow.flows.cli import main

main()
