"""`trine serve` in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading


class Process:
    """`trine serve` as a user starts it, and where it listens."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "trine", "serve", *arguments]
        ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
        self._process = subprocess.Popen(
            [*command, *ports], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        self.output: list[str] = []
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._ready.wait(120), "".join(self.output)
        found = re.search(r"http 127\.0\.0\.1:(\d+), grpc 127\.0\.0\.1:(\d+), metrics 127\.0\.0\.1:(\d+)", self.text)
        assert found is not None, self.text
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{port}" for port in found.groups())

    @property
    def text(self) -> str:
        return "".join(self.output)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output.append(line)
            if "serves" in line:
                self._ready.set()
        self._ready.set()

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)
