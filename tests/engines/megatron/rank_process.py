"""One trainer rank in a process of its own, told what to do over a connection: a Ray actor's role."""

import sys
import warnings
from multiprocessing.connection import Client

from rollflow.engines.megatron.actor import TrainerRank


def main() -> None:
    warnings.simplefilter("ignore")
    with Client(sys.argv[1]) as owner:
        rank = TrainerRank(*owner.recv())
        while (call := owner.recv()) is not None:
            method, args = call
            try:
                owner.send((getattr(rank, method)(*args), None))
            except Exception as error:  # noqa: BLE001 - the owner decides
                owner.send((None, repr(error)))
        rank.stop()


if __name__ == "__main__":
    main()
