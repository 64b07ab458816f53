"""Sums and differences of any datatype; what it does besides depends on the request's parameters."""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        assert sorted(args) == [
            "model_config",
            "model_instance_device_id",
            "model_instance_kind",
            "model_name",
            "model_repository",
            "model_version",
        ]
        assert all(isinstance(value, str) for value in args.values())
        assert (args["model_name"], args["model_version"], args["model_instance_kind"]) == ("arithmetic", "1", "CPU")
        assert os.path.isfile(os.path.join(args["model_repository"], "1", "model.py"))
        config = json.loads(args["model_config"])
        assert config["input"][0]["dims"] == [-1]
        assert pb_utils.get_input_config_by_name(config, "LEFT")["data_type"] == "TYPE_FP32"
        assert pb_utils.get_output_config_by_name(config, "nothing") is None
        assert not pb_utils.using_decoupled_model_transaction_policy(config)
        self.dtype = pb_utils.triton_string_to_numpy("TYPE_FP32")

    def execute(self, requests):
        return [self.answer(request, len(requests)) for request in requests]

    def answer(self, request, size):
        parameters = json.loads(request.parameters())
        what = parameters.get("do")
        if what == "raise":
            raise ValueError("on purpose")
        if what == "error":
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError("no such thing", pb_utils.TritonError.NOT_FOUND)
            )
        if what == "exit":
            os._exit(7)
        if what == "nothing":
            return "no response"
        left = pb_utils.get_input_tensor_by_name(request, "LEFT")
        right = pb_utils.get_input_tensor_by_name(request, "RIGHT")
        assert left.is_cpu()
        assert left.shape() == list(left.as_numpy().shape)
        total = (left.as_numpy() + right.as_numpy()).astype(self.dtype)
        left.as_numpy()[...] = 0  # inputs are the model's to write into
        about = {
            "id": request.request_id(),
            "correlation": request.correlation_id(),
            "flags": request.flags(),
            "timeout": request.timeout(),
            "parameters": parameters,
            "outputs": sorted(request.requested_output_names()),
            "batch": size,
            "pid": os.getpid(),
        }
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor("SUM", total),
                pb_utils.Tensor("ABOUT", np.array([json.dumps(about)], dtype=object)),
            ],
            parameters={"text": "yes", "number": 3, "flag": True},
        )
