"""`trine models`: what can be served without a download, and what kinds of model can be served at all."""

from __future__ import annotations

import argparse
import json

from trine.cli.terminal import styled, table

USAGE = "[options]"

DESCRIPTION = (
    "List the models at hand (embedded in the package, or downloaded by the hub client) and what Trine can run."
)

EXAMPLES = """\
examples:
  trine models
  trine models --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    from trine.diagnostics.inventory import architectures, local_models

    models = local_models()
    supported = architectures()
    if args.json:
        print(json.dumps({"models": [model.as_dict() for model in models], "architectures": supported}))
        return 0
    print(styled("models at hand", "bold"))
    rows = [
        (model.name, model.where, model.architecture, model.size, "yes" if model.runs else "no") for model in models
    ]
    print(table(("name", "where", "architecture", "weights", "runs"), rows))
    print()
    print(styled("architectures", "bold"))
    for kind, names in supported.items():
        print(f"{kind:<11} {', '.join(names)}")
    print("A directory with a Hugging Face checkpoint of one of these is a MODEL too: trine serve ./DIRECTORY")
    return 0
