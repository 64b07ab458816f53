"""Compiles Gluon kernels for Hopper, on any machine, in one process of its own: the tests' runs Triton's interpreter.

A request is a line of JSON that names the module and the kernel, its constants, and the types of its arguments;
"bf16[64, 128]" is a tensor descriptor, "i32:16" a multiple of 16. The answer is a line with what was wrong, or an empty
string.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from functools import cache
from importlib import import_module
from typing import Any


@cache
def compiler() -> subprocess.Popen[str]:
    """The process, which ends with this one's standard input."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.hopper_compiler"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def check_compiles(
    module: str, kernel: str, constants: dict[str, Any], types: dict[str, str], num_warps: int = 4
) -> None:
    """AssertionError when the kernel does not compile, or takes more shared memory than a multiprocessor has."""
    process = compiler()
    assert process.stdin is not None
    assert process.stdout is not None
    request = {"module": module, "kernel": kernel, "constants": constants, "types": types, "num_warps": num_warps}
    print(json.dumps(request), file=process.stdin)
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, f"the compiler ended: {process.poll()}"
    assert not (wrong := json.loads(answer)), wrong


def compile_kernel(request: dict[str, Any]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = getattr(import_module(request["module"]), request["kernel"])
    signature, attributes = {}, {}
    for name in kernel.arg_names:
        kind = "constexpr" if name in request["constants"] else request["types"].get(name, "i32")
        kind, _, divisor = kind.partition(":")
        if divisor:
            attributes[(kernel.arg_names.index(name),)] = [["tt.divisibility", int(divisor)]]
        if "[" in kind:
            bits = 8 if kind.startswith("fp8") else 16
            row_bytes = int(kind.split()[-1].rstrip("]")) * bits // 8
            layout = gl.NVMMASharedLayout(swizzle_byte_width=min(128, row_bytes), element_bitwidth=bits, rank=2)
            kind = f"tensordesc<{kind},{layout!r}>"
        signature[name] = kind
    constants = {(kernel.arg_names.index(name),): value for name, value in request["constants"].items()}
    source = GluonASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": request["num_warps"]})
    assert compiled.metadata.shared <= 227 * 1024, f"{compiled.metadata.shared} bytes of shared memory"
    by_copies = any("desc" in kind for kind in signature.values())
    assert "wgmma" in compiled.asm["ptx"] or not by_copies


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the compiler prints is no answer
    for line in sys.stdin:
        try:
            compile_kernel(json.loads(line))
            wrong = ""
        except Exception:
            wrong = traceback.format_exc()
        print(json.dumps(wrong), file=answers, flush=True)


if __name__ == "__main__":
    main()
