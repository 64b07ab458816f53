"""Loading a checkpoint's tokenizer, special tokens, token bytes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.llm.tokenizers_for_tests import CORPUS, trained
from trine.core.errors import ModelLoadError, RequestError
from trine.llm.tokenizer import Tokenizer


def write(directory: Path, kind: str = "byte_level", **files: Any) -> Path:
    """A checkpoint's tokenizer files; keyword names are file names without `.json`."""
    trained(kind).save(str(directory / "tokenizer.json"))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def test_special_tokens_come_from_the_configuration(tmp_path: Path) -> None:
    write(
        tmp_path,
        tokenizer_config={"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "<|im_end|>"},
        special_tokens_map={"eos_token": "</s>", "pad_token": "<unk>"},
        generation_config={"eos_token_id": [2, 4]},
    )
    tok = Tokenizer.from_directory(tmp_path)
    assert tok.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>"}
    assert (tok.bos_token_id, tok.eos_token_ids) == (1, (2, 4))
    assert tok.special_ids == {0, 1, 2, 3, 4}
    assert not tok.has_chat_template


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": {"eos_token_id": 7}}, (7,)),
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": 3}}, (3,)),
        ({"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": 3}}, (3, 2)),
        ({}, ()),
    ],
)
def test_end_of_sequence_ids(tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert Tokenizer.from_directory(write(tmp_path, **files)).eos_token_ids == expected


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"add_eos_token": True}, [1], [2]),
    ],
)
def test_add_bos_and_eos(tmp_path: Path, config: dict[str, Any], before: list[int], after: list[int]) -> None:
    tok = Tokenizer.from_directory(
        write(tmp_path, "llama", tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", **config})
    )
    plain = tok.encode("hello world", add_special_tokens=False)
    assert tok.encode("hello world") == [*before, *plain, *after]


def test_encoding_equals_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write(
        tmp_path,
        "llama",
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
    )
    tok, reference = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (*CORPUS[:4], "<s>hello</s>", "", " ", "\n\n x"):
        assert tok.encode(text) == reference.encode(text)
        assert tok.decode(tok.encode(text)) == reference.decode(tok.encode(text), skip_special_tokens=True)


def test_tokens_that_only_the_configuration_knows_are_added(tmp_path: Path) -> None:
    size = trained("byte_level").get_vocab_size()
    listed = {str(size): {"content": "<|tool|>", "special": True}, "1": {"content": "<s>", "special": True}}
    tok = Tokenizer.from_directory(write(tmp_path, tokenizer_config={"added_tokens_decoder": listed}))
    assert tok.encode("a<|tool|>") == [*tok.encode("a"), size]
    assert size in tok.special_ids
    assert tok.vocab_size == size + 1


def test_configuration_of_another_checkpoint_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"added_tokens_decoder": {"9999": {"content": "<|tool|>", "special": True}}})
    with pytest.raises(ModelLoadError, match="9999"):
        Tokenizer.from_directory(tmp_path)


def test_gpt2_files(tmp_path: Path) -> None:
    backend = trained("byte_level")
    backend.model.save(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
    tok = Tokenizer.from_directory(tmp_path)
    for text in CORPUS[:4]:
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert ids == Tokenizer(trained("byte_level")).encode(text) or "日本語" in text  # an added token there


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bpe", {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}),
        ("bpe", {"vocab_size": 200}),
        (
            "bpe",
            {
                "byte_fallback": True,
                "add_dummy_prefix": False,
                "user_defined_symbols": ["<tool>"],
                "remove_extra_whitespaces": False,
            },
        ),
        ("unigram", {"vocab_size": 90}),
        ("unigram", {"byte_fallback": True, "vocab_size": 350}),
    ],
)
def test_sentencepiece_files_equal_sentencepiece(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    import sentencepiece

    source = tmp_path / "corpus.txt"
    source.write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(source),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type=kind,
        minloglevel=2,
        **{"vocab_size": 450, **options},
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tok = Tokenizer.from_directory(tmp_path)
    for text in ("hello world", "The quick  brown fox ", "isn't it?", " Grüße <tool> lowest", "Grüße 🎉", "", " "):
        ids = tok.encode(text, add_special_tokens=False)
        assert ids == processor.encode(text)
        assert tok.encode(text) == [1, *ids]
        if options.get("byte_fallback"):
            assert tok.decode(ids) == processor.decode(ids)
    assert tok.eos_token_ids == (2,)
    assert tok.special_ids == {0, 1, 2}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json"),
        ({"tokenizer.json": "{"}, "can't be read"),
        ({"tokenizer.model": "?"}, "not a SentencePiece model"),
        ({"tokenizer_config.json": "[]"}, "JSON object"),
        ({"tokenizer_config.json": "{,}"}, "Download the file again"),
    ],
)
def test_broken_directories_are_errors_with_a_remedy(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelLoadError, match=message):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(ModelLoadError, match="not a directory"):
        Tokenizer.from_directory(tmp_path / "missing")


def test_text_that_is_no_text() -> None:
    tok = Tokenizer(trained("byte_level"))
    with pytest.raises(RequestError, match=r"lone surrogate U\+D800 at character 1"):
        tok.encode("a\ud800b")
    with pytest.raises(RequestError, match="must be a string, not int"):
        tok.encode(3)  # type: ignore[arg-type]
    assert tok.decode(tok.encode("a\x00b")) == "a\x00b"
    long = "a b\n" * 40_000
    assert tok.decode(tok.encode(long)) == long


@pytest.mark.parametrize("kind", ["byte_level", "gemma", "llama"])
def test_token_bytes_add_up_to_the_text(kind: str) -> None:
    tok = Tokenizer(trained(kind))
    for text in (*CORPUS[:4], "🎉 漢字 naïve"):
        ids = tok.encode(text, add_special_tokens=False)
        joined = b"".join(tok.token_bytes(index) for index in ids).decode()
        assert joined == (" " + text if kind == "llama" else text)


def test_token_bytes_of_special_and_unknown_ids() -> None:
    tok = Tokenizer(trained("byte_level"))
    assert tok.token_bytes(3) == b"<|im_start|>"
    assert tok.token_bytes(10**6) == tok.token_bytes(-1) == b""
    assert tok.token_text(tok.encode("漢")[0]) == "\ufffd"


def test_many_threads_encode_and_decode() -> None:
    tok = Tokenizer(trained("byte_level"))
    expected = {text: tok.encode(text) for text in CORPUS[:4]}
    wrong: list[str] = []

    def work() -> None:
        for _ in range(50):
            wrong.extend(text for text, ids in expected.items() if tok.encode(text) != ids or tok.decode(ids) != text)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
