"""Decoupled and asynchronous: a request waits while others go on."""

import asyncio

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.waiting = 0
        self.most = 0

    async def execute(self, requests):
        self.waiting += len(requests)
        self.most = max(self.most, self.waiting)
        await asyncio.sleep(0.2)
        self.waiting -= len(requests)
        for request in requests:
            if pb_utils.get_input_tensor_by_name(request, "N").as_numpy()[0] < 0:
                raise ValueError("negative")
            tensor = pb_utils.Tensor("VALUE", np.array([self.most], np.int32))
            request.get_response_sender().send(
                pb_utils.InferenceResponse([tensor]), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            )

    async def is_ready(self):
        await asyncio.sleep(0)
        return self.most < 100
