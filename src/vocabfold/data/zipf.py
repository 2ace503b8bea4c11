"""Token sequences with Zipf's unigram law and a known entropy rate, at any vocabulary size.

pi_v is proportional to 1 / (rank_v + offset)^exponent (Zipf-Mandelbrot, rank_v = 0 .. V - 1). Every token belongs to
one of K topics. With probability ``stay`` the next token is drawn from pi restricted to the topic of the token
before, else from pi:

    P(u|v) = (1 - stay) pi_u + stay [topic(u) = topic(v)] pi_u / Pi_topic(v),   Pi_k = sum of pi over topic k.

pi is stationary: sum_v pi_v P(u|v) = (1 - stay) pi_u + stay pi_u / Pi_topic(u) * (sum of pi_v over v in topic(u))
                                    = (1 - stay) pi_u + stay pi_u = pi_u.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vocabfold.errors import UserError

MAX_VOCABULARY_SIZE = 1 << 24
# Probabilities are whole numbers over their sum: sampling is then exact integer arithmetic, the same on every machine
_SCALE = float(1 << 44)
_TOKENS_PER_CHUNK = 1 << 20


@dataclass(frozen=True)
class ZipfLaw:
    """weight: [V] int64, pi_v = weight_v / sum; topic: [V] int64 below num_topics; stay: the probability of keeping
    the topic.
    """

    weight: np.ndarray
    topic: np.ndarray
    num_topics: int
    stay: float
    seed: int

    @property
    def vocabulary_size(self) -> int:
        return len(self.weight)

    @property
    def unigram(self) -> np.ndarray:
        """pi: [V] float64, in token order."""
        return self.weight / self.weight.sum()

    @property
    def topic_mass(self) -> np.ndarray:
        """Pi: [num_topics] float64."""
        return np.bincount(self.topic, self.unigram, self.num_topics)

    def conditional(self, token: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """P(token | previous), float64, elementwise."""
        unigram = self.unigram
        same = self.topic[token] == self.topic[previous]
        return unigram[token] * ((1 - self.stay) + self.stay * same / self.topic_mass[self.topic[previous]])


def zipf_law(
    vocabulary_size: int,
    *,
    exponent: float = 1.0,
    offset: float = 2.7,
    num_topics: int = 64,
    stay: float = 0.7,
    seed: int = 0,
    id_order: str = "rank",
) -> ZipfLaw:
    """The law with topics of equal token counts assigned by ``seed``.

    id_order: ``rank`` gives id 0 to the most frequent token and so on; ``random`` gives ids to ranks at random.
    Raises UserError for settings that have no such law.
    """
    if not 2 <= vocabulary_size <= MAX_VOCABULARY_SIZE:
        raise UserError(f"data.vocabulary_size must be 2 .. {MAX_VOCABULARY_SIZE}, not {vocabulary_size}")
    if not 1 <= num_topics <= vocabulary_size:
        raise UserError(f"data.num_topics must be 1 .. data.vocabulary_size = {vocabulary_size}, not {num_topics}")
    if not 0 <= stay < 1:
        raise UserError(f"data.stay must be at least 0 and below 1 (at 1 the topic never changes), not {stay}")
    if not 0 <= exponent <= 10:
        raise UserError(f"data.exponent must be 0 .. 10, not {exponent}")
    if not 0 < offset < np.inf:
        raise UserError(f"data.offset must be a number above 0, not {offset}")
    if id_order not in ("rank", "random"):
        raise UserError(f"data.id_order must be rank or random, not {id_order}")
    if seed < 0:
        raise UserError(f"data.seed must be 0 or more, not {seed}")
    # relative to the first rank, so that a large offset does not underflow
    relative = ((np.arange(vocabulary_size) + offset) / offset) ** -exponent
    weight = np.maximum(np.rint(relative * (_SCALE / relative.sum())), 1).astype(np.int64)
    generator = _generator(seed, "law")
    topic = np.empty(vocabulary_size, np.int64)
    topic[np.argsort(generator.random(vocabulary_size), kind="stable")] = np.arange(vocabulary_size) % num_topics
    if id_order == "random":
        weight = weight[np.argsort(generator.random(vocabulary_size), kind="stable")]
    return ZipfLaw(weight, topic, num_topics, stay, seed)


def unigram_entropy_nats(law: ZipfLaw) -> float:
    """-sum_v pi_v ln pi_v."""
    unigram = law.unigram
    return float(-(unigram @ np.log(unigram)))


def entropy_rate_nats(law: ZipfLaw) -> float:
    """The exact H = -sum_v pi_v sum_u P(u|v) ln P(u|v) in nats a token, in O(V): the least loss that any model can
    reach.

    All v of topic k share one row. With a_k = (1 - stay) + stay / Pi_k, that row holds pi_u a_k inside the topic and
    pi_u (1 - stay) outside. With E_k = sum of pi_u ln pi_u over the topic and E = sum_k E_k, the row's entropy is
    -[a_k (E_k + Pi_k ln a_k) + (1 - stay) (E - E_k + (1 - Pi_k) ln(1 - stay))], and H is its mean under Pi.
    """
    unigram, mass = law.unigram, law.topic_mass
    inside = np.bincount(law.topic, unigram * np.log(unigram), law.num_topics)
    leave = 1 - law.stay
    scale = leave + law.stay / mass
    row_entropy = -(
        scale * (inside + mass * np.log(scale)) + leave * (inside.sum() - inside + (1 - mass) * np.log(leave))
    )
    return float(mass @ row_entropy)


def zipf_tokens(law: ZipfLaw, num_tokens: int, stream: str = "train") -> Iterator[np.ndarray]:
    """A stationary sequence of ``num_tokens`` ids, in chunks of int64 [n]; the same for the same law, seed and stream
    name.

    No loop over tokens: only a draw from all of pi can change the topic, so each position's topic is that of the last
    such draw. Raises UserError if ``num_tokens`` < 1.
    """
    if num_tokens < 1:
        raise UserError(f"data.num_train_tokens and data.num_valid_tokens must be 1 or more, not {num_tokens}")
    generator = _generator(law.seed, stream)
    by_topic = np.argsort(law.topic, kind="stable")
    cumulative = np.cumsum(law.weight[by_topic])
    topic_end = cumulative[np.cumsum(np.bincount(law.topic, minlength=law.num_topics)) - 1]
    topic_start = np.concatenate([[0], topic_end[:-1]])
    current_topic: int | None = None
    for start in range(0, num_tokens, _TOKENS_PER_CHUNK):
        length = min(_TOKENS_PER_CHUNK, num_tokens - start)
        fresh = generator.random(length) >= law.stay
        fresh[0] |= current_topic is None
        fresh_draw = generator.integers(0, cumulative[-1], int(fresh.sum()))
        fresh_topic = np.searchsorted(topic_end, fresh_draw, side="right")
        run_topic = np.concatenate([[0 if current_topic is None else current_topic], fresh_topic])
        kept_topic = run_topic[np.cumsum(fresh)[~fresh]]
        draw = np.empty(length, np.int64)
        draw[fresh] = fresh_draw
        draw[~fresh] = generator.integers(topic_start[kept_topic], topic_end[kept_topic])
        current_topic = int(run_topic[-1])
        yield by_topic[np.searchsorted(cumulative, draw, side="right")]


def _generator(seed: int, stream: str) -> np.random.Generator:
    sequence: Any = np.random.SeedSequence([seed, int.from_bytes(stream.encode(), "little")])
    return np.random.Generator(np.random.PCG64(sequence))
