"""One iteration: a batch, train, sync, commit."""

from rollflow.tasks.commit import commit_step
from rollflow.tasks.engines import Engines
from rollflow.tasks.grain import told
from rollflow.tasks.train import train_step

from .config import RunConfig
from .production import Production
from .progress import Progress


async def iteration(
    config: RunConfig, production: Production, engines: Engines, step: int, progress: Progress
) -> None:
    """Train step ``step``: on the batch that the log holds, or on a new one."""
    progress.begin(step)
    time = progress.time
    with told(config.report.tells(step, config.steps)):
        batch = await production.batch(step)  # commit point A
        result = await time("train", train_step(engines, batch))
        sync = await production.sync(step + 1)
        record = await time("commit", commit_step(config.store, batch, result))  # commit point B
        await progress.report(batch, record, sync)
