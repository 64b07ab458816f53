"""An argument parser that answers a mistake with one line and its remedy."""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as written, options in wider columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(120, shutil.get_terminal_size().columns))


class Parser(argparse.ArgumentParser):
    """argparse with examples kept as written, no abbreviated flags, and suggestions for misspelt ones."""

    def __init__(self, prog: str, *, description: str, epilog: str, usage: str) -> None:
        super().__init__(
            prog, usage, description=description, epilog=epilog, formatter_class=HelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """One line on standard error, exit code 2."""
        print(f"trine: error: {message} ({self.prog} --help says more)", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)

    def refuse_unknown(self, unknown: Sequence[str]) -> NoReturn:
        """What no argument took: say which, and what was probably meant."""
        first = unknown[0]
        if not first.startswith("-"):
            self.error(f"unexpected argument {first!r}: quote a text that has spaces")
        flag = first.partition("=")[0]
        self.error(f"unknown option {flag}{did_you_mean(flag, self._option_string_actions)}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`: did you mean X?` when a known word is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f": did you mean {close[0]}?" if close else ""
