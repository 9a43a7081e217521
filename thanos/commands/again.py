"""How a run is made again: its command, and its recipe."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from thanos.report.recipe import read_recipe

# Where the result goes, how a run is taken up and read; everything else decides what comes out.
ASIDE = {"output", "overwrite", "resume", "stream", "recipe", "push_to_hub", "debug"}


@dataclass(frozen=True)
class Again:
    """What makes a run again.

    Attributes:
        values: every option by its name, see :func:`recipe_of`.
        context: of the command, which knows what was given.
    """

    values: Mapping[str, Any]
    context: click.Context

    def recipe(self, length: int) -> dict[str, Any]:
        """The options, with the length of sequence that the model takes."""
        return {**self.values, "sequence_length": length}

    def command(self, output: Path) -> str:
        """What was typed, without what was left to the defaults."""
        return command_of(self.context, "thanos.prune", {**self.values, "output": str(output)})


def recipe_option(command: Any) -> Any:
    """The option ``--recipe``: a file of options, which those on the command line overrule."""
    return click.option(
        "--recipe",
        metavar="FILE",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_take,
        help="Take options from a recipe.yaml, such as the one in a pruned model; those given here come first.",
    )(command)


def _take(context: click.Context, _: click.Parameter, file: Path | None) -> None:
    if file is None:
        return
    names = {parameter.name for parameter in _recorded(context)} | {"output"}
    try:
        found = read_recipe(file, (name for name in names if name is not None))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    context.default_map = {**(context.default_map or {}), **found}


def recipe_of(context: click.Context, *jobs: Any) -> dict[str, Any]:
    """Every option of a run with its value, the defaults too, as plain values.

    Args:
        context: of the command.
        jobs: what the command made of its arguments; an option that none of them has as an attribute is left out.
    """
    found = {}
    for parameter in _recorded(context):
        name = parameter.name
        job = next((job for job in jobs if name is not None and hasattr(job, name)), None)
        if name is None or job is None:
            continue
        value = _plain(getattr(job, name))
        if value is not None and value is not False and value != []:
            found[name] = value
    return found


def command_of(context: click.Context, module: str, values: Mapping[str, Any]) -> str:
    """The command line of a run, without what was left to the defaults.

    Args:
        context: of the command.
        module: what was run with ``python -m``.
        values: those of :func:`recipe_of`, and the output.
    """
    words = ["python", "-m", module]
    for parameter in context.command.params:
        name = parameter.name
        if name is None or name not in values or context.get_parameter_source(name) is ParameterSource.DEFAULT:
            continue
        given = values[name]
        for value in given if isinstance(given, list) else [given]:
            if isinstance(parameter, click.Argument):
                words.append(str(value))
            elif value is True:
                words.append(parameter.opts[0])
            else:
                words += [parameter.opts[0], str(value)]
    return shlex.join(words)


def _recorded(context: click.Context) -> Iterator[click.Parameter]:
    return (parameter for parameter in context.command.params if parameter.name not in ASIDE)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
