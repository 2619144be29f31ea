"""Compiles the Triton kernels for machines that are not at hand, and prints what came out as JSON."""

import json
import os
import re
import subprocess
import tempfile
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adafactor.backends import _triton_kernels as kernels
from adafactor.backends.triton import options_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BF16, FP32, INT8 = tl.bfloat16, tl.float32, tl.int8
PLAIN = {"P": BF16, "G": BF16, "M": None, "PLANES": 0, "STOCHASTIC": True, "ALIGNED": True}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sweep bf16": (kernels.sweep, {"G": BF16, "ALIGNED": True}),
    "sweep fp32": (kernels.sweep, {"G": FP32, "ALIGNED": True}),
    "sweep bf16 unaligned": (kernels.sweep, {"G": BF16, "ALIGNED": False}),
    "finalize": (kernels.finalize, {}),
    "apply bf16": (kernels.apply, PLAIN),
    "apply bf16 bf16 momentum": (kernels.apply, {**PLAIN, "M": BF16}),
    "apply fp32": (kernels.apply, {**PLAIN, "P": FP32, "G": FP32, "STOCHASTIC": False}),
    "apply bf16 one-byte momentum 32 bits": (kernels.apply, {**PLAIN, "M": INT8, "PLANES": 2}),
    "apply fp16 unaligned": (kernels.apply, {**PLAIN, "P": tl.float16, "G": tl.float16, "ALIGNED": False}),
}
EVERYWHERE = ("sweep bf16", "sweep fp32", "finalize", "apply bf16", "apply bf16 bf16 momentum", "apply fp32")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def build(kernel: Any, constants: dict[str, Any], target: GPUTarget) -> Any:
    kinds = {"table": "*i64", "items": "*i64", "scratch": "*fp32"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in kinds}
    return triton.compile(ASTSource(kernel, signature, values, aligned), target=target, options=options_of(kernel))


def resources(built: Any) -> dict[str, int]:
    if "amdgcn" in built.asm:
        text = built.asm["amdgcn"]
        found = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}  # type: ignore[index]
        return {
            "registers": found["vgpr_count"],
            "spilled": found["vgpr_spill_count"],
            "wide loads": len(re.findall(r"load_dwordx4", text)),
            "wide stores": len(re.findall(r"store_dwordx4", text)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = built.asm["ptx"]
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return {
        "registers": int(registers),
        "spilled": int(stack),
        "wide loads": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)),
        "wide stores": len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx)),
        "16-bit loads": len(re.findall(r"ld\.global[\w.:]*\.b16", ptx)),
        "rough": len(re.findall(r"(?:div\.full|div\.approx|rcp\.approx|sqrt\.approx)[\w.]*\.f32|fma[\w.]*\.f32", ptx)),
    }


def conversions_in_loops(built: Any) -> int:
    """How often values change threads in the loops over tiles: the innermost ones that store."""
    open_loops: list[list[str]] = []
    count = 0
    for line in built.asm["ttgir"].splitlines():
        depth = len(line) - len(line.lstrip())
        if open_loops and line.startswith(" " * depth + "}") and depth == int(open_loops[-1][0]):
            body = open_loops.pop()
            if any("tt.store" in inner for inner in body) and not any("scf.for" in inner for inner in body):
                count += sum("ttg.convert_layout" in inner for inner in body)
        for body in open_loops:
            body.append(line)
        if "scf.for" in line:
            open_loops.append([str(depth)])
    return count


def measured(case: tuple[str, str]) -> tuple[str, dict[str, int]]:
    target, name = case
    built = build(*KERNELS[name], TARGETS[target])
    return f"{target} {name}", {**resources(built), "conversions in loops": conversions_in_loops(built)}


def main() -> None:
    cases = [(target, name) for target in TARGETS for name in KERNELS if name in EVERYWHERE or target == "sm_90"]
    with Pool(min(os.cpu_count() or 1, 4)) as workers:
        print(json.dumps(dict(workers.imap_unordered(measured, cases))))


if __name__ == "__main__":
    main()
