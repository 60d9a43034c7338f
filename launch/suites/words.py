"""From values to the words of a command line that gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def command_words(command: Any, values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give these values to the parameters of a click command.

    Args:
        command: a command of click.
        values: by the names of its parameters; None is given by no word.
    """
    positional: list[str] = []
    words: list[str] = []
    for parameter in command.params:
        value = values.get(str(parameter.name))
        given = list(map(str, value)) if isinstance(value, list | tuple) else [str(value)]
        if value is None:
            continue
        if parameter.param_type_name == "argument":
            positional += given
        elif isinstance(value, bool):
            words += parameter.opts[:1] if value else parameter.secondary_opts[:1]
        elif parameter.multiple:
            words += [word for text in given for word in (parameter.opts[0], text)]
        else:
            words += [parameter.opts[0], *given]
    return [*words, "--", *positional]
