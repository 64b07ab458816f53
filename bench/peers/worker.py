"""Runs inside a peer's interpreter: loads one engine and answers commands, a JSON object a line each way.

    {"do": "load", "settings": {...}}                    -> {"version", "device", "ready_s"}
    {"do": "generate", "prompts": [[...]], "new": 64}    -> {"seconds", "tokens": [[...]]}, greedy, of full length

and, of Trine only, "finite" and "gap". A failure is {"error": "..."}. What the engine prints goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # trine, where it is not installed


def main(name: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "load":
                started = time.perf_counter()
                engine = importlib.import_module(f"{name}_engine").Engine(command["settings"])
                engine.generate([[1, 2, 3, 4]], 1)
                answer = {"version": engine.version, "device": engine.device, "ready_s": time.perf_counter() - started}
            elif command["do"] == "generate":
                started = time.perf_counter()
                tokens = engine.generate(command["prompts"], command["new"])
                answer = {"seconds": time.perf_counter() - started, "tokens": [[int(t) for t in own] for own in tokens]}
            else:
                answer = getattr(engine, command["do"])(**{key: value for key, value in command.items() if key != "do"})
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:500]}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main(sys.argv[1])
