"""`trine eval`: exact answers to tasks with one right answer."""

from __future__ import annotations

import argparse
import json
import sys

from trine.cli.options import add_engine_options, add_model, engine_options, positive
from trine.cli.terminal import table, waiting

USAGE = "MODEL [options]"

DESCRIPTION = """\
Score a model on held-out items of tasks with one right answer (arithmetic, sorting, looking up, extracting, calling a
tool, …): the share of answers that are exactly right. The embedded model was trained on these tasks, on other items.
"""

EXAMPLES = """\
examples:
  trine eval tiny
  trine eval tiny --task addition --task lookup_3500 --items 40
  trine eval tiny --quantization int8 --json | tail -n 1       {"tasks": {"addition": …}}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--task", action="append", metavar="NAME", help="only this task; may be repeated")
    parser.add_argument(
        "--items", type=positive, metavar="N", help="items of each task (the longest task has a quarter of them)"
    )
    parser.add_argument("--items-seed", type=int, default=0, metavar="N", help="draws other held-out items")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON: the share of each task")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from trine.evaluation.scorer import NUM_ITEMS, evaluate
    from trine.llm.api import LLM

    with waiting(f"loading {args.model}"):
        llm = LLM(args.model, **engine_options(args))
    bar = tqdm(unit="item", disable=not sys.stderr.isatty(), leave=False)

    def progress(task: str, done: int, total: int) -> None:
        bar.set_description(task, refresh=False)
        bar.total = total
        bar.n = done
        bar.refresh()

    with llm, bar:
        shares = evaluate(llm, args.items or NUM_ITEMS, args.task, progress, args.items_seed)
    print(table(("task", "exact"), [(task, f"{share:.1%}") for task, share in shares.items()]))
    if args.json:
        print(json.dumps({"tasks": {task: round(share, 4) for task, share in shares.items()}}))
    return 0
