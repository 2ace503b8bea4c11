"""Decoding on a card: a head's step alone and whole decoding with a key/value cache, and whether it is exact.

Random weights, drawn so wide that the distributions are about as sharp as a trained model's (``entropy_nats``): how
many groups a folded head visits depends on it. ``disagreements`` counts the rows whose greedy token is not the largest
of the head's own log_prob, and ``largest_gap_nats`` is by how much: rounding, where it is tiny.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from experiments.cards.bench import Case, Plan, Work, built_on, measure_cases
from experiments.cards.card_heads import FOLDED, FULL, PAPER, SETTINGS, zipf_tokens
from experiments.cards.rows import Rows
from experiments.study.decoding import decode
from vocabfold.models.build import ModelSettings, ModelWithHead, build_model

KEYS = ("vocabulary_size", "hidden_size", "batch_size", "method", "strategy", "work")
OWN = ("new_tokens", "entropy_nats", "disagreements", "largest_gap_nats")
METHODS = (FULL, FOLDED, PAPER)
STRATEGIES: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "top-p 0.9": {"top_p": 0.9}}
HEAD, WHOLE = "head", "whole"
LOGIT_STD = 4.0  # of all logits together, which leaves a few nats of entropy
PROMPT_TOKENS = 16


class DecodingSide:
    """A model in inference, prompts [B, T], and hidden states [B, D] as the head sees them."""

    def __init__(
        self, method: str, vocabulary_size: int, hidden_size: int, batch_size: int, device: torch.device, tiny: bool
    ) -> None:
        layers = 2 if tiny else 8
        sizes = ModelSettings(hidden_size=hidden_size, num_layers=layers, num_heads=layers, max_positions=64)
        steps = 1 if method == FULL else 2  # a folded head has two softmaxes, whose variances add
        std = LOGIT_STD / (steps * hidden_size) ** 0.5
        settings = replace(SETTINGS[method], init_std=std)
        self.model: ModelWithHead = built_on(device, lambda: build_model(sizes, settings, vocabulary_size)).eval()
        self.prompts = zipf_tokens(batch_size * PROMPT_TOKENS, vocabulary_size, device).view(batch_size, -1)
        with torch.inference_mode():
            self.hidden = self.model.gpt(self.prompts)[:, -1].clone()

    def live(self) -> list[Tensor]:
        """What stands before a step."""
        return [*self.model.parameters(), *self.model.buffers(), self.prompts, self.hidden]

    def step(self, strategy: str) -> Callable[[], Tensor]:
        """The head's step alone."""
        generator = torch.Generator(self.hidden.device).manual_seed(0)
        settings = STRATEGIES[strategy]
        return lambda: self.model.head.sample(self.hidden, generator=generator, **settings)

    def whole(self, strategy: str, new_tokens: int) -> Callable[[], Tensor]:
        """A prompt read and ``new_tokens`` decoded."""
        settings = STRATEGIES[strategy]

        def choose(hidden: Tensor, generator: torch.Generator) -> Tensor:
            return self.model.head.sample(hidden, generator=generator, **settings)

        return lambda: decode(self.model, self.prompts, new_tokens, choose)

    @torch.inference_mode()
    def exactness(self) -> dict[str, Any]:
        """Of the greedy token, beside the head's own dense log_prob."""
        head = self.model.head
        chosen = head.sample(self.hidden, temperature=0.0)
        log_prob = head.log_prob(self.hidden)
        best = log_prob.max(dim=-1).values
        gap = best - log_prob.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        return {
            "disagreements": int((log_prob.argmax(dim=-1) != chosen).sum()),
            "largest_gap_nats": float(gap.max()),
            "entropy_nats": float(-(log_prob.exp() * log_prob).sum(dim=-1).mean()),
        }


def cases_of(
    method: str, vocabulary_size: int, hidden_size: int, batch_size: int, device: torch.device, tiny: bool
) -> list[Case]:
    """Both strategies, the head's step alone and whole decoding, which share one model."""
    made: list[tuple[DecodingSide, dict[str, Any]]] = []
    new_tokens = 4 if tiny else 16

    def case(strategy: str, work: str) -> Case:
        def build() -> Work:
            if not made:
                side = DecodingSide(method, vocabulary_size, hidden_size, batch_size, device, tiny)
                made.append((side, side.exactness()))
            side, exactness = made[0]
            if work == HEAD:
                return Work(side.step(strategy), side.live, exactness | {"new_tokens": 1})
            run = side.whole(strategy, new_tokens)
            return Work(run, side.live, exactness | {"new_tokens": new_tokens}, divisor=new_tokens)

        key = {"vocabulary_size": vocabulary_size, "hidden_size": hidden_size, "batch_size": batch_size}
        return Case({**key, "method": method, "strategy": strategy, "work": work}, build)

    return [case(strategy, work) for work in (HEAD, WHOLE) for strategy in STRATEGIES]


def measure_part(rows: Rows, plan: Plan) -> None:
    """Every size and batch; the three heads take turns."""
    sizes = ((499, 32),) if plan.tiny else ((50_257, 768), (262_144, 768), (50_257, 128), (262_144, 128))
    for vocabulary_size, hidden_size in sizes:
        for batch_size in (1, 4) if plan.tiny else (1, 64):
            if plan.seconds_left <= 0:
                return
            size = (vocabulary_size, hidden_size, batch_size, plan.device, plan.tiny)
            cases = [case for method in METHODS for case in cases_of(method, *size)]
            measure_cases(cases, rows, plan)
            cases.clear()  # they hold the models
