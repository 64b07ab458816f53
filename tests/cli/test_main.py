"""The command line itself: help, exit codes, mistakes answered with what was meant."""

from __future__ import annotations

import subprocess
import sys

import pytest

import trine
from trine.cli.main import COMMANDS, main


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line."""
    try:
        code = main(argv)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_without_arguments_it_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys)
    assert (code, err) == (0, "")
    assert all(name in out for name in COMMANDS)
    assert "examples:" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert f"usage: trine {name}" in out
    assert f"  trine {name}" in out.partition("examples:")[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "--version") == (0, f"trine {trine.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["srve", "tiny"], ["unknown command 'srve'", "did you mean serve?"]),
        (["frobnicate"], ["unknown command 'frobnicate'"]),
        (["serve", "tiny", "--prot", "1"], ["unknown option --prot", "did you mean --port?"]),
        (["run", "tiny", "Hello", "world"], ["unexpected argument 'world'", "quote"]),
        (["serve", "tiny", "--port", "http"], ["--port", "'http'"]),
        (["serve", "tiny", "--dtype", "int3"], ["--dtype", "'int3'", "bfloat16"]),
        (["serve", "tiny", "--cache-memory", "lots"], ["--cache-memory", "'lots'", "4GiB"]),
        (["bench", "tiny", "--concurrency", "1,0"], ["--concurrency", "0 is too small"]),
        (["run"], ["MODEL"]),
    ],
)
def test_usage_errors_are_one_line_with_the_remedy(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = outcome(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("trine: error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words)


def test_abbreviated_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """`--max` must not become whichever option happens to begin so in the next release."""
    code, _, err = outcome(capsys, "serve", "tiny", "--max-model", "5")
    assert code == 2
    assert "--max-model-len" in err


def test_the_installed_command_and_the_module_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "trine", "srve"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("trine: error: unknown command 'srve'")


def test_a_closed_pipe_is_not_an_error_message() -> None:
    command = f"{sys.executable} -m trine serve --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: trine serve")
    assert done.stderr == ""
