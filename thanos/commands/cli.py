"""What the commands share: one-line errors, checked options, and how they are started."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
from collections.abc import Mapping
from typing import Any

import click
import torch

from thanos.text.beginning import BOS
from thanos_kernels.errors import first_line

TEXT = "c4|wikitext2|builtin|FILE|DIR"
_INTERRUPTED = 130
_DEBUG = "thanos.debug"


class Command(click.Command):
    """A command whose every error is one line on stderr, unless ``--debug`` asks for the traceback."""

    def __init__(self, *args: Any, **extra: Any) -> None:
        super().__init__(*args, **extra)
        self.params.append(
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                callback=lambda context, _, shown: context.meta.update({_DEBUG: shown}),
                help="Show the whole traceback of an error.",
            )
        )

    def main(self, *args: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False
        try:
            sys.exit(super().main(*args, **extra))
        except click.ClickException as error:
            message = " ".join(error.format_message().split())
            if not isinstance(error, click.UsageError) or os.environ.get("RANK", "0") == "0":
                click.echo(f"Error: {message}", err=True)  # of several processes that torchrun starts, one says so
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt) as error:
            click.echo(f"Error: interrupted; {error.__cause__ or error or 'nothing was written'}", err=True)
            sys.exit(_INTERRUPTED)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            if ctx.meta[_DEBUG]:
                raise
            raise click.ClickException(sentence(error)) from error


def start(command: click.Command) -> None:
    """Run a command; SIGTERM ends it as Ctrl-C does, so that nothing half-written is left."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command()


def sentence(error: BaseException) -> str:
    """An error in one line; its type is named where its text was not written for users."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def default_of(options: type, name: str) -> Any:
    """The default of a field of a dataclass of options."""
    return next(field.default for field in dataclasses.fields(options) if field.name == name)


def parsed(parse: Any) -> Any:
    """A click callback from a function that raises ValueError; it is called once a value."""

    def callback(_: click.Context, __: click.Parameter, value: Any) -> Any:
        try:
            if isinstance(value, tuple):
                return tuple(parse(one) for one in value)
            return value if value is None else parse(value)
        except (ValueError, RuntimeError, re.error) as error:
            raise click.BadParameter(first_line(error)) from None

    return callback


def usable_device(name: str) -> torch.device:
    """The device of that name, which must work here."""
    device = torch.device(name)
    if device.type == "meta":
        raise ValueError("the meta device holds no weights")
    try:
        torch.empty(0, dtype=torch.uint8, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name} cannot be used here: {first_line(error)}") from None
    return device


def usage_error(error: Exception, options: Mapping[str, str]) -> click.UsageError:
    """An error of a command's use; the option whose name it begins with is called as on the command line.

    Args:
        options: from the names that errors begin with (spaces there are underscores here) to those of the options.
    """
    said = str(error)
    named = {name.replace("_", " "): "--" + option.replace("_", "-") for name, option in options.items()}
    first = max((name for name in named if re.match(rf"{re.escape(name)}\b", said)), key=len, default="")
    return click.UsageError(named.get(first, "") + said.removeprefix(first))


def default_device(chosen: torch.device | None) -> torch.device:
    """``chosen``, or else a GPU where there is one."""
    return chosen or torch.device("cuda" if torch.cuda.is_available() else "cpu")


_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def read_bytes(text: str) -> int:
    """``"8GiB"``, ``"500MB"`` or ``"1000000"`` in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"{text!r} is no number of bytes, such as 8GiB, 500MB or 1000000")
    size = int(float(found[1]) * _UNITS[found[2]])
    if size < 1:
        raise ValueError(f"memory limit must be at least 1 byte, not {text}")
    return size


def source(name: str) -> str:
    """The name of a text, which must be known, a file or a directory."""
    from thanos.text import check_source

    check_source(name)
    return name


DEVICE_OPTION = click.option(
    "--device",
    callback=parsed(usable_device),
    help="Where to work, such as cpu or cuda:0.  [default: cuda, if there is one]",
)
DTYPE_OPTION = click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the weights, the forwards and the saved model; auto is the checkpoint's own, float32 for GGUF files.",
)
TRUST_OPTION = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the Python code that comes with the model, with all that you may do here. Read it first.",
)
STREAM_OPTION = click.option(
    "--stream",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "yes", "no"]),
    help="Read each block from the files when its turn comes; auto: where the model takes over half of the memory.",
)
WINDOWS_OPTION = click.option(
    "--windows", type=click.IntRange(min=1), help="Take the first N windows of a text for perplexity only."
)


def text_options(command: Any) -> Any:
    """The options that say how texts are read, ``--bos`` and ``--text-field``."""
    bos = click.option(
        "--bos",
        default="auto",
        show_default=True,
        type=click.Choice(BOS),
        help="Whether each sequence of text starts with a begin-of-sequence token; auto asks the tokenizer.",
    )
    text_field = click.option(
        "--text-field",
        metavar="NAME",
        help="Field of a text's records that holds it.  [default: text, or else a chat in messages or conversations]",
    )
    return bos(text_field(command))
