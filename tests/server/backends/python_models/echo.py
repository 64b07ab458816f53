"""Every input comes back, through numpy or through DLPack."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "IN", "data_type": "TYPE_STRING", "dims": [-1], "optional": True})
        config.add_output({"name": "OUT", "data_type": "TYPE_STRING", "dims": [-1]})
        for name in ("BOOL", "UINT8", "UINT64", "INT16", "INT64", "FP16", "FP64", "BF16"):
            config.add_input({"name": f"IN_{name}", "data_type": f"TYPE_{name}", "dims": [-1, -1], "optional": True})
            config.add_output({"name": f"OUT_{name}", "data_type": f"TYPE_{name}", "dims": [-1, -1]})
        config.set_max_batch_size(0)
        return config

    def execute(self, requests):
        responses = []
        for request in requests:
            tensors = []
            for tensor in request.inputs():
                name = tensor.name().replace("IN", "OUT", 1)
                if tensor.name() == "IN":
                    tensors.append(pb_utils.Tensor(name, tensor.as_numpy()))
                else:
                    tensors.append(pb_utils.Tensor.from_dlpack(name, tensor.to_dlpack()))
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
