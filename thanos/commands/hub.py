"""Handing a pruned model to the Hugging Face hub, once it is saved here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from thanos.commands.cli import parsed
from thanos_kernels.errors import first_line


def hub_name(name: str) -> str:
    """The name of a repository on the hub.

    Raises:
        ValueError: it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name on the hub, such as me/llama-50: {first_line(error)}") from None
    return name


def hub_option(command: Any) -> Any:
    """The option ``--push-to-hub``."""
    return click.option(
        "--push-to-hub",
        metavar="NAME",
        callback=parsed(hub_name),
        help="Upload DIR to the hub under this name, once it is saved.",
    )(command)


def check_hub(name: str) -> None:
    """Refuse, before any work, an upload that the hub would not take.

    Raises:
        ValueError: nobody is logged in, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # from the network, the hub or a missing token
        raise ValueError(
            f"cannot upload to {name}: the hub does not know you ({first_line(error)}); log in with 'hf auth login' or "
            "set HF_TOKEN, or leave out --push-to-hub"
        ) from error


def push(folder: Path, name: str) -> str:
    """Upload a model's directory; it stays as it is.

    Returns:
        The address of the repository.

    Raises:
        ValueError: the upload failed, with how to go on.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        where = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=where.repo_id, folder_path=folder, commit_message="Upload a pruned model")
    except Exception as error:  # from the network or the hub
        raise ValueError(
            f"the model is saved in {folder}, but could not be uploaded to {name}: {first_line(error)}; "
            f"'hf upload {name} {folder}' tries again"
        ) from error
    return str(where)
