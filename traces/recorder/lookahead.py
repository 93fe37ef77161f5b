"""Lookahead observations: the router of layer l + d asked about the gate input of layer l."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from traces.recorder.routers import Choice, RouterCall, RouterFacts, choose, rank

if TYPE_CHECKING:
    import torch

SCORES_HELD = 2**24
"""How many selection scores wait to be ranked together: those of a whole decode pass, less of a long prefill."""


class Lookahead:
    """Collects the observations of one pass after the other."""

    def __init__(self, routers: Sequence[RouterFacts], experts: int, depth: int, ranks: int) -> None:
        """`depth` layers are looked ahead, and each observation ranks `ranks` experts."""
        self.routers = routers
        self.experts = experts
        self.depth = depth
        self.ranks = ranks
        # Questions are asked in the order in which layers run: of router l about the layers l - 1, l - 2, ...
        self._asked = [
            (index - ahead) * depth + ahead - 1 for index in range(len(routers)) for ahead in range(1, min(index, depth) + 1)
        ]
        self._rows: torch.Tensor | None = None
        self._gate_inputs: list[torch.Tensor] = []
        """Of the last `depth` layers."""
        self._choices: list[Choice] = []
        """What waits to be ranked."""
        self._ranked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_router(self, index: int, call: RouterCall) -> None:
        """Ask the router of layer `index`, which has just been called, about the gate inputs of the layers before it.

        Its further arguments are those of this very pass, which is why the question waits until the pass has come here.
        """
        for hidden in reversed(self._gate_inputs):
            choice = choose(self.routers[index].module, call, hidden.to(call.hidden.device), self.experts)
            assert choice is not None  # the probe saw its logits
            self._choices.append(choice)
        if sum(choice.scores.numel() for choice in self._choices) > SCORES_HELD:
            self._rank()
        self._gate_inputs = [*self._gate_inputs, call.hidden][-self.depth :]

    def finish_pass(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ranked ids (int16) and probabilities (float16), both [T, L, D, M]; -1 and 0 beyond the last layer."""
        import torch

        self._rank()
        ids, scores = (torch.cat(found) for found in zip(*self._ranked, strict=True))
        questions, tokens = len(self._asked), len(ids) // len(self._asked)
        if self._rows is None:
            self._rows = torch.tensor(self._asked, device=ids.device)
        layers = len(self.routers)
        all_ids = torch.full((layers * self.depth, tokens, self.ranks), -1, dtype=torch.int16, device=ids.device)
        all_scores = torch.zeros(all_ids.shape, dtype=torch.float16, device=ids.device)
        all_ids[self._rows] = ids.view(questions, tokens, self.ranks)
        all_scores[self._rows] = scores.view(questions, tokens, self.ranks)
        self._gate_inputs, self._ranked = [], []
        shape = (tokens, layers, self.depth, self.ranks)
        return all_ids.movedim(0, 1).reshape(shape), all_scores.movedim(0, 1).reshape(shape)

    def _rank(self) -> None:
        """Rank all that waits at once, since many small sorts take long."""
        import torch

        if not self._choices:
            return
        device = self._choices[0].scores.device
        scores = torch.cat([choice.scores.to(device) for choice in self._choices])
        chosen = [choice.ids.to(device) for choice in self._choices if choice.ids is not None]
        ids = torch.cat(chosen) if len(chosen) == len(self._choices) else None
        ranked, probability = rank(scores, ids, self.ranks, are_logits=self.routers[0].selects_by_logits)
        first = self._ranked[0][0].device if self._ranked else device
        self._ranked.append((ranked.to(first, torch.int16), probability.to(first, torch.float16)))
        self._choices = []
