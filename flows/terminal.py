"""What the modules of the command line share: where they print, and the names of their options."""

from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef
from rollflow.storage.runs import open_run

console = Console(soft_wrap=True)
StoreUrl = Annotated[str, Parameter(help="Store that holds the runs: any fsspec URL.")]
DEFAULT_STORE = ".rollflow/store"
Words = Annotated[
    str,
    Parameter(
        allow_leading_hyphen=True,
        help="Settings laid over the file: --rollout-batch-size 64, --sglang-mem-fraction-static 0.5, --router-policy round_robin, --tensor-model-parallel-size 2.",
    ),
]


def opened(store_url: str, run: str) -> tuple[Store, RunRef]:
    """The store and the run in it; ``RunNotFound`` names the runs there are."""
    store = Store(StoreConfig(url=store_url))
    return store, open_run(store, run)
