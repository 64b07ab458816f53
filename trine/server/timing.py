"""How soon threads get their turn: a thread that waits for the interpreter, and one whose timer is over."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_SWITCH_INTERVAL = 0.00005  # seconds a thread may keep the interpreter while another waits for it
_TIMER_SLACK_NS = 1000
_PR_SET_TIMERSLACK = 29


def keep_time() -> None:
    """Called in the event loop's thread, before it starts others: they and child processes take over the slack.

    Linux may wake a sleeper up to 50 µs late to save energy. A model that waits 1 ms for a device loses a twentieth of
    its throughput to that, and a queue's delay is never what was configured.
    """
    sys.setswitchinterval(min(_SWITCH_INTERVAL, sys.getswitchinterval()))
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library without prctl: timers stay as they are
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_TIMER_SLACK_NS), 0, 0, 0)
