"""``deploy/prefect.yaml``: the deployments without presets, for those who use ``prefect deploy``."""

import yaml

from .deployments import Placement, deployments, registered

HEAD = """\
# Written by `rollflow deploy --yaml`. `prefect deploy --all --prefect-file deploy/prefect.yaml` tells
# a server of these deployments; `rollflow deploy` does too, and adds recipes, queues, limits and the
# automations (dead flows, evaluation of checkpoints).
"""


def as_yaml() -> str:
    """The file's text."""
    entries = [
        {
            "name": made.name,
            "description": made.description,
            "entrypoint": made.entrypoint,
            "tags": made.tags,
            "enforce_parameter_schema": True,
            "work_pool": {
                "name": made.work_pool_name,
                "work_queue_name": made.work_queue_name,
                "job_variables": made.job_variables,
            },
        }
        for made in (registered(d, Placement()) for d in deployments() if not d.parameters)
    ]
    text = yaml.safe_dump({"name": "rollflow", "deployments": entries}, sort_keys=False, width=100)
    return HEAD + text
