"""Random inputs are the same in every run: a failure here is a failure everywhere."""

from hypothesis import settings

settings.register_profile(
    "rollflow", deadline=None, derandomize=True, database=None, max_examples=60
)
settings.load_profile("rollflow")
