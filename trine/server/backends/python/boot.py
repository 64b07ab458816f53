"""Start of a model's process: `python boot.py PACKAGE MAIN SIDE INCOMING OUTGOING` (a directory, file descriptors).

The environment may be the model's own, where this package is not installed; so it is imported from its directory, and
no directory of ours gets onto the module search path.
"""

import importlib.util
import os
import sys


def main() -> None:
    package, descriptors = sys.argv[1], [int(text) for text in sys.argv[2:6]]
    del sys.argv[1:]
    sys.path.pop(0)  # this file's directory
    spec = importlib.util.spec_from_file_location(
        "trine", os.path.join(package, "__init__.py"), submodule_search_locations=[package]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["trine"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["trine"])
    from trine.server.backends.python.stub.main import run

    run(*descriptors)


if __name__ == "__main__":  # a model may start processes that import this file again
    main()
