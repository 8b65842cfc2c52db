"""Every parameter of every command says what it is for."""

from collections.abc import Iterator

from cyclopts import App

from rollflow.flows.cli import app


def commands(group: App, words: str = "rollflow") -> Iterator[tuple[str, App]]:
    """Those that do something, with how they are called."""
    for name in group:
        if not name.startswith("-"):
            command = group[name]
            if command.default_command is not None:
                yield f"{words} {name}", command
            yield from commands(command, f"{words} {name}")


def test_each_parameter_has_help():
    found = {
        f"{call} {argument.name}": argument.parameter.help
        for call, command in commands(app)
        for argument in command.assemble_argument_collection(parse_docstring=True)
    }
    assert "rollflow train --dry-run" in found
    assert [name for name, text in found.items() if not text] == []
