"""A process that holds one trainer rank after another, told what to do over a connection.

It plays the part of a Ray actor. Such processes are forks of one that has imported this module.
"""

import warnings
from contextlib import ExitStack
from multiprocessing.connection import Client

from rollflow.engines.megatron.actor import TrainerRank
from rollflow.engines.platform import detect

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core warns of each package that is not there
    detect("cpu").import_megatron()
    from rollflow.engines.megatron import rank as _rank  # noqa: F401


def main(address: str) -> None:
    """Do what is told over the connection at ``address``."""
    warnings.simplefilter("ignore")
    rank: TrainerRank | None = None
    with Client(address) as owner, ExitStack() as faults:
        while (call := owner.recv()) is not None:
            method, args = call
            try:
                if method == "new":
                    rank, answer = TrainerRank(*args), None
                elif method == "break":
                    from tests.engines.megatron.faults import FAULTS

                    answer = faults.enter_context(FAULTS[args[0]]())
                elif method == "mend":
                    answer = faults.close()
                elif method in ("weights", "gradients"):
                    from tests.engines.megatron import weights_of_rank

                    answer = getattr(weights_of_rank, f"{method}_of_rank")(rank)
                elif method == "do":
                    from tests.engines.megatron import rank_tasks

                    answer = getattr(rank_tasks, args[0])(rank, *args[1:])
                else:
                    answer = getattr(rank, method)(*args)
                owner.send((answer, None))
            except Exception as error:  # noqa: BLE001 - the owner decides
                owner.send((None, f"{type(error).__name__}: {error}"))
