"""Random inputs are the same in every run: a failure here is a failure everywhere."""

import os

from hypothesis import Phase, settings

settings.register_profile(
    "rollflow", deadline=None, derandomize=True, database=None, max_examples=60
)
# Of a broken algorithm any failure will do; the smallest is not looked for.
settings.register_profile(
    "mutants", settings.get_profile("rollflow"), phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("ROLLFLOW_HYPOTHESIS", "rollflow"))
