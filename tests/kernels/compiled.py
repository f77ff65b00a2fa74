"""Compiles the kernels for GPUs that are not there and prints what the assembler made of them, as JSON.

python -m tests.kernels.compiled

A process of its own: Triton decides once per process whether kernels are compiled or interpreted.
"""

import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

# Of one launch: pointers and numbers by the name of the kernel's parameter; what is missing is a constant.
POINTERS = {"targets": "*i64"} | dict.fromkeys(
    ("highest_ptr", "total_ptr", "weighted_ptr", "target_ptr", "products", "logps", "entropy"), "*fp32"
)
NUMBERS = ("tile_stride", "start", "columns", "width", "weight_stride")
HEAD = {"FIRST": False, "HAS_BIAS": True, "SCALE": 1.0, "CAP": 30.0, "TEMPERATURE": 0.9, "column_stride": 1}
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)


def main() -> None:
    from grpo_plus.kernels.linear_logprob import triton as head

    records = []
    for capability in CAPABILITIES:
        blocks = head.BLOCKS.get(divmod(capability, 10), head.DEFAULT_BLOCKS)
        half = "fp16" if capability == 75 else "bf16"  # Turing has no bf16 products
        cases = [(head._fold, half, True), (head._finish, half, True)]
        if capability in (75, 89):  # everything that a run in either precision starts
            cases += [(head._fold, half, False), (head._finish, half, False), (head._fold, "fp32", True)]
        for kernel, dtype, with_gradient in cases:
            block = blocks.columns if kernel is head._fold else 1024
            warps = blocks.warps if kernel is head._fold else 4
            constants = HEAD | {"WITH_GRADIENT": with_gradient, "BLOCK": block}
            records.append(compiled(kernel, dtype, constants, capability, warps))
    print(json.dumps(records))


def compiled(kernel, dtype: str, constants: dict, capability: int, warps: int) -> dict:
    """Compile with pointers and sizes that 16 divides, as they mostly are; registers, stack and shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(NUMBERS, "i32") | POINTERS
    signature = {name: "constexpr" if name in constants else types.get(name, f"*{dtype}") for name in kernel.arg_names}
    places = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    divisible = {places[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind != "constexpr"}
    values = {places[name]: value for name, value in constants.items() if name in places}
    started = time.perf_counter()
    made = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=values, attrs=divisible),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
    return {
        "kernel": kernel.__name__,
        "dtype": dtype,
        "with_gradient": constants["WITH_GRADIENT"],
        "capability": capability,
        "threads": 32 * warps,
        "seconds": time.perf_counter() - started,
        "shared": made.metadata.shared,
        "vector_loads": len(re.findall(r"ld\.global\S*\.v4", made.asm["ptx"])),
        **resources(made.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"),
    }


def resources(binary: bytes, cuobjdump: Path) -> dict:
    """Registers per thread; bytes of stack and of local memory, where registers spill to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        report = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main()
