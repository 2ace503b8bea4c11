"""The likeliest continuation by beam search: the N best texts grow together, each step's tokens come from head.topk.

A text that ends leaves the beam, which is then one narrower (Sutskever et al. 2014, arXiv 1409.3215); with one beam
this is greedy decoding. Texts are compared by log P / length ** length_penalty (Wu et al. 2016, arXiv 1609.08144, with
its simplest denominator), the end token counted in both.
"""

from __future__ import annotations

import torch

from vocabfold.errors import UserError
from vocabfold.models.build import ModelWithHead

MOST_PENALTY = 10  # 1 compares log P a token; far above, only the length would count


@torch.inference_mode()
def beam_search(
    model: ModelWithHead,
    prompt: list[int],
    max_tokens: int,
    *,
    num_beams: int,
    length_penalty: float = 1.0,
    end_token: int | None = None,
) -> tuple[list[int], float]:
    """(the best continuation found, of up to ``max_tokens`` tokens and without ``end_token``; its log P in nats, the
    end token's included).

    Keys and values are cached and follow their texts. Where the model has no position left, the later half of each
    text is read in again, as ``generate`` does. Raises UserError for an empty prompt or impossible settings.
    """
    _check(prompt, max_tokens, num_beams, length_penalty)
    device = next(model.parameters()).device
    max_positions = model.gpt.config.max_positions
    texts = torch.tensor([prompt], device=device)
    scores = torch.zeros(1, dtype=torch.float64, device=device)
    fresh, cache = texts[:, -max_positions:], model.gpt.new_cache(1)
    best_text, best_log_prob, best_score = texts[0], 0.0, -float("inf")
    for length in range(1, max_tokens + 1):
        if cache.length + fresh.shape[1] > max_positions:
            fresh, cache = texts[:, -max(1, max_positions // 2) :], model.gpt.new_cache(len(texts))
        hidden = model.gpt(fresh, cache)[:, -1]
        # No text can send more successors into the beam than it is wide.
        log_prob, tokens = model.head.topk(hidden, min(num_beams, model.head.vocabulary_size))
        candidates = (scores.unsqueeze(-1) + log_prob).flatten()
        scores, chosen = candidates.topk(min(num_beams, len(candidates)))
        rows, tokens = chosen // tokens.shape[1], tokens.flatten()[chosen]
        texts = torch.cat([texts[rows], tokens.unsqueeze(-1)], dim=-1)
        has_ended = torch.full_like(tokens, length == max_tokens, dtype=torch.bool)
        if end_token is not None:
            has_ended |= tokens == end_token
        num_beams -= int(has_ended.sum())
        if has_ended.any():
            first = int(has_ended.nonzero()[0])  # all that end now are equally long: the likeliest is the best of them
            score = float(scores[first]) / length**length_penalty
            if score > best_score:
                best_text, best_log_prob, best_score = texts[first], float(scores[first]), score
        going_on = (~has_ended).nonzero().squeeze(-1)
        # log P only falls; divided by the longest length it is the most that a text can still reach.
        if len(going_on) == 0 or float(scores[going_on[0]]) / max_tokens**length_penalty <= best_score:
            break
        texts, scores, tokens = texts[going_on], scores[going_on], tokens[going_on]
        cache.select(rows[going_on])
        fresh = tokens.unsqueeze(-1)
    continuation: list[int] = best_text[len(prompt) :].tolist()
    return continuation[:-1] if continuation[-1] == end_token else continuation, best_log_prob


def _check(prompt: list[int], max_tokens: int, num_beams: int, length_penalty: float) -> None:
    if not prompt:
        raise UserError("the prompt is empty: give at least one token")
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}: choose at least 1")
    if num_beams < 1:
        raise UserError(f"the number of beams is {num_beams}: choose at least 1 (1 is greedy decoding)")
    if not 0 <= length_penalty <= MOST_PENALTY:
        raise UserError(f"the length penalty is {length_penalty}: choose from 0 (log P itself) to {MOST_PENALTY}")
