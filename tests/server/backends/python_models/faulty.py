"""Fails in the ways that DO names."""

import os
import signal
import sys
import time

import numpy as np
import triton_python_backend_utils as pb_utils

hoard = []


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            what = pb_utils.get_input_tensor_by_name(request, "DO").as_numpy()[0].decode()
            if what == "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            elif what == "exit":
                os._exit(3)
            elif what == "sys.exit":
                sys.exit(3)
            elif what == "hang":
                time.sleep(1000)
            elif what == "fork":
                if os.fork() == 0:  # a child that holds the process's sockets open
                    time.sleep(30)
                    os._exit(0)
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "leak":
                hoard.append(np.ones(48 << 20, dtype=np.uint8))
        answer = np.array([os.getpid()], np.int64)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("PID", answer)]) for _ in requests]
