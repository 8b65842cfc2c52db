"""One iteration: generate, score, write, train, sync, commit."""

from rollflow.storage.refs import RunRef
from rollflow.tasks.commit import commit_step
from rollflow.tasks.engines import Engines
from rollflow.tasks.generate import generate
from rollflow.tasks.report import report
from rollflow.tasks.score import score
from rollflow.tasks.sync import sync_weights
from rollflow.tasks.train import train_step
from rollflow.tasks.write import find_batch, write_batch

from .config import RunConfig
from .progress import Progress


async def iteration(
    config: RunConfig, run: RunRef, engines: Engines, step: int, progress: Progress
) -> None:
    """Train step ``step``: on the batch that the log holds, or on a new one."""
    progress.begin(step)
    time = progress.time
    batch = await time("find", find_batch(config.store, run, step))
    if batch is None:  # what is in the log is never generated again
        groups = await time("generate", generate(engines, step))
        groups = await time("score", score(engines, groups))
        batch = await time("write", write_batch(engines, groups))  # commit point A
    result = await time("train", train_step(engines, batch))
    sync_s = await time("sync", sync_weights(engines, step + 1))
    record = await time("commit", commit_step(config.store, batch, result))  # commit point B
    metrics = progress.end(record, sync_s)
    await report(progress.board, batch, metrics)
