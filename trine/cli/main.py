"""The `trine` command: finds the subcommand, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import trine
from trine.cli.failures import explain
from trine.cli.parser import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, Parser, did_you_mean

COMMANDS = {
    "serve": "serve a model over HTTP, with OpenAI's API",
    "run": "answer one prompt",
    "chat": "talk with a model in the terminal",
    "bench": "measure a model here, or a server by its URL",
    "build": "compile an ONNX model into a plan",
    "refit": "put other weights into a plan",
    "eval": "score a model on tasks with one right answer",
    "check": "validate a model repository without starting a server",
    "explain": "why a request to a running server took what it took",
    "traffic": "spread a model's requests over its versions",
    "doctor": "check this machine, or a model directory, and say what to do",
    "models": "list the models at hand and the architectures that run",
}
"""Each is a module of this package: `add_arguments(parser)`, `run(args) -> exit code`, USAGE, DESCRIPTION, EXAMPLES."""

DESCRIPTION = "Trine: one open inference stack."

EXAMPLES = """\
examples:
  trine serve tiny                          the embedded model on http://127.0.0.1:8000
  trine serve ./Qwen2.5-0.5B-Instruct       a directory with a Hugging Face checkpoint
  trine run tiny "What is 12 + 30?"
  trine chat tiny
  trine doctor ./Qwen2.5-0.5B-Instruct      will it load? if not, why not?

`trine COMMAND --help` explains a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`trine models | head`): Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"trine: error: {line}", file=sys.stderr)
        return EXIT_FAILURE


def dispatch(arguments: list[str]) -> int:
    """Parse, and run the subcommand. Only its own module is imported: `--help` pays for no other."""
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return EXIT_OK
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name is None or name != arguments[0]:
        parser.parse_args(arguments)  # --help and --version end here
        return EXIT_OK
    if name not in COMMANDS:
        parser.error(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}")
    module = import_module(f"trine.cli.{module_name(name, arguments[1:])}")
    own = build_subparser(name, module)
    args, unknown = own.parse_known_args(arguments[1:])
    if unknown:
        own.refuse_unknown(unknown)
    return int(module.run(args))


def module_name(command: str, arguments: list[str]) -> str:
    """`run` and `bench` of a plan or an ONNX model have modules of their own."""
    if command in ("run", "bench") and any(argument.endswith((".plan", ".onnx")) for argument in arguments[:1]):
        return f"{command}_plan"
    return command


def build_parser() -> Parser:
    listing = "\n".join(f"  {name:<8} {summary}" for name, summary in COMMANDS.items())
    description = f"{DESCRIPTION}\n\ncommands:\n{listing}"
    parser = Parser("trine", description=description, epilog=EXAMPLES, usage="trine COMMAND [options]")
    parser.add_argument("--version", action="version", version=f"trine {trine.__version__}")
    return parser


def build_subparser(name: str, module: ModuleType) -> Parser:
    parser = Parser(
        f"trine {name}",
        description=module.DESCRIPTION,
        epilog=module.EXAMPLES,
        usage=f"trine {name} {module.USAGE}",
    )
    module.add_arguments(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
