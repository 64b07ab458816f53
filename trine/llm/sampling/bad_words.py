"""Token sequences that must not be completed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trine.llm.sampling.upload import upload


class BadWords:
    """Forbidden token sequences of two tokens or more for one row, and the end of its output, on the device.

    A sequence's last token is forbidden while the output ends with the tokens before it. Only the output counts: a
    prompt that ends with the start of a word does not forbid its rest.
    """

    def __init__(self, words: Sequence[Sequence[int]], output_token_ids: Sequence[int], device: torch.device) -> None:
        longest = max(len(word) for word in words) - 1
        prefixes = [[-1] * (longest + 1 - len(word)) + list(word[:-1]) for word in words]
        self._prefixes = upload(prefixes, device)  # [W, L], -1 matches anything
        self._last = upload([word[-1] for word in words], device)
        recent = [-2] * longest + list(output_token_ids)
        self._recent = upload(recent[-longest:], device)  # [L]

    def apply(self, logits: Tensor) -> None:
        """Forbid in place what would complete a word. logits [V]."""
        matches = ((self._prefixes == self._recent) | (self._prefixes == -1)).all(-1)
        logits.index_add_(0, self._last, torch.where(matches, -math.inf, 0.0))

    def record(self, token: Tensor) -> None:
        """Append a sampled token, a tensor of no dimension."""
        self._recent = torch.cat((self._recent[1:], token[None]))
