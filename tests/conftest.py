"""For all tests: no examples are timed, and without a GPU Triton's kernels run in its interpreter."""

import os

import torch
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # whether a test passes does not depend on the machine's speed
settings.load_profile("untimed")

# It has to be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
