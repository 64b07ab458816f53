"""Compiles a Gluon kernel for Hopper, on any machine: python -m tests.kernels.hopper_compiler JSON.

A process of its own, since the tests' own runs Triton's interpreter where there is no GPU. The JSON object names the
module and the kernel, its constants, and the types of its arguments; "bf16[64, 128]" is a tensor descriptor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from typing import Any


def check_compiles(module: str, kernel: str, constants: dict[str, Any], types: dict[str, str]) -> None:
    """AssertionError when the kernel does not compile, or takes more shared memory than a multiprocessor has."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    request = json.dumps({"module": module, "kernel": kernel, "constants": constants, "types": types})
    command = [sys.executable, "-m", "tests.kernels.hopper_compiler", request]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    request = json.loads(sys.argv[1])
    kernel = getattr(import_module(request["module"]), request["kernel"])
    signature = {}
    for name in kernel.arg_names:
        kind = "constexpr" if name in request["constants"] else request["types"].get(name, "i32")
        if "[" in kind:
            bits = 8 if kind.startswith("fp8") else 16
            layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
            kind = f"tensordesc<{kind},{layout!r}>"
        signature[name] = kind
    constants = {(kernel.arg_names.index(name),): value for name, value in request["constants"].items()}
    source = GluonASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert compiled.metadata.shared <= 227 * 1024, f"{compiled.metadata.shared} bytes of shared memory"
    assert "wgmma" in compiled.asm["ptx"]


if __name__ == "__main__":
    main()
