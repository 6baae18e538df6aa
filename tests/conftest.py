"""Hypothesis: the same examples in every run, however busy the machine; `--hypothesis-profile search` looks for new ones."""

from hypothesis import settings

settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None, derandomize=False)
settings.load_profile("same")
