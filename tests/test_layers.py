"""The shape of the code: layers import downwards only, the light parts stay light, no file grows without end."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "trine"

MAY_IMPORT = {
    "core": set(),
    "kernels": {"core"},
    "llm": {"kernels", "core"},
    "graph": {"kernels", "core"},
    "server": {"llm", "graph", "kernels", "core"},
    "service": {"server", "llm", "kernels", "core"},
    "evaluation": {"llm", "core"},
    "benchmark": {"server", "llm", "core"},
    "diagnostics": {"llm", "kernels", "core"},
    "cli": {"service", "server", "evaluation", "benchmark", "diagnostics", "llm", "graph", "kernels", "core"},
}
"""Each part of the package, and the parts that it may import (besides itself)."""

LONGEST_FILE = 1000
OPTIONAL = ("msgspec", "zmq", "pydantic", "starlette", "uvicorn", "llguidance", "xgrammar", "prometheus_client")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and name of each part of the package that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import; write the module's whole name"
            names = [node.module or ""]
            if node.module == "trine":
                names = [f"trine.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "trine" and rest:
                yield node.lineno, rest.partition(".")[0]


def files_of(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py"))


def test_every_part_of_the_package_has_its_place() -> None:
    parts = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert parts == set(MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_layers_import_downwards_only(part: str) -> None:
    allowed = MAY_IMPORT[part] | {part, "__version__"}
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports trine.{name}"
        for file in files_of(part)
        for line, name in imports(file)
        if name not in allowed
    ]
    assert not wrong


def test_the_rule_has_no_cycle() -> None:
    for part, below in MAY_IMPORT.items():
        assert all(part not in MAY_IMPORT[name] for name in below)


@pytest.mark.parametrize("folder", ["trine", "tests", "bench", "models"])
def test_no_file_is_too_long(folder: str) -> None:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert not {str(file.relative_to(ROOT)): lines for file, lines in lengths.items() if lines > LONGEST_FILE}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_trine_is_light() -> None:
    """`import trine` and the command's help must not wait for torch."""
    names = ("torch", "numpy", "starlette")
    code = f"import sys, trine, trine.cli.main; print([name for name in {names} if name in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_bookkeeping_needs_no_torch() -> None:
    """Scheduler and cache are plain Python."""
    modules = ("scheduler", "cache.blocks", "cache.prefix", "request")
    code = f"import sys\n{chr(10).join(f'import trine.llm.{name}' for name in modules)}\nprint('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_the_engine_in_process_needs_no_server_packages() -> None:
    """`LLM` runs where only the core dependencies are installed."""
    blocked = ", ".join(f"{name!r}: None" for name in OPTIONAL)
    code = f"import sys; sys.modules.update({{{blocked}}}); from trine import LLM, SamplingParams; print(LLM.__name__)"
    assert run_python(code).strip() == "LLM"
