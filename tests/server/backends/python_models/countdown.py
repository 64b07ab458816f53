"""An iterative sequence: a request is executed again until its count is at zero."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.decoupled = args["model_name"] == "countdown_decoupled"
        self.left = {}

    def execute(self, requests):
        responses = []
        for request in requests:
            key = request.correlation_id()
            start = int(pb_utils.get_input_tensor_by_name(request, "N").as_numpy().reshape(-1)[0])
            left = self.left.get(key, start) - 1
            self.left[key] = left
            response = pb_utils.InferenceResponse([pb_utils.Tensor("VALUE", np.array([[left]], np.int32))])
            again = left > 0
            if again:
                request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
            else:
                del self.left[key]
            if self.decoupled:
                final = 0 if again else pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                request.get_response_sender().send(response, final)
            else:
                responses.append(None if again else response)
        return None if self.decoupled else responses
