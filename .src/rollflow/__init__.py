"""rollflow: reinforcement-learning post-training of language models as a workflow."""


def __getattr__(name: str) -> str:
    """``__version__``, read when it is asked for: every process of a run imports this."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("rollflow")
