"""Load on an engine in this process or on a server by its URL, and what came of it. `trine bench` is its command."""
