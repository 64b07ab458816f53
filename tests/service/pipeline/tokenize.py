"""Text to token ids, word lists and lengths."""

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
        return [self.answer(request) for request in requests]

    def answer(self, request):
        (text,) = pb_utils.get_input_tensor_by_name(request, "QUERY").as_numpy().reshape(-1).tolist()
        ids = self.tokenizer.encode(text.decode()).ids
        length = pb_utils.get_input_tensor_by_name(request, "REQUEST_OUTPUT_LEN").as_numpy()
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("INPUT_ID", np.array([ids], np.int32)),
                pb_utils.Tensor("REQUEST_INPUT_LEN", np.array([[len(ids)]], np.int32)),
                pb_utils.Tensor("BAD_WORDS_IDS", self.word_list(request, "BAD_WORDS_DICT")),
                pb_utils.Tensor("STOP_WORDS_IDS", self.word_list(request, "STOP_WORDS_DICT")),
                pb_utils.Tensor("REQUEST_OUTPUT_LEN", length),
            ]
        )

    def word_list(self, request, name):
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        words = [] if tensor is None else [word.decode() for word in tensor.as_numpy().reshape(-1) if word]
        each = [self.tokenizer.encode(word, add_special_tokens=False).ids for word in words]
        flat = [token for ids in each for token in ids] or [0]
        ends = np.cumsum([len(ids) for ids in each]).tolist()
        return np.array([[flat, ends + [-1] * (len(flat) - len(ends))]], np.int32)
