"""Settings of what is told about a run, and to whom."""

from pydantic import Field

from rollflow.storage.config import Config


class WandbConfig(Config):
    """Weights & Biases. The API key comes from the environment, as does ``WANDB_MODE=offline``."""

    project: str = "rollflow"
    entity: str = ""
    """Team or user; empty for the key's own."""


class MlflowConfig(Config):
    """MLflow. Credentials come from the environment."""

    tracking_uri: str = ""
    """Server, ``sqlite:///path`` or folder; empty for ``MLFLOW_TRACKING_URI``, or ``.rollflow/mlflow.db``."""
    experiment: str = "rollflow"


class ReportConfig(Config):
    """What is told about a run beside TensorBoard, which always is."""

    every: int = Field(default=1, ge=0)
    """An artifact in Prefect with metrics, reward histogram and three transcripts each so many steps, and
    for the last; 0: none. For runs of many thousand steps take 10 or more: each leaves about 10 KB in
    Prefect's database."""
    tasks_every: int = Field(default=1, ge=0)
    """Prefect is told the tasks of each so many steps, and of the last; 0: of none. Each step that it is
    told leaves about 155 KB in its database, most of it until its events expire (`rollflow bench --only orchestration`)."""
    page_every_s: float = Field(default=30.0, ge=0)
    """Seconds between two updates of the run's page in Prefect, its plots; 0: after every step."""
    wandb: WandbConfig | None = None
    """Also to Weights & Biases (``pip install 'rollflow[wandb]'``)."""
    mlflow: MlflowConfig | None = None
    """Also to MLflow (``pip install 'rollflow[mlflow]'``)."""
    prometheus_port: int = Field(default=0, ge=0, le=65535)
    """Newest metrics for Prometheus at ``http://127.0.0.1:PORT/metrics`` while the run goes on; 0: not."""
    prometheus_host: str = "127.0.0.1"
    """Address that the endpoint listens on; it has no password."""

    def shows(self, step: int, steps: int) -> bool:
        """Whether ``step`` of ``steps`` leaves an artifact."""
        return _due(self.every, step, steps)

    def tells(self, step: int, steps: int) -> bool:
        """Whether Prefect is told the tasks of ``step`` of ``steps``."""
        return _due(self.tasks_every, step, steps)


def _due(every: int, step: int, steps: int) -> bool:
    return every > 0 and (step % every == 0 or step + 1 == steps)
