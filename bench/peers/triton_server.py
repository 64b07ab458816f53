"""Starts the Triton Inference Server that the package nvidia-pytriton carries.

    python bench/peers/triton_server.py REPOSITORY [any flag of tritonserver …]

Run it with the Python of an environment that has the package; models of the Python back end run in it. The back end is
staged in a temporary folder, because it wants its stub for this Python beside it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path


def main() -> None:
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        sys.exit("nvidia-pytriton is not installed in this environment: pip install nvidia-pytriton")
    site = Path(found.origin).parent.parent
    root = site / "pytriton" / "tritonserver"
    stage = Path(tempfile.gettempdir()) / f"triton-stage-{os.getuid()}"
    python = stage / "python"
    if not python.exists():
        shutil.copytree(root / "backends" / "python", python)
        stub = python / "triton_python_backend_stub"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        shutil.copy(root / "python_backend_stubs" / version / stub.name, stub)
        stub.chmod(0o755)
    libraries = [
        f"{site}/nvidia_pytriton.libs",
        sysconfig.get_config_var("LIBDIR") or "",
        os.environ.get("LD_LIBRARY_PATH", ""),
    ]
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = f"{site}:{os.environ.get('PYTHONPATH', '')}"
    server = str(root / "bin" / "tritonserver")
    flags = [f"--backend-directory={stage}", f"--cache-directory={root}/caches"]
    os.execv(server, [server, f"--model-repository={sys.argv[1]}", *flags, *sys.argv[2:]])


if __name__ == "__main__":
    main()
