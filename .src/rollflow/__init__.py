"""rollflow: reinforcement-learning post-training of language models as a workflow."""

from importlib.metadata import version

__version__ = version("rollflow")
