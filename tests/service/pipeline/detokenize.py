"""Token ids to text."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        directory = config["parameters"]["tokenizer_dir"]["string_value"]
        self.tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")

    def execute(self, requests):
        responses = []
        for request in requests:
            tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()
            lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()
            texts = [
                self.tokenizer.decode(ids[:length].tolist()).encode()
                for row, ends in zip(tokens, lengths, strict=True)
                for ids, length in zip(row, ends, strict=True)
            ]
            output = pb_utils.Tensor("OUTPUT", np.array(texts, dtype=object).reshape(len(tokens), -1))
            responses.append(pb_utils.InferenceResponse([output]))
        return responses
