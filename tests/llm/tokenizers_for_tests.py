"""Small real tokenizers of every kind that checkpoints use, trained on the spot."""

from __future__ import annotations

import functools
from collections.abc import Callable

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12 o'clock, isn't it?",
    "Grüße aus Köln! Ça va? Привет, мир. 日本語のテキスト。 안녕하세요 🎉😀👩‍👩‍👧",
    "def f(x):\n    return [x ** 2, {'key': \"value\"}]\n\n\tif   x  :  pass",
    "hello hello world world low lower lowest new newer newest",
] * 8
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Backend:
    """As GPT-2, Qwen and Llama 3."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<tool_call>", "日本語", " with space "])
    return backend


def llama() -> Backend:
    """As Llama 2 and Mistral: SentencePiece's BPE with byte fallback; the space in front is added and stripped."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    plain = ["".join(char for char in text if ord(char) < 0x300) for text in CORPUS]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    backend.train_from_iterator(plain, trainer)
    unspecial(backend, BYTES)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def gemma() -> Backend:
    """As Gemma: the same without the stripped space."""
    backend = llama()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def unigram() -> Backend:
    """As T5: Unigram with Metaspace."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_piece() -> Backend:
    """As BERT."""
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def end_of_word() -> Backend:
    """As GPT-1: BPE with a suffix at the end of words, whose decoder needs to know the last token."""
    backend = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def no_decoder() -> Backend:
    """Words, joined with spaces."""
    backend = Backend(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return backend


def unspecial(backend: Backend, tokens: list[str]) -> None:
    """Trainers take a fixed start of the vocabulary as special tokens only; this makes them ordinary ones."""
    import json

    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in set(tokens)]
    rebuilt = Backend.from_str(json.dumps(state))
    backend.__setstate__(rebuilt.__getstate__())


KINDS: dict[str, Callable[[], Backend]] = {
    "byte_level": byte_level,
    "llama": llama,
    "gemma": gemma,
    "unigram": unigram,
    "word_piece": word_piece,
    "end_of_word": end_of_word,
    "no_decoder": no_decoder,
}


@functools.cache
def trained(kind: str) -> Backend:
    """One backend a kind, shared by the tests."""
    return KINDS[kind]()
