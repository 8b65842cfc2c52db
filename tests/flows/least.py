"""The least that the settings of a run hold."""

BASE = {
    "name": "run",
    "steps": 3,
    "model": {"path": "model"},
    "data": {"path": "train.jsonl"},
    "rollout": {"reward": "pkg.mod:fn"},
}
