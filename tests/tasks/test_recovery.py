"""Recovery from the log, with an engine that is lost at will."""

from dataclasses import replace

import pytest

from rollflow.engines.cluster import EngineDiedError
from rollflow.flows.arguments import build_config
from rollflow.storage import lease as leases
from rollflow.storage.objects import Store
from rollflow.storage.runs import create_run
from rollflow.storage.steps import commit_step
from rollflow.tasks import recovery
from rollflow.tasks.engines import StartError
from rollflow.tasks.recovery import from_the_log, only_writer


@pytest.fixture
def config(tmp_path):
    return build_config(
        {
            "name": "run",
            "steps": 9,
            "model": {"path": "model"},
            "data": {"path": "train.jsonl"},
            "rollout": {"reward": "pkg.mod:fn"},
            "store": {"url": str(tmp_path)},
            "cluster": {"max_recoveries": 2},
        }
    )


@pytest.fixture
async def lease(config, monkeypatch):
    monkeypatch.setattr(recovery, "get_run_logger", lambda: __import__("logging").getLogger())
    run = create_run(Store(config.store), config.name, {}, {}, "")
    async with only_writer(config, run) as lease:
        yield lease


async def test_the_loss_of_an_engine_starts_the_work_again_under_a_new_epoch(config, lease):
    epochs = []

    async def work(plan):
        epochs.append(plan.run.epoch)
        if len(epochs) == 1:
            raise EngineDiedError("engine 'trainer-0' died during train")
        return "done"

    assert await from_the_log(config, lease, work) == "done"
    assert epochs == [1, 2]


async def test_too_many_losses_without_a_committed_step_end_the_run(config, lease):
    attempts = []

    async def work(plan):
        attempts.append(plan)
        raise EngineDiedError("engine 'rollout' died during generate")

    with pytest.raises(EngineDiedError):
        await from_the_log(config, lease, work)
    assert len(attempts) == 1 + config.cluster.max_recoveries


async def test_engines_that_do_not_start_twice_in_a_row_end_the_run(config, lease):
    attempts = []

    async def work(plan):
        attempts.append(plan)
        raise StartError("the engines did not start: no module named x")

    with pytest.raises(StartError, match="no module named x"):
        await from_the_log(config, lease, work)
    assert len(attempts) == 2


async def test_a_committed_step_makes_the_count_of_losses_start_anew(config, lease):
    attempts = []

    async def work(plan):
        step = len(attempts)
        attempts.append(plan)
        if step == 6:
            return "done"
        commit_step(Store(config.store), plan.run, step, f"batch {step}", f"weights {step}", {})
        raise EngineDiedError("engine 'trainer-1' died during train")

    assert await from_the_log(config, lease, work) == "done"


async def test_what_is_no_fault_of_an_engine_is_not_tried_again(config, lease):
    async def work(plan):
        raise ValueError("gate")

    with pytest.raises(ValueError, match="gate"):
        await from_the_log(config, lease, work)


async def test_a_second_writer_is_refused_by_the_name_of_the_first(config, lease):
    with pytest.raises(leases.LeaseHeldError, match="'run'"):
        async with only_writer(config, lease.run):
            pass


async def test_an_attempt_that_was_given_up_cannot_commit(config, lease):
    late = []

    async def work(plan):
        late.append(plan)
        if len(late) == 1:
            raise EngineDiedError("engine 'trainer-0' died during train")
        return "done"

    await from_the_log(config, lease, work)
    with pytest.raises(leases.LeaseLostError):
        commit_step(Store(config.store), replace(late[0].run), 0, "batch", "weights", {})
