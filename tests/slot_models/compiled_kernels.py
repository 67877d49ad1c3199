"""What NVIDIA's assembler makes of the Triton kernels for a GPU that need not be there, as a line of JSON each.

    python tests/slot_models/compiled_kernels.py 90 bfloat16:256:24 float32:64:7

for compute capability 9.0, inputs of 256 channels in bfloat16 and 24 rows of a group, and so on. Stack is what a thread
keeps in memory for want of registers, in bytes; shared is what a program takes of a processor's own memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slot_models.iterations import kernels

OPTIONS = ("num_warps", "num_stages")
WHOLE_NUMBERS = ("count", "width", "group", "chunk", "passes")


def compiled(kernel: Any, inputs: torch.Tensor, constants: dict[str, Any], capability: int) -> dict[str, Any]:
    options = {name: constants[name] for name in OPTIONS}
    known = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in known:
            signature[name] = "constexpr"
        elif name in WHOLE_NUMBERS:
            signature[name] = "i32"
        elif name in ("added", "norm_eps"):
            signature[name] = "fp32"
        else:
            half = name in ("inputs", "d_inputs") and inputs.dtype == torch.bfloat16
            signature[name] = "*bf16" if half else "*fp32"
        if signature[name].startswith("*") or (name == "width" and inputs.shape[2] % 16 == 0):
            aligned[(place,)] = [["tt.divisibility", 16]]
    made = triton.compile(ASTSource(kernel, signature, known, aligned), GPUTarget("cuda", capability, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    return {"kernel": kernel.__name__, "registers": registers, "stack": stack, "shared": made.metadata.shared}


def all_of(capability: int, dtype: str, width: int, rows: int) -> Iterator[dict[str, Any]]:
    inputs = torch.empty(1, 4096, width, dtype=getattr(torch, dtype), device="meta")
    for kernel in (kernels._statistics, kernels._pool, kernels._pool_backward, kernels._inputs_backward):
        beside = 2 if kernel is kernels._inputs_backward else 1
        yield compiled(kernel, inputs, kernels._constants(inputs, rows, False, beside), capability)


def main() -> None:
    for case in sys.argv[2:]:
        dtype, width, rows = case.split(":")
        for resources in all_of(int(sys.argv[1]), dtype, int(width), int(rows)):
            print(json.dumps({"case": case, **resources}), flush=True)


if __name__ == "__main__":
    main()
