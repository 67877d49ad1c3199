"""Sections of BENCHMARKS.md that the benchmarks write, and what each says of the machine it ran on."""

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path

PAGE = Path(__file__).parents[1] / "BENCHMARKS.md"


def write(section: str, text: str, page: Path = PAGE) -> None:
    """Put the text between the section's markers, or at the end."""
    begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    before, found, rest = page.read_text().partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    page.write_text(f"{before.rstrip()}\n\n{begin}\n{text}\n{end}{after}")


def machine(device: str = "cpu") -> str:
    """The GPU, if that is the device, the processor, its cores, and how busy they are."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    if device != "cpu":
        import torch

        model = f"{torch.cuda.get_device_name(device)} beside {model}"
    return f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start"


def versions(*packages: str) -> str:
    """Those of the packages that are installed, with their versions."""
    found = []
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)
