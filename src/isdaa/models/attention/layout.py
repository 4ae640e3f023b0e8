"""Where prompts and their responses lie in a packed row, and every index tensor that follows from it.

Legend: P prompts, R responses, B pairs, T tokens of the packed row, N response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Layout:
    """Where prompts and their responses lie in a packed row ``[prompt_0 | its responses | prompt_1 | …]``.

    Every response continues its own prompt and sees nothing of the others. `of_pairs` makes the layout of B pairs with a
    prompt each, `of_rows` that of plain rows; several pairs may also share one prompt, and even a response.

    prompt_lengths: (P,) int64. A prompt has at least one token (its last one predicts the first token of a response).
    response_lengths: (R,) int64, in packed order; a response may be empty.
    prompt_of: (R,) int64, the prompt of each response, never falling.
    chosen, rejected: (B,) int64, the two responses of every pair, as numbers in 0..R-1; both empty for plain rows.
    scored: (N,) bool, which response tokens count in sums over a response; None: all.

    Not a dataclass: FSDP's mixed precision would take one apart on its way into every layer, and hand on a copy.

    Raises:
        ValueError: lengths that do not fit together, or an empty prompt.
    """

    def __init__(
        self, prompt_lengths: Tensor, response_lengths: Tensor, prompt_of: Tensor, chosen: Tensor, rejected: Tensor
    ) -> None:
        self.scored: Tensor | None = None
        # Index arithmetic happens on the CPU, once a batch; attention only ever sees finished index tensors.
        self.prompt_lengths, self.response_lengths = prompt_lengths.cpu().long(), response_lengths.cpu().long()
        self.prompt_of = prompt_of.cpu().long()
        self.chosen, self.rejected = chosen.cpu().long(), rejected.cpu().long()
        self.attended = False  # whether any attention has read this layout
        self.memo: dict[Any, Any] = {}
        if self.prompt_lengths.ndim != 1 or len(self.prompt_lengths) == 0:
            raise ValueError(f"prompt lengths (P,) with P > 0 are needed, not shape {tuple(self.prompt_lengths.shape)}")
        if self.response_lengths.ndim != 1 or self.response_lengths.shape != self.prompt_of.shape:
            shapes = tuple(self.response_lengths.shape), tuple(self.prompt_of.shape)
            raise ValueError(f"response lengths and their prompts must both be (R,), not of shapes {shapes[0]} and {shapes[1]}")
        if self.chosen.shape != self.rejected.shape:
            raise ValueError("as many chosen as rejected responses are needed")
        if int(self.prompt_lengths.min()) < 1:
            raise ValueError("a prompt of length 0: its last token must predict the first token of each response")
        if bool((self.prompt_of.diff() < 0).any()):
            raise ValueError("responses must stand in the order of their prompts")

    @classmethod
    def of_pairs(cls, prompt_lengths: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> Layout:
        """B pairs as ``[prompt_0 | chosen_0 | rejected_0 | prompt_1 | …]``, from three (B,) tensors of lengths."""
        shapes = {tuple(t.shape) for t in (prompt_lengths, chosen_lengths, rejected_lengths)}
        if len(shapes) != 1 or prompt_lengths.ndim != 1 or len(prompt_lengths) == 0:
            raise ValueError(f"three (B,) tensors of lengths with B > 0 are needed, not shapes {sorted(shapes)}")
        pair = torch.arange(len(prompt_lengths))
        responses = torch.stack([chosen_lengths, rejected_lengths], 1).flatten()
        return cls(prompt_lengths, responses, pair.repeat_interleave(2), 2 * pair, 2 * pair + 1)

    @classmethod
    def of_rows(cls, prompt_lengths: Tensor, response_lengths: Tensor) -> Layout:
        """Plain rows ``prompt + response`` one after the other, from two (R,) tensors of lengths."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(prompt_lengths, response_lengths, torch.arange(len(prompt_lengths)), none, none)

    def reading(self, input_ids: Tensor) -> Tensor:
        """(T,) ids as the model reads them, of a packed row that has `~id` where a token of a response is not scored.

        What is scored is kept in `scored`.
        """
        kept = input_ids >= 0
        if bool(kept.all()):
            return input_ids
        self.scored = kept.cpu()[self.target_index]
        return torch.where(kept, input_ids, ~input_ids)

    @cached_property
    def scored_lengths(self) -> Tensor:
        """(R,) scored tokens of every response."""
        if self.scored is None:
            return self.response_lengths
        return torch.zeros_like(self.response_lengths).index_add(0, self.response_of, self.scored.long())

    @cached_property
    def tokens(self) -> int:
        """T, the length of the packed row."""
        return int(self.prompt_lengths.sum() + self.response_lengths.sum())

    @cached_property
    def responses(self) -> int:
        """R."""
        return len(self.response_lengths)

    @cached_property
    def longest(self) -> int:
        """The longest of the R rows `prompt + response`, in tokens."""
        rows = self.prompt_lengths[self.prompt_of] + self.response_lengths
        return max(int(self.prompt_lengths.max()), int(rows.max()) if len(rows) else 0)

    @cached_property
    def shortest(self) -> int:
        """The shortest of the R rows `prompt + response`, in tokens; 0 where there is none."""
        rows = self.prompt_lengths[self.prompt_of] + self.response_lengths
        return int(rows.min()) if len(rows) else 0

    @cached_property
    def longest_response(self) -> int:
        """The longest response, in tokens; at least 1."""
        return max(1, int(self.response_lengths.max())) if self.responses else 1

    @cached_property
    def group_lengths(self) -> Tensor:
        """(P,) tokens of a prompt with all its responses."""
        return self.prompt_lengths.index_add(0, self.prompt_of, self.response_lengths)

    @cached_property
    def longest_group(self) -> int:
        """The longest prompt with all its responses, in tokens."""
        return int(self.group_lengths.max())

    @cached_property
    def groups(self) -> list[tuple[int, list[int]]]:
        """(prompt length, lengths of its responses) per prompt, as plain numbers."""
        groups: list[tuple[int, list[int]]] = [(length, []) for length in self.prompt_lengths.tolist()]
        for prompt, length in zip(self.prompt_of.tolist(), self.response_lengths.tolist(), strict=True):
            groups[prompt][1].append(length)
        return groups

    @cached_property
    def pieces(self) -> list[tuple[int, int]]:
        """The packed row cut into (length of the prompt that lies elsewhere, tokens): (0, prompt + first response), and
        (prompt, response) for each further response that is not empty."""
        pieces = []
        for prompt, responses in self.groups:
            pieces.append((0, prompt + sum(responses[:1])))
            pieces += [(prompt, length) for length in responses[1:] if length]
        return pieces

    @cached_property
    def prompt_starts(self) -> Tensor:
        """(P,) position in the packed row of the first token of each prompt."""
        return self.group_lengths.cumsum(0) - self.group_lengths

    @cached_property
    def response_starts(self) -> Tensor:
        """(R,) position in the packed row of the first token of each response."""
        before = self.response_lengths.cumsum(0) - self.response_lengths
        return before + self.prompt_lengths.cumsum(0)[self.prompt_of]

    @cached_property
    def response_of(self) -> Tensor:
        """(N,) number in 0..R-1 of the response of every response token."""
        return torch.arange(self.responses).repeat_interleave(self.response_lengths)

    @cached_property
    def offset(self) -> Tensor:
        """(N,) place of every response token within its response."""
        starts = self.response_lengths.cumsum(0) - self.response_lengths
        return torch.arange(len(self.response_of)) - starts[self.response_of]

    @cached_property
    def target_index(self) -> Tensor:
        """(N,) position in the packed row of every response token, in packed order."""
        return self.response_starts[self.response_of] + self.offset

    @cached_property
    def predictor_index(self) -> Tensor:
        """(N,) position whose hidden state predicts the response token: the token before it, but for the first token of
        a response the last token of its PROMPT."""
        last = (self.prompt_starts + self.prompt_lengths - 1)[self.prompt_of[self.response_of]]
        return torch.where(self.offset == 0, last, self.target_index - 1)

    @cached_property
    def kept_index(self) -> Tensor:
        """(K,) positions whose last hidden state predicts any response token, rising."""
        return self.predictor_index.unique(sorted=True)

    @cached_property
    def predictor_among_kept(self) -> Tensor:
        """(N,) place of the predictor of every response token in `kept_index`."""
        return torch.searchsorted(self.kept_index, self.predictor_index)

    @cached_property
    def position_ids(self) -> Tensor:
        """(T,) position ids: 0.. within each prompt, going on from there in each of its responses."""
        position = torch.arange(self.tokens) - self.prompt_starts.repeat_interleave(self.group_lengths)
        position[self.target_index] = self.prompt_lengths[self.prompt_of[self.response_of]] + self.offset
        return position

    @cached_property
    def owner(self) -> Tensor:
        """(T,) the response of every token of the packed row; -1 in prompts."""
        return torch.full((self.tokens,), -1).index_copy(0, self.target_index, self.response_of)

    def on(self, device: torch.device | str, name: str) -> Tensor:
        """One of the derived index tensors on a device, copied there once."""
        return self.cached((str(device), name), lambda: getattr(self, name).to(device))

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, once per layout and key: masks and indices are the same in every layer of a model."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def replace(self, key: Any, value: Any) -> None:
        """Puts another value in the place of what `cached` holds."""
        self.memo[key] = value

    def response_sums(self, values: Tensor) -> Tensor:
        """Sums (N,) token values over the scored tokens of their responses, giving (R,).

        Through a padded block rather than `index_add`, whose order of addition is not fixed on a GPU.
        """
        if self.scored is not None:
            values = values * self.on(values.device, "scored")
        width = self.longest_response
        slots = self.cached(
            (str(values.device), "slots"),
            lambda: (self.response_of * width + self.offset).to(values.device),
        )
        block = values.new_zeros(self.responses * width).index_copy(0, slots, values)
        return block.view(self.responses, width).sum(1)
