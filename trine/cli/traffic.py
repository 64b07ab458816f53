"""`trine traffic`: spread a model's requests over its versions, promote one, roll back."""

from __future__ import annotations

import argparse
import json
from urllib.parse import quote

from trine.cli.remote import add_url, ask

USAGE = "MODEL [VERSION=WEIGHT ...] [options]"

DESCRIPTION = """\
Spread the requests that name no version over the versions of a model, on a running server; without weights, show how
they are spread. The versions must be served side by side (version_policy). A request with the header
trine-traffic-key always goes to the same version while the weights stay; trine-traffic-version chooses one.
"""

EXAMPLES = """\
examples:
  trine traffic resnet 1=90 2=10      a tenth of the requests to version 2
  trine traffic resnet                how it is going
  trine traffic resnet --promote 2    all of them to version 2
  trine traffic resnet --rollback     as before the last change
  trine traffic resnet --off          all to the newest version, the default
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the model's name")
    parser.add_argument("weights", metavar="VERSION=WEIGHT", nargs="*", help="such as 1=90 2=10")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--promote", metavar="VERSION", help="all requests to this version")
    one.add_argument("--rollback", action="store_true", help="as before the last change")
    one.add_argument("--off", action="store_true", help="all requests to the newest version")
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="the answer as JSON")


def run(args: argparse.Namespace) -> int:
    from trine.core.errors import ConfigurationError
    from trine.server.traffic import TrafficSplit

    if args.weights and (args.promote or args.rollback or args.off):
        raise ConfigurationError("give weights, or one of --promote, --rollback and --off")
    path = f"/v2/models/{quote(args.model, safe='')}/traffic"
    body: dict[str, object] | None = None
    if args.rollback:
        body = {"rollback": True}
    elif args.promote:
        body = {"weights": {args.promote: 100}}
    elif args.off:
        body = {"weights": {}}
    elif args.weights:
        body = {"weights": TrafficSplit.parse(args.weights).weights}
    answer = ask(args.url, path, body)
    if args.json:
        print(json.dumps(answer))
        return 0
    if not answer["weights"]:
        print(f"{args.model}: all requests go to the newest version")
    for version, share in answer["weights"].items():
        print(f"{args.model} version {version}: {share:g} %, {answer['requests'][version]} requests so far")
    return 0
