"""Decoupled: counts up to N from a thread; `do` in the parameters asks for something else."""

import json
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            what = json.loads(request.parameters()).get("do")
            if what == "return":
                return [pb_utils.InferenceResponse([])]
            if what == "raise":
                raise RuntimeError("on purpose")
            if what == "drop":
                continue
            count = int(pb_utils.get_input_tensor_by_name(request, "N").as_numpy()[0])
            sender = request.get_response_sender()
            threading.Thread(target=self.count, args=(sender, count, what), daemon=True).start()
        return None

    def count(self, sender, count, what):
        index = 0
        while index < count:
            if sender.is_cancelled():
                error = pb_utils.TritonError(f"cancelled at {index}", pb_utils.TritonError.CANCELLED)
                sender.send(pb_utils.InferenceResponse(error=error), FINAL)
                return
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("VALUE", np.array([index], np.int32))]))
            index += 1
            if what == "slowly":
                time.sleep(0.01)
        sender.send(flags=FINAL)
        if what == "twice":
            try:
                sender.send(flags=FINAL)
            except pb_utils.TritonModelException as error:
                pb_utils.Logger.log_info(f"refused: {error}")
