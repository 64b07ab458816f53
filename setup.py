"""Builds the native CPU kernels (csrc/) beside the Python package; everything else is in pyproject.toml.

The compiler is clang as the PyPI package `ziglang` carries it, so that a machine without a compiler can build, and all
machines build the same; where that does not run, the system's C++ compiler. When neither works the installation still
succeeds: the reference kernels serve, and `trine doctor` says so.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# Source file: the processor it is compiled for, as clang's -mcpu and as GCC's -march with what that leaves out.
SOURCES = {
    "runtime.cpp": ("x86_64_v2", "x86-64-v2"),
    "pack.cpp": ("x86_64_v2", "x86-64-v2"),
    "penalties.cpp": ("x86_64_v2", "x86-64-v2"),
    "tape.cpp": ("x86_64_v2", "x86-64-v2"),
    "decoder.cpp": ("x86_64_v2", "x86-64-v2"),
    "api.cpp": ("x86_64_v2", "x86-64-v2"),
    "isa/avx2.cpp": ("haswell", "haswell"),
    "isa/avx512.cpp": ("cascadelake", "cascadelake"),
    "isa/avx512_bf16.cpp": ("cooperlake", "cooperlake"),
    "isa/amx.cpp": ("sapphirerapids", "sapphirerapids"),
    "isa/emulated.cpp": ("haswell", "haswell"),
}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
FLAGS += ["-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wno-unused-function"]
ZIG_FLAGS = ["-target", "x86_64-linux-gnu.2.28", "-fno-sanitize=all"]


def zig() -> list[str] | None:
    """The command that runs clang out of the ziglang package, if it is installed."""
    return [sys.executable, "-m", "ziglang", "c++"] if find_spec("ziglang") else None


def system_compiler() -> list[str] | None:
    """The C++ compiler of the system, if there is one."""
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, filter(None, (named, "clang++", "g++", "c++")))), None)
    return [found] if found else None


def compile_library(compiler: list[str], is_zig: bool, objects: Path, library: Path) -> None:
    """Compile csrc/ into the shared library `library`; CalledProcessError when the compiler fails."""
    objects.mkdir(parents=True, exist_ok=True)
    # GCC's own intrinsics warn by the thousand, and GCC 12 miscompiles those of AMX.
    extra = ZIG_FLAGS if is_zig else ["-w", "-DTRINE_NO_AMX"]
    sources = [source for source in SOURCES if is_zig or source != "isa/amx.cpp"]

    def compile_source(source: str) -> str:
        output = objects / (Path(source).stem + ".o")
        processor = f"-mcpu={SOURCES[source][0]}" if is_zig else f"-march={SOURCES[source][1]}"
        command = [*compiler, *FLAGS, *extra, processor, "-c", str(ROOT / "csrc" / source), "-o", str(output)]
        subprocess.run(command, check=True)
        return str(output)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = list(pool.map(compile_source, sources))
    library.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, then in its place: a process that has the old library mapped keeps it.
    fresh = library.with_suffix(".new")
    link = ["-shared", "-s", "-nostdlib++", "-lpthread", "-lm"] if is_zig else ["-shared", "-s", "-pthread", "-lm"]
    subprocess.run([*compiler, *(extra[:2]), *files, *link, "-o", str(fresh)], check=True)
    fresh.replace(library)


class BuildNative(build_ext):
    """Compiles the one extension, with the first compiler that works."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without Python's version in the name: the library does not use Python's C interface."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            print(
                "trine: the native CPU kernels are for Linux on x86-64; the reference kernels will serve",
                file=sys.stderr,
            )
            return
        for compiler, is_zig in ((zig(), True), (system_compiler(), False)):
            if compiler is None:
                continue
            try:
                compile_library(compiler, is_zig, Path(self.build_temp) / "native", library)
                return
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"trine: {compiler[-1]} can't build the native CPU kernels: {error}", file=sys.stderr)
        print("trine: no compiler built the native CPU kernels; the reference kernels will serve", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """What was built: nothing, where no compiler worked."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """For editable installations: built in the build directory, then copied into the checkout."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            if built.exists():
                target = ROOT / self.get_ext_filename(ext.name)
                fresh = target.with_suffix(".new")
                shutil.copy2(built, fresh)
                fresh.replace(target)


setup(ext_modules=[Extension("trine.kernels.cpu._native", sources=[])], cmdclass={"build_ext": BuildNative})
