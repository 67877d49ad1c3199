"""What is measured on a GPU, in under eight minutes: slot attention, and CLEVR's training step.

python benchmarks/gpu.py [--write]      # torch, einops, numpy, triton are enough; nothing need be installed from here
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_attention, gpu_autoencoder
from benchmarks.clevr_layers import CLEVR
from benchmarks.page import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into BENCHMARKS.md")
    options = parser.parse_args()
    parts = ["## On a GPU", "    python benchmarks/gpu.py"]
    for report in (gpu_attention.report, lambda: gpu_autoencoder.report(CLEVR)):
        parts.append(report())
        print(parts[-1], flush=True)
    if options.write:
        write("gpu", "\n\n".join(parts))


if __name__ == "__main__":
    main()
