"""Calls other models: the request's WHAT says how."""

import asyncio
import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    async def execute(self, requests):
        return [await self.answer(request) for request in requests]

    async def answer(self, request):
        what = pb_utils.get_input_tensor_by_name(request, "WHAT").as_numpy()[0].decode()
        try:
            found = await getattr(self, what)()
        except pb_utils.TritonModelException as error:
            found = f"refused: {error}"
        return pb_utils.InferenceResponse([pb_utils.Tensor("RESULT", np.array([json.dumps(found)], dtype=object))])

    def sum_request(self, **options):
        left = pb_utils.Tensor("LEFT", np.arange(1000, dtype=np.float32))
        right = pb_utils.Tensor("RIGHT", np.ones(1000, dtype=np.float32))
        return pb_utils.InferenceRequest(
            model_name="arithmetic", inputs=[left, right], requested_output_names=["SUM"], **options
        )

    def count_request(self, count, **parameters):
        return pb_utils.InferenceRequest(
            model_name="counter",
            inputs=[pb_utils.Tensor("N", np.array([count], np.int32))],
            requested_output_names=["VALUE"],
            parameters=parameters,
        )

    async def sync(self):
        response = self.sum_request().exec()
        assert not response.has_error()
        (tensor,) = response.output_tensors()
        assert tensor.name() == "SUM"
        assert json.loads(response.parameters())["number"] == 3
        return float(tensor.as_numpy().sum())

    async def many(self):
        responses = await asyncio.gather(*(self.sum_request().async_exec() for _ in range(20)))
        sums = [float(pb_utils.get_output_tensor_by_name(one, "SUM").as_numpy().sum()) for one in responses]
        assert len(set(sums)) == 1
        return sums[0]

    async def about(self):
        request = self.sum_request(
            request_id="inner",
            correlation_id="c-1",
            flags=pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START | pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END,
            timeout=9_000_000,
            parameters={"mine": 1.5},
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        request = pb_utils.InferenceRequest(
            request_id=request.request_id(),
            correlation_id=request.correlation_id(),
            flags=request.flags(),
            timeout=request.timeout(),
            parameters=json.loads(request.parameters()),
            inputs=request.inputs(),
            model_name=b"arithmetic",
            requested_output_names=["ABOUT"],
        )
        return json.loads(request.exec().output_tensors()[0].as_numpy()[0])

    async def unknown(self):
        request = pb_utils.InferenceRequest(model_name="nobody", inputs=[], requested_output_names=[])
        error = request.exec().error()
        assert error.code() == pb_utils.TritonError.NOT_FOUND
        return error.message()

    async def their_error(self):
        request = self.sum_request(parameters={"do": "error"})
        error = (await request.async_exec()).error()
        return [int(error.code()), error.message()]

    async def not_decoupled(self):
        return self.count_request(1).exec().error().message()

    async def decoupled(self):
        responses = self.count_request(3).exec(decoupled=True)
        values = [[int(tensor.as_numpy()[0]) for tensor in one.output_tensors()] for one in responses]
        again = [len(one.output_tensors()) for one in responses]
        assert again == [1, 1, 1, 0]
        return values

    async def decoupled_async(self):
        both = await asyncio.gather(*(self.count_request(n).async_exec(decoupled=True) for n in (2, 4)))
        return [sum(len(one.output_tensors()) for one in responses) for responses in both]

    async def cancel(self):
        responses = self.count_request(100_000, do="slowly").exec(decoupled=True)
        next(responses)
        responses.cancel()
        last = list(responses)[-1]
        return last.has_error() and last.error().code() == pb_utils.TritonError.CANCELLED

    async def control(self):
        states = [pb_utils.is_model_ready("later")]
        pb_utils.load_model("later")
        states.append(pb_utils.is_model_ready("later", "1"))
        pb_utils.unload_model("later")
        states.append(pb_utils.is_model_ready("later"))
        return states

    async def control_refused(self):
        pb_utils.load_model("nobody")
