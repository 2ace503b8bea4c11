"""Beginnings of validation stories, and what a model writes after them; the protocol of arXiv 2411.06371's Table 1."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from experiments.judging.base import Story
from vocabfold.data.corpora import Corpus
from vocabfold.data.token_file import TokenFile
from vocabfold.data.tokenizer import Tokenizer
from vocabfold.errors import UserError
from vocabfold.models.build import ModelWithHead

TEMPERATURE = 0.4  # this and the next as in the paper
TOP_K = 50
MAX_TOKENS = 160  # of a continuation: most of the embedded stories come to their end in it
CUT_SHARES = (0.25, 0.5)  # of a story's tokens; it is cut at random between
LEAST_TOKENS = 40  # of a story whose beginning is used


@dataclass(frozen=True)
class Beginning:
    """The tokens of a story up to where it was cut, and those that follow there, at most as many as a model may
    write; ``ended`` tells whether these come to the story's end."""

    tokens: list[int]
    own_ending: list[int]
    ended: bool


def documents_of(file: TokenFile, end_token: int, limit: int | None = None) -> list[list[int]]:
    """The tokens of each document, without its end token, or of the first ``limit`` documents."""
    starts = np.asarray(file.document_starts).astype(np.int64)[: None if limit is None else limit + 1]
    documents = [file.tokens[start:stop].tolist() for start, stop in itertools.pairwise(starts)]
    return [document[:-1] if document[-1:] == [end_token] else document for document in documents]


def choose_beginnings(corpus: Corpus, count: int, max_tokens: int, seed: int) -> list[Beginning]:
    """``count`` stories drawn from the validation set, no two the same, each cut at random in front of a word.

    ``seed`` decides which and where. Raises UserError where the corpus is no text or has too few stories.
    """
    tokenizer = text_of(corpus)
    documents = documents_of(corpus.valid, tokenizer.end_token)
    long_enough = [document for document in documents if len(document) >= LEAST_TOKENS]
    if len(long_enough) < count:
        raise UserError(
            f"the validation text has {len(long_enough)} stories of {LEAST_TOKENS} tokens or more, "
            f"and {count} beginnings are wanted: choose fewer with --beginnings"
        )
    random = np.random.default_rng(seed)
    beginnings = []
    for index in random.permutation(len(long_enough))[:count]:
        story = long_enough[index]
        cut = int(random.uniform(*CUT_SHARES) * len(story))
        while cut < len(story) - 1 and not tokenizer.decode(story[cut : cut + 1])[:1].isspace():
            cut += 1
        beginnings.append(Beginning(story[:cut], story[cut : cut + max_tokens], len(story) - cut <= max_tokens))
    return beginnings


def text_of(corpus: Corpus) -> Tokenizer:
    """The tokenizer of a corpus of text. Raises UserError for another."""
    if corpus.tokenizer is None:
        raise UserError(f"the corpus {corpus.name} has no text form: there is nothing to judge")
    return corpus.tokenizer


def own_stories(beginnings: Sequence[Beginning], tokenizer: Tokenizer) -> list[Story]:
    """The validation stories themselves, as far as a model might have written."""
    return [
        Story(tokenizer.decode(beginning.tokens), tokenizer.decode(beginning.own_ending), beginning.ended)
        for beginning in beginnings
    ]


def write_stories(
    model: ModelWithHead, beginnings: Sequence[Beginning], tokenizer: Tokenizer, max_tokens: int, seed: int
) -> list[Story]:
    """Every beginning as ``model`` writes it on; ``seed`` of the draws."""
    device = next(model.parameters()).device
    written = continue_texts(
        model,
        [beginning.tokens for beginning in beginnings],
        max_tokens,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        end_token=tokenizer.end_token,
        generator=torch.Generator(device).manual_seed(seed),
    )
    return [
        Story(tokenizer.decode(beginning.tokens), tokenizer.decode(tokens), len(tokens) < max_tokens)
        for beginning, tokens in zip(beginnings, written, strict=True)
    ]


@torch.inference_mode()
def continue_texts(
    model: ModelWithHead,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    end_token: int | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Up to ``max_tokens`` tokens after each prompt, ending before ``end_token``: vocabfold.generate for many at once.

    All texts grow together, from the length of the shortest prompt on; longer prompts give their own tokens until they
    are read. Past the model's positions the later half of the texts is read in again and the earlier half forgotten.
    Raises UserError for an empty prompt.
    """
    if not all(prompts):
        raise UserError("a prompt is empty: give at least one token")
    device = next(model.parameters()).device
    positions = model.gpt.config.max_positions
    texts = [list(prompt) for prompt in prompts]
    growing = list(range(len(texts)))
    length = min(map(len, texts), default=0)
    begin, cache = max(0, length - positions), model.gpt.new_cache(len(growing))
    piece = [text[begin:length] for text in texts]
    while growing:
        hidden = model.gpt(torch.tensor(piece, device=device), cache)[:, -1]
        due = [place for place, row in enumerate(growing) if len(texts[row]) == length]
        drawn = model.head.sample(hidden[due], temperature, top_k, None, generator).tolist() if due else []
        length += 1
        ended = set()
        for place, token in zip(due, drawn, strict=True):
            text = texts[growing[place]]
            if token == end_token:
                ended.add(place)
                continue
            text.append(token)
            if len(text) - len(prompts[growing[place]]) == max_tokens:
                ended.add(place)
        kept = [place for place in range(len(growing)) if place not in ended]
        growing = [growing[place] for place in kept]
        if not growing:
            break
        if length - begin > positions:
            begin, cache = length - max(1, positions // 2), model.gpt.new_cache(len(growing))
            piece = [texts[row][begin:length] for row in growing]
        else:
            cache.select(torch.tensor(kept, device=device))
            piece = [texts[row][length - 1 : length] for row in growing]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
