"""What SGLang needs to run on a machine without CUDA: stand-ins for packages that it imports first.

SGLang's wheel imports ``triton``, ``torchvision`` and ``sgl_kernel`` at the top of its modules even
where a CPU engine never calls into them. None of the three has a wheel that works beside a CPU
build of PyTorch, so a process that is about to import SGLang calls ``install()`` first:

* ``triton``: the stand-in that SGLang ships in its own wheel for macOS, loaded from that file;
* ``torchvision``: modules made of the same stand-in (only image processors use it);
* ``sgl_kernel``: the one operation of it that every request needs, written in PyTorch; whatever
  else a CPU path asks for raises ``NotImplementedError`` when it is called.

Nothing is installed over a package that is there, nor on a machine with CUDA.
"""

import enum
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import _triton

STAND_INS = {"0.5.17": "_triton_stub.py", "0.5.18": "_platform_stubs.py"}
"""SGLang version -> the file of its wheel with the stand-in for triton."""


@cache
def install() -> None:
    """Make ``import sglang`` work in this process; call it before that import.

    Does nothing on a machine with CUDA or when called again. Raises RuntimeError on a version of
    SGLang that this support was not tested with.
    """
    if torch.cuda.is_available():
        return
    stub = _load_stub()
    if importlib.util.find_spec("triton") is None:
        _triton.has_triton_package()  # PyTorch keeps this answer: no compiler here
        _install_triton(stub)
    if importlib.util.find_spec("torchvision") is None:
        _install_torchvision(stub)
    if importlib.util.find_spec("sgl_kernel") is None:
        _install_sgl_kernel()
    torch.cuda.synchronize = _nothing_to_wait_for  # the weight checker calls it on every device


def fork_subprocesses() -> None:
    """Let SGLang's subprocesses start as forks of the server process instead of from nothing.

    They skip the imports, which are most of a CPU server's start (7 s instead of 16 s on one core).
    Call it once SGLang is imported and before the server is launched, in a process that computed
    nothing yet. Does nothing on a machine with CUDA, which no fork of a process that asked for it
    can use.
    """
    if torch.cuda.is_available():
        return
    from sglang.srt.entrypoints import engine

    configure = engine._set_envs_and_config

    def configure_then_fork(server_args: object) -> None:
        configure(server_args)  # pyright: ignore[reportArgumentType]
        multiprocessing.set_start_method("fork", force=True)

    engine._set_envs_and_config = configure_then_fork


def _nothing_to_wait_for(device: object = None) -> None:
    """A CPU has finished when a call returns."""


def _load_stub() -> ModuleType:
    version = importlib.metadata.version("sglang")
    if version not in STAND_INS:
        raise RuntimeError(
            f"sglang {version} on a CPU: the support in {__name__} was tested with "
            f"{' and '.join(STAND_INS)}; install one of these"
        )
    package = importlib.util.find_spec("sglang")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).with_name(STAND_INS[version])
    spec = importlib.util.spec_from_file_location("rollflow_sglang_stand_in", file)
    assert spec is not None
    assert spec.loader is not None
    stub = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = stub
    spec.loader.exec_module(stub)
    return stub


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves a package and every module below it as SGLang's stand-in modules."""

    def __init__(self, package: str, stub: ModuleType) -> None:
        self.package = package
        self.module_class = stub._MockModule

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != self.package:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return self.module_class(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """The stand-in makes its attributes when they are asked for."""


def _install_triton(stub: ModuleType) -> None:
    sys.meta_path.insert(0, _StandInFinder("triton", stub))
    triton = importlib.import_module("triton")
    triton.__dict__.update(
        __version__="3.0.0",
        cdiv=stub._cdiv,
        next_power_of_2=stub._next_power_of_2,
        Config=stub._Config,
    )
    language = importlib.import_module("triton.language")
    language.__dict__["constexpr"] = type("constexpr", (), {"__init__": lambda self, value: None})


def _install_torchvision(stub: ModuleType) -> None:
    sys.meta_path.insert(0, _StandInFinder("torchvision", stub))
    importlib.import_module("torchvision").__dict__["__version__"] = "0.0.0"
    transforms = importlib.import_module("torchvision.transforms")
    modes = ("NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
    transforms.__dict__["InterpolationMode"] = enum.Enum("InterpolationMode", modes)


class _SglKernel(ModuleType):
    """Holds what is written here; another CPU operation fails when called, not when imported."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.endswith("_cpu"):
            raise AttributeError(f"sgl_kernel has no {name} on a CPU")

        def missing(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"sgl_kernel.{name}: rollflow's CPU support does not have it")

        return missing


def _install_sgl_kernel() -> None:
    module = _SglKernel("sgl_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    module.__dict__["assign_req_to_token_pool_cpu"] = _assign_req_to_token_pool
    sys.modules["sgl_kernel"] = module


def _assign_req_to_token_pool(
    req_pool_indices_R: torch.Tensor,
    req_to_token: torch.Tensor,
    start_R: torch.Tensor,
    end_R: torch.Tensor,
    out_cache_loc_T: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's new cache locations into its row, columns start to end - 1."""
    done = 0
    rows = zip(req_pool_indices_R.tolist(), start_R.tolist(), end_R.tolist(), strict=True)
    for request, start, end in rows:
        count = end - start
        req_to_token[request, start:end] = out_cache_loc_T[done : done + count].to(
            req_to_token.dtype
        )
        done += count
