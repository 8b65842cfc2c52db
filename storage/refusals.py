"""Faults of a store that waiting will not mend, in words that say what will."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

CREDENTIALS = (
    "credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "AWS_PROFILE) or the machine's role"
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")


class StoreRefused(OSError):
    """The store does not do what was asked, and will not until somebody mends the cause."""


class StoreAccessError(StoreRefused, PermissionError):
    """The store refuses these credentials, or there are none."""


def explained(error: Exception, what: str, url: str) -> Exception | None:
    """Give the error to raise in place of ``error``; None where that says enough by itself.

    ``what`` names operation and object.
    """
    if type(error).__name__ in _NO_CREDENTIALS:
        return StoreAccessError(f"{what}: no credentials ({error}); {CREDENTIALS}")
    if isinstance(error, PermissionError) and not isinstance(error, StoreRefused):
        help_ = CREDENTIALS if "://" in url else "check owner and mode of the folder"
        return StoreAccessError(f"{what}: access denied ({error}); {help_}")
    if is_missing_bucket(error):
        bucket = url.partition("://")[2].partition("/")[0]
        return StoreRefused(
            f"{what}: bucket {bucket!r} does not exist; create it or mend store.url"
        )
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return StoreRefused(error.errno, f"{what}: {_room(url)}; make room and run the same again")
    return None


def is_missing_bucket(error: BaseException) -> bool:
    """Tell whether not the object but its whole bucket is missing."""
    response: Any = getattr(error.__cause__ or error, "response", {})
    return response.get("Error", {}).get("Code") == "NoSuchBucket"


def refuse_secrets(options: dict[str, Any]) -> None:
    """ValueError where options hold credentials: a run's settings are stored and shown."""
    secret = ("key", "secret", "token", "username", "password", "account_key", "sas_token")
    for name in options:
        if name in secret or name.startswith("aws_") or name.endswith(("_secret", "_password")):
            raise ValueError(f"store.options.{name} holds a secret; {CREDENTIALS}")
    refuse_nested = options.get("client_kwargs")
    if isinstance(refuse_nested, dict):
        refuse_secrets(refuse_nested)


def _room(url: str) -> str:
    if "://" in url:
        return "no space left in the store"
    folder = next(p for p in Path(url).parents if p.exists())
    usage = shutil.disk_usage(folder)
    text = f"no space left on the disk of {folder} ({usage.free} of {usage.total} bytes are free)"
    return text if os.access(folder, os.W_OK) else f"{text}, which is read-only"
