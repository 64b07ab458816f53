"""Train the byte-level BPE tokenizer of `tiny`, and encode the prose with it.

    python -m models.tiny.tokenizer build/tiny trine/data/tiny

reads prose.txt and definitions.json (see prose.py), writes tokenizer.json, tokenizer_config.json and
generation_config.json into the model's directory and prose.npy (uint16 token ids) beside the prose.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from models.tiny.chat import Conversations, render
from models.tiny.prose import DOCUMENT_BREAK
from trine.evaluation.tasks import TASKS, make_items

VOCAB_SIZE = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
TEXT_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Single tokens that stay in the decoded text, where a tool parser looks for them."""

# Words with the one space or sign before them, single digits, runs of signs, and white space with line ends apart.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]+|[^\S\r\n]+(?=\S)|\s+"
ITEMS_PER_TASK = 3000
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def new_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def task_texts(definitions: dict[str, str]) -> Iterator[str]:
    """Texts of the tasks and of conversations, so that their words and JSON become whole tokens."""
    for task in TASKS:
        count = ITEMS_PER_TASK // 100 if task == "lookup_3500" else ITEMS_PER_TASK
        for item in make_items(task, 1, count, "train", lambda texts: [len(text) // 3 for text in texts]):
            yield "".join(
                text for text, _ in render([*item.messages, {"role": "assistant", "content": item.answer}], item.tools)
            )
    rng = random.Random(1)
    conversations = Conversations(definitions)
    for _ in range(4 * ITEMS_PER_TASK):
        yield "".join(text for text, _ in conversations.draw(rng))


def train(documents: list[str], definitions: dict[str, str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(TEXT_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer = new_tokenizer()
    marks = (*SPECIAL_TOKENS, *TEXT_TOKENS)
    sample = random.Random(1).sample(documents, len(documents) // 2)

    def texts() -> Iterator[str]:
        yield from sample
        for text in task_texts(definitions):
            for mark in marks:
                text = text.replace(mark, " ")
            yield text

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TEXT_TOKENS])
    return tokenizer


def write_files(tokenizer: Tokenizer, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in (*SPECIAL_TOKENS, *TEXT_TOKENS)
    }
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": added,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": TEMPLATE.read_text(encoding="utf-8").rstrip("\n"),
    }
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    generation = {"eos_token_id": ends, "pad_token_id": tokenizer.token_to_id("<|pad|>"), "do_sample": False}
    for name, content in (("tokenizer_config.json", configuration), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    documents = (options.data / "prose.txt").read_text(encoding="utf-8").split(f"\n{DOCUMENT_BREAK}\n")
    definitions = json.loads((options.data / "definitions.json").read_text(encoding="utf-8"))
    tokenizer = train(documents, definitions)
    write_files(tokenizer, options.model)
    random.Random(2).shuffle(documents)
    end = tokenizer.token_to_id("<|endoftext|>")
    ids: list[int] = []
    for start in range(0, len(documents), 100):
        for encoding in tokenizer.encode_batch_fast(documents[start : start + 100], add_special_tokens=False):
            ids += [*encoding.ids, end]
    np.save(options.data / "prose.npy", np.array(ids, dtype=np.uint16))
    print(f"{tokenizer.get_vocab_size()} tokens; prose of {len(ids) / 1e6:.2f} M tokens")


if __name__ == "__main__":
    main()
