"""SGLang's record of the experts that a server chose, in memory that nothing is pinned for."""

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode


def install() -> None:
    """Make ``enable_return_routed_experts`` work on a CPU.

    Call it as :func:`.seeded_sampling.install`.
    """
    from sglang.srt.state_capturer import base

    if not issubclass(base.BaseHostCache, _Unpinned):
        base.BaseHostCache = type("HostCache", (_Unpinned, base.BaseHostCache), {})


class _Unpinned:
    """Before SGLang's host cache: pinned memory is for copies from a GPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _WithoutPinning():
            super().__init__(*args, **kwargs)


class _WithoutPinning(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        return func(*args, **kwargs)
