"""For all tests: the same examples in every run, homes and stores of their own, and Triton's interpreter on a CPU."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Whether a test passes depends on the code alone: not on the machine's speed, not on the examples of the day.
# For other examples at each run: pytest --hypothesis-profile=other
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("other", deadline=None)
settings.load_profile("same")

# The Makefile exports one for the demo; a test says its own, or shows what happens without.
os.environ.pop("SLOTFORGE_HOME", None)

# It has to be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def no_store_of_another_test() -> Iterator[None]:
    """mlflow.set_tracking_uri leaves its address in the environment, where runs of later tests would find it."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)
