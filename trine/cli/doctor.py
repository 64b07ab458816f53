"""`trine doctor`: findings about the machine and a model, each problem with its remedy."""

from __future__ import annotations

import argparse
import dataclasses
import json

from trine.cli.options import MODEL_HELP
from trine.cli.terminal import styled

USAGE = "[MODEL] [options]"

DESCRIPTION = """\
Check this machine, and a model if one is given: processor, memory, disk, versions, GPUs and drivers, kernels, the port;
a model's configuration, files, architecture, size against the memory, tokenizer, chat template. No weights are loaded.

The exit code is 1 when something is found that keeps Trine, or the model, from working.
"""

EXAMPLES = """\
examples:
  trine doctor
  trine doctor ./Qwen2.5-0.5B-Instruct
  trine doctor --port 9000 --json
"""

_MARKS = {"ok": ("ok", "green"), "note": ("note", "cyan"), "warning": ("warn", "yellow"), "problem": ("FAIL", "red")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument("--port", type=int, default=8000, help="the port that you mean to serve on (default: 8000)")
    parser.add_argument("--json", action="store_true", help="the findings as one JSON object")


def run(args: argparse.Namespace) -> int:
    from trine.diagnostics.machine import examine_machine

    findings = list(examine_machine(args.port))
    problems = [finding for finding in findings if finding.severity == "problem"]
    if args.model is not None and not any(finding.name in ("core", "torch") for finding in problems):
        from trine.diagnostics.checkpoint import examine_model

        findings += examine_model(args.model)
        problems = [finding for finding in findings if finding.severity == "problem"]
    if args.json:
        print(json.dumps({"ok": not problems, "findings": [dataclasses.asdict(finding) for finding in findings]}))
        return 1 if problems else 0
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            print(styled(section, "bold"))
        mark, style = _MARKS[finding.severity]
        print(f"  {styled(f'{mark:<4}', style)}  {finding.name:<14} {finding.detail}")
        if finding.remedy:
            print(f"        {'':<14} {styled('->', 'bold')} {finding.remedy}")
    warnings = sum(finding.severity == "warning" for finding in findings)
    print(f"{count(len(problems), 'problem')}, {count(warnings, 'warning')}")
    return 1 if problems else 0


def count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
