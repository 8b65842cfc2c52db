"""Which faults of a store pass by themselves, and the bounded wait for them to do so."""

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class StoreError(OSError):
    """The store kept failing; the message names the operation, the object and the last fault."""


def with_retries(call: Callable[[], T], *, what: str, max_retries: int, backoff_s: float) -> T:
    """Give ``call()``; after a transient fault wait ``backoff_s * 2**attempt`` (jittered) and repeat.

    A fault that will not pass (a missing object, a refused permission) is raised at once and as it
    is; ``StoreError`` after ``max_retries`` repeats. ``what`` names operation and object.
    """
    for attempt in range(max_retries + 1):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            if attempt == max_retries:
                raise StoreError(
                    f"{what}: still failing after {attempt + 1} tries, last fault {error!r}"
                ) from error
        time.sleep(backoff_s * 2**attempt * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable: the last attempt returns or raises")


def is_transient(error: BaseException) -> bool:
    """Tell whether the same call may succeed a little later.

    fsspec's clients raise OSErrors, except botocore's and aiohttp's connection faults, which are
    recognised by name so that neither library has to be imported.
    """
    if isinstance(error, ConnectionError | TimeoutError | InterruptedError):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return any(f"{c.__module__}.{c.__name__}" in _TRANSIENT_CLASSES for c in type(error).__mro__)


_TRANSIENT_ERRNOS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EIO,
    getattr(errno, "EREMOTEIO", errno.EIO),  # s3fs: InternalError
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
_TRANSIENT_CLASSES = {
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.parsers.ResponseParserError",
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
}
