"""The tokenizer of a checkpoint: text to token ids and back, and what its files say about special tokens and chat.

A thin layer over the `tokenizers` library: `Tokenizer.from_directory` reads a Hugging Face directory, the rest is
thread-safe and immutable.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from trine.core.errors import RequestError
from trine.llm.chat.templates import ChatTemplates
from trine.llm.token_table import TokenTable
from trine.llm.tokenizer_files import TokenizerFiles


class Tokenizer:
    """Encodes and decodes; all methods may be called from several threads at once.

    hf: the `tokenizers.Tokenizer` (not to be changed any more). special_tokens: text by role (`bos_token`, `eos_token`,
    …), as chat templates see them. eos_token_ids: every token that ends a sequence, the main one first.
    """

    def __init__(
        self,
        hf: Backend,
        *,
        special_tokens: dict[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
        chat_templates: ChatTemplates | None = None,
    ) -> None:
        hf.no_truncation()
        hf.no_padding()
        self.hf = hf
        self.special_tokens = dict(special_tokens or {})
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.special_ids = frozenset(index for index, token in hf.get_added_tokens_decoder().items() if token.special)
        self.chat_templates = chat_templates or ChatTemplates({})
        self._table: TokenTable | None = None
        self._table_lock = threading.Lock()

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face model directory. Raises ModelLoadError when there is none or it is broken."""
        files = TokenizerFiles(Path(path))
        return cls(
            files.backend,
            special_tokens=files.special_tokens,
            eos_token_ids=files.eos_token_ids,
            bos_token_id=files.bos_token_id,
            chat_templates=ChatTemplates(files.chat_templates),
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id. A model may have more rows than that (padding)."""
        return len(self.table.tokens)

    @property
    def table(self) -> TokenTable:
        """What each token adds to the text; built on first use (about 0.2 s for 150,000 tokens)."""
        if self._table is None:
            with self._table_lock:
                if self._table is None:
                    self._table = TokenTable(self.hf, self.special_ids)
        return self._table

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. `add_special_tokens` adds what the model wants around a text (a BOS token, often); pass False for
        the text of a chat template, which holds them already. Special tokens spelled out in the text become their
        ids.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of several texts, spread over the processor's cores."""
        try:
            # Releases the interpreter lock and skips character offsets, unlike Tokenizer.encode: twice as fast.
            encodings = self.hf.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError) as error:
            for text in texts:
                check_text(text)
            raise RequestError(f"text can't be tokenized: {error}") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; invalid UTF-8 is U+FFFD. Ids outside of the vocabulary (padding rows of a model) are
        nothing.
        """
        return self.hf.decode(ids if isinstance(ids, list) else list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text (not at its start). b"" for an id outside of the vocabulary."""
        data = self.table.data
        return data[token_id] if 0 <= token_id < len(data) else b""

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, U+FFFD for a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """A conversation as the prompt text that the model was trained on; encode it with add_special_tokens=False.

        chat_template: Jinja source, or the name of one of the checkpoint's templates, in place of the default. kwargs
        (`enable_thinking`, `documents`, `continue_final_message`, …) go to the template. Raises RequestError.
        """
        return self.chat_templates.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            variables={**self.special_tokens, **kwargs},
        )


def check_text(text: object) -> None:
    """Raises RequestError when `text` is not a string that has a UTF-8 form."""
    if not isinstance(text, str):
        raise RequestError(f"text must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise RequestError(
            f"text has a lone surrogate U+{code:04X} at character {error.start}, which is no Unicode text: remove it, "
            "or send the character as a whole surrogate pair"
        ) from error
