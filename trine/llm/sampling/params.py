"""How a request's tokens are chosen and when it ends."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from trine.core.errors import RequestError

MAX_LOGPROBS = 64
MAX_N = 128


@dataclass(frozen=True, slots=True)
class GuidedParams:
    """The language that the output must belong to. Exactly one of the fields is set.

    json: a JSON schema as a dict, or as its JSON text. json_object: any JSON object. regex: a regular expression
    (full match). choice: one of these strings. grammar: a Lark-like or GBNF-like EBNF grammar whose start rule is
    `root` or `start`.
    """

    json: dict[str, Any] | str | bool | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [
            name
            for name, is_set in (
                ("json", self.json is not None),
                ("json_object", self.json_object),
                ("regex", self.regex is not None),
                ("choice", self.choice is not None),
                ("grammar", self.grammar is not None),
            )
            if is_set
        ]
        if len(given) != 1:
            what = "none" if not given else ", ".join(given)
            raise RequestError(
                f"guided: give exactly one of json, json_object, regex, choice, grammar; got {what}", param="guided"
            )
        if self.choice is not None and not self.choice:
            raise RequestError("guided choice: give at least one string", param="choice")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample, and when to stop.

    n sequences are returned, the best (by mean log-probability) of best_of. temperature 0 is greedy, and so is top_k 1.

    The filters apply in the order top_k, top_p, min_p to the distribution at the temperature; 0, 1 and 0 are off.
    top_k keeps the k most probable tokens, top_p the fewest most probable ones that hold the share top_p of what top_k
    left, min_p the tokens at least min_p times as probable as the most probable one. A token as probable as the last
    one kept is kept too.

    Penalties change the logits before the temperature: repetition_penalty divides (multiplies when negative) the
    logits of every token in prompt and output (Keskar et al. 2019, CTRL, section 4.1); presence_penalty and
    frequency_penalty subtract from the logits of tokens in the output, once or per occurrence (OpenAI). logit_bias
    then adds to logits by token id. bad_words are never completed.

    A sequence ends at the model's end-of-sequence tokens (unless ignore_eos), at stop_token_ids, when its text holds a
    stop string (which is cut from the text unless include_stop_str_in_output), or after max_tokens; none of the
    first three before min_tokens. A guided sequence also ends when its grammar allows nothing more. max_tokens None
    means up to the model's context length.

    logprobs k returns the sampled token's and the k most probable tokens' log-probabilities in the model's own
    distribution; prompt_logprobs k the same for the prompt. A seed makes the tokens a function of the prompt and
    the seed, whatever else is in the batch. use_beam_search keeps `best_of` (or n) beams; length_penalty and
    early_stopping as in Transformers.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    guided: GuidedParams | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            value = tuple(text for text in value or () if text != "")  # Triton's clients send "" for none
            object.__setattr__(self, name, value)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check()

    def _check(self) -> None:
        width = self.n if self.best_of is None else self.best_of
        rules: tuple[tuple[str, bool, str], ...] = (
            ("n", 1 <= self.n <= MAX_N, f"from 1 to {MAX_N}"),
            ("best_of", self.n <= width <= MAX_N, f"from n={self.n} to {MAX_N}"),
            ("temperature", 0.0 <= self.temperature <= 1e4, "0 or more; 0 is greedy"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 1e4, "above 0; 1 is off"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "from -2 to 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "from -2 to 2"),
            ("logit_bias", all(map(math.isfinite, self.logit_bias.values())), "finite numbers by token id"),
            ("min_tokens", self.min_tokens >= 0, "0 or more"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "1 or more"),
            (
                "min_tokens",
                self.max_tokens is None or self.min_tokens <= self.max_tokens,
                f"at most max_tokens={self.max_tokens}",
            ),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS,
                f"from 0 to {MAX_LOGPROBS}",
            ),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer"),
            (
                "use_beam_search",
                not (self.use_beam_search and self.temperature > 0),
                "with temperature 0 only: beams are not sampled",
            ),
            (
                "use_beam_search",
                not (self.use_beam_search and self.guided is not None),
                "off when the output is guided",
            ),
        )
        for name, holds, expected in rules:
            if not holds:
                raise RequestError(f"{name}={getattr(self, name)!r} is out of range: it must be {expected}", param=name)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def num_sequences(self) -> int:
        """Sequences to generate: best_of if given, else n."""
        return self.n if self.best_of is None else self.best_of

    def replace(self, **changes: Any) -> SamplingParams:
        return dataclasses.replace(self, **changes)
