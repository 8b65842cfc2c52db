"""Where a run's scalars go beside Prefect: TensorBoard, and whatever is configured."""

import hashlib
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Gauge, start_http_server
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from rollflow.storage.refs import RunRef

from .config import MlflowConfig, ReportConfig, WandbConfig


class Tracker(Protocol):
    """Something that takes scalars by slash name."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Board:
    """TensorBoard scalars of one run, written under ``.rollflow/tensorboard/<run>``.

    Scalars have slash names. ``rollout/``, ``train/``, ``perf/`` and ``mismatch/`` are counted by
    step, ``eval/`` by the number of steps that the weights were trained.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer = EventFileWriter(str(folder))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one event with all ``metrics`` at ``step``."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()


class Wandb:
    """One W&B run for one run of ours: a run that goes on, goes on there too.

    W&B orders rows by a step of its own that may not fall; ``step`` and ``version`` are metrics that
    the charts are drawn by, so an evaluation that comes late finds its place.
    """

    def __init__(self, config: WandbConfig, run: RunRef, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project,
            entity=config.entity or None,
            id=_stable_id(run),
            name=run.name,
            resume="allow",
            config=dict(settings),
            dir=str(_folder(".rollflow/wandb")),
        )
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("eval/*", step_metric="version")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one row."""
        is_evaluation = all(name.startswith("eval/") for name in metrics)
        self._run.log({**metrics, "version" if is_evaluation else "step": step})

    def close(self) -> None:
        """Send what is buffered."""
        self._run.finish()


class Mlflow:
    """One MLflow run for one run of ours, found again by a tag when it goes on."""

    def __init__(self, config: MlflowConfig, run: RunRef, settings: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        local = f"sqlite:///{_folder('.rollflow')}/mlflow.db"
        uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(config.experiment)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(config.experiment)
        )
        standing = self._client.search_runs([experiment], f"tags.rollflow_url = '{run.url}'")
        if standing:
            self._id = standing[0].info.run_id
            self._client.set_terminated(self._id, "RUNNING")
        else:
            tags = {"rollflow_url": run.url}
            made = self._client.create_run(experiment, run_name=run.name, tags=tags)
            self._id = made.info.run_id
            for name, value in _flat(settings).items():
                self._client.log_param(self._id, name, value)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one batch of metrics."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        rows = [Metric(_allowed(n), value, now, step) for n, value in metrics.items()]
        self._client.log_batch(self._id, metrics=rows)

    def close(self) -> None:
        """Mark the run as ended, for now."""
        self._client.set_terminated(self._id)


class Prometheus:
    """The newest value of every metric, for a Prometheus server to fetch."""

    def __init__(self, host: str, port: int, run: RunRef) -> None:
        registry = CollectorRegistry()
        names = ("run", "metric")
        self._values = Gauge("rollflow_metric", "newest value", names, registry=registry)
        self._steps = Gauge("rollflow_step", "steps committed", ("run",), registry=registry)
        self._run = run.name
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ValueError(
                f"report.prometheus_port = {port} cannot be opened on {host}: {error}; give another"
            ) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Replace the values."""
        for name, value in metrics.items():
            self._values.labels(self._run, name).set(value)
        if not all(name.startswith("eval/") for name in metrics):
            self._steps.labels(self._run).set(step + 1)

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Trackers:
    """All of a run's trackers as one."""

    def __init__(self, config: ReportConfig, run: RunRef, settings: Mapping[str, Any]) -> None:
        check_trackers(config)
        board = Board(_folder(".rollflow/tensorboard") / run.name)
        self.folder = board.folder
        self._all: list[Tracker] = [board]
        self._failures: Counter[str] = Counter()
        if config.prometheus_port:
            self._all.append(Prometheus(config.prometheus_host, config.prometheus_port, run))
        if config.wandb:
            self._all.append(Wandb(config.wandb, run, settings))
        if config.mlflow:
            self._all.append(Mlflow(config.mlflow, run, settings))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give every tracker the metrics of a step, or of an evaluation."""
        for tracker in self._all:
            self._try(tracker, lambda t=tracker: t.write(step, metrics))

    def close(self) -> None:
        """Close them all."""
        for tracker in self._all:
            self._try(tracker, tracker.close)
        for name, count in self._failures.items():
            print(f"report: {count} writes to {name} failed; the store has every step's metrics")

    def _try(self, tracker: Tracker, work: Callable[[], None]) -> None:
        """A tracker that fails is told of, and does not end the run."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the tracker is somebody else's code
            name = type(tracker).__name__
            self._failures[name] += 1
            if self._failures[name] == 1:
                print(f"report: {name} failed: {error!r}; the run goes on without")


def check_trackers(config: ReportConfig) -> None:
    """Refuse a tracker whose package is not installed; ValueError says how to get it."""
    for name, wanted in (("wandb", config.wandb), ("mlflow", config.mlflow)):
        if wanted and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"report.{name} is set but the package {name} is not installed; "
                f"pip install 'rollflow[{name}]', or leave report.{name} out"
            )


def _allowed(name: str) -> str:
    """A metric's name as MLflow takes it: ``pass_at_4`` for ``pass@4``."""
    return name.replace("@", "_at_")


def _folder(path: str) -> Path:
    folder = Path(path).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _stable_id(run: RunRef) -> str:
    return f"{run.name}-{hashlib.sha256(run.url.encode()).hexdigest()[:8]}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
