"""The same examples on every run and every machine, however slow."""

from hypothesis import settings

settings.register_profile("deterministic", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("deterministic")
