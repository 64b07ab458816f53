"""`trine explain`: why a request waited, and how it was batched."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any
from urllib.parse import quote

from trine.cli.remote import add_url, ask
from trine.cli.terminal import styled

USAGE = "REQUEST-ID [options]"

DESCRIPTION = """\
Ask a running server what became of a request: how long it waited and for what, the batch it was computed in, the
instance, and where the time went. The server remembers the last few thousand requests that had an id, and an
ensemble's members under the ensemble's id.
"""

EXAMPLES = """\
examples:
  trine explain my-request-17
  trine explain my-request-17 --url http://10.0.0.5:8000 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="REQUEST-ID", help="the id that the client gave the request")
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="the answer as JSON")


def run(args: argparse.Namespace) -> int:
    found = ask(args.url, f"/v2/explain/{quote(args.request_id, safe='')}")["requests"]
    if args.json:
        print(json.dumps(found))
    elif not found:
        print(f"the server knows no request with the id {args.request_id!r}: only the last ones with an id are kept")
    else:
        for entry in found:
            print("\n".join(lines(entry)))
    return 0 if found else 1


def lines(entry: dict[str, Any]) -> list[str]:
    """One request, for people."""
    clock = time.strftime("%H:%M:%S", time.localtime(entry["received"]))
    if not entry["computed"]:
        return [
            f"{styled(entry['request_id'], 'bold')}  {entry['model']} version {entry['version']}, received {clock}",
            f"  waited    {duration(entry['waited_us']):>10}  and was not computed: {entry['error']}",
        ]
    others = entry["batch_requests"] - 1
    company = "alone" if not others else f"with {others} other request{'s' if others > 1 else ''}"
    told = [
        f"{styled(entry['request_id'], 'bold')}  {entry['model']} version {entry['version']}, received {clock}",
        f"  waited    {duration(entry['waited_us']):>10}  {entry['waited_for']}",
        f"  computed  {duration(entry['infer_us']):>10}  {company}: {entry['batch_rows']} rows, {entry['rows']} its "
        f"own, on {entry['instance'] or 'its members'}",
        f"  tensors   {duration(entry['input_us'] + entry['output_us']):>10}  putting the batch together and apart",
        f"  in all    {duration(entry['total_us']):>10}",
    ]
    if entry["error"]:
        told.append(f"  {styled('failed', 'red')}    {entry['error']}")
    return told


def duration(microseconds: float) -> str:
    """With a unit that fits: "12 µs", "3.4 ms", "2.1 s"."""
    if microseconds < 1000:
        return f"{microseconds:.0f} µs"
    return f"{microseconds / 1e3:.1f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.1f} s"
