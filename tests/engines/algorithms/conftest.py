"""Random inputs are the same in every run: a failure here is a failure everywhere."""

from hypothesis import Phase, settings

settings.register_profile(
    "rollflow", deadline=None, derandomize=True, database=None, max_examples=60
)
# For mutants: that a test fails is enough, the smallest inputs for it are not looked for.
settings.register_profile(
    "first-failure", settings.get_profile("rollflow"), phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("rollflow")
