"""Whether this process can run Triton's kernels without a GPU."""

import os
from importlib.util import find_spec

# Triton reads the variable when it is imported: from then on its kernels are interpreted, on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
