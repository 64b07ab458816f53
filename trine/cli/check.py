"""`trine check`: validate a model repository without starting a server."""

from __future__ import annotations

import argparse
import dataclasses
import json

from trine.cli.terminal import styled

USAGE = "DIR [DIR ...] [options]"

DESCRIPTION = """\
Validate a model repository: every configuration (with file and line of a mistake), versions, model files, ensembles'
graphs, warm-up data, as `trine serve --model-repository` would take them. No port is opened.

The exit code is 1 when a model could not be served.
"""

EXAMPLES = """\
examples:
  trine check ./models
  trine check ./models --load          load each model's weights too
  trine check ./models --json
"""

_MARKS = {"ok": ("ok", "green"), "note": ("note", "cyan"), "problem": ("FAIL", "red")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", metavar="DIR", nargs="+", help="a folder that holds a folder for each model")
    parser.add_argument("--load", action="store_true", help="load each model as well, and free it at once")
    parser.add_argument("--model-config-name", default="", metavar="NAME", help="prefer configs/NAME.pbtxt")
    parser.add_argument(
        "--disable-auto-complete-config", action="store_true", help="configurations must be whole as they are"
    )
    parser.add_argument("--json", action="store_true", help="the findings as one JSON object")


def run(args: argparse.Namespace) -> int:
    from trine.server.checking import check_repository
    from trine.server.repository import RepositorySettings

    settings = RepositorySettings(
        directories=tuple(args.directories),
        config_name=args.model_config_name,
        auto_complete=not args.disable_auto_complete_config,
    )
    findings = []
    for finding in check_repository(settings, load=args.load):
        findings.append(finding)
        if not args.json:
            mark, style = _MARKS[finding.severity]
            print(f"  {styled(f'{mark:<4}', style)}  {finding.model:<20} {finding.detail}")
    problems = [finding for finding in findings if finding.severity == "problem"]
    if args.json:
        print(json.dumps({"ok": not problems, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        models = len({finding.model for finding in findings})
        print(
            f"{models} model{'' if models == 1 else 's'}, {len(problems) or 'no'} "
            f"problem{'' if len(problems) == 1 else 's'}"
        )
    return 1 if problems else 0
