"""``recipe.yaml``: every option of a run, which ``thanos.prune --recipe`` runs again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from thanos.report.machine import versions

RECIPE = "recipe.yaml"
_NOTHING = {"", "null", "Null", "NULL", "~"}


def write_recipe(values: Mapping[str, Any], file: Path) -> None:
    """Write the options of a run.

    Args:
        values: plain values by the names that they have on the command line, without dashes in front; None is left out.
        file: where.
    """
    known = versions()
    made = ", ".join(f"{name} {known[name]}" for name in ("thanos-pruning", "torch", "transformers"))
    lines = yaml.safe_dump(
        {name: value for name, value in values.items() if value is not None},
        sort_keys=False,
        allow_unicode=True,
        width=10**6,
    )
    file.write_text(
        "# The run that made this model; the same versions on the same kind of machine make the same bytes again:\n"
        f"# python -m thanos.prune --recipe {file.name} --output DIR\n# Made with {made}.\n{lines}",
        encoding="utf-8",
    )


def read_recipe(file: Path, known: Iterable[str]) -> dict[str, Any]:
    """The options in a recipe, as text, as if they stood on the command line.

    Args:
        file: the recipe.
        known: the names that there are.

    Raises:
        ValueError: the file cannot be read, is no mapping, or has a key that is no option.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ValueError(f"the recipe {file} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise ValueError(f"the recipe {file}{line} is no YAML") from None
    if not isinstance(content, dict):
        raise ValueError(f"the recipe {file} holds no options, such as 'pattern: 0.5', one a line")
    names = sorted(known)
    found = {}
    for key, value in content.items():
        if not isinstance(key, str) or key not in names:
            raise ValueError(f"the recipe {file} has the key {key!r}, which is no option; they are {', '.join(names)}")
        if isinstance(value, dict) or (isinstance(value, list) and not all(isinstance(one, str) for one in value)):
            raise ValueError(f"the recipe {file} has no plain value for {key}")
        if value not in _NOTHING if isinstance(value, str) else True:
            found[key] = value
    return found
