"""The Zipf corpus: its law, its stationarity and its entropy rate against a brute-force transition matrix."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import stats

from vocabfold.data.zipf import ZipfLaw, entropy_rate_nats, unigram_entropy_nats, zipf_law, zipf_tokens
from vocabfold.errors import UserError

# a fixed sample: a change here means that every committed result on this corpus changes
KNOWN = [3, 6, 27, 4, 4, 4, 131, 337, 94, 550, 2, 528]


def transition_matrix(law: ZipfLaw) -> np.ndarray:
    """P[v, u], entry by entry from the definition."""
    unigram = law.weight / law.weight.sum()
    matrix = np.empty((law.vocabulary_size, law.vocabulary_size))
    for v in range(law.vocabulary_size):
        mass = sum(unigram[u] for u in range(law.vocabulary_size) if law.topic[u] == law.topic[v])
        for u in range(law.vocabulary_size):
            matrix[v, u] = (1 - law.stay) * unigram[u]
            if law.topic[u] == law.topic[v]:
                matrix[v, u] += law.stay * unigram[u] / mass
    return matrix


def sample(law: ZipfLaw, num_tokens: int, stream: str = "train") -> np.ndarray:
    return np.concatenate(list(zipf_tokens(law, num_tokens, stream)))


@pytest.mark.parametrize("id_order", ["rank", "random"])
@pytest.mark.parametrize(
    ("num_topics", "stay", "exponent"), [(7, 0.7, 1.0), (1, 0.5, 1.0), (50, 0.9, 0.5), (8, 0.0, 2.0)]
)
def test_brute_force(num_topics: int, stay: float, exponent: float, id_order: str) -> None:
    law = zipf_law(50, num_topics=num_topics, stay=stay, exponent=exponent, id_order=id_order, seed=3)
    matrix = transition_matrix(law)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(law.unigram @ matrix, law.unigram, rtol=1e-12)
    rate = -law.unigram @ (matrix * np.log(matrix)).sum(axis=1)
    assert math.isclose(entropy_rate_nats(law), rate, rel_tol=1e-12)
    token, previous = np.meshgrid(np.arange(50), np.arange(50))
    np.testing.assert_allclose(law.conditional(token, previous), matrix, rtol=1e-12)


def test_unigram_law() -> None:
    law = zipf_law(1000, exponent=1.3, offset=2.0)
    expected = 1 / (np.arange(1000) + 2.0) ** 1.3
    np.testing.assert_allclose(law.unigram, expected / expected.sum(), rtol=1e-8)
    assert math.isclose(unigram_entropy_nats(law), stats.entropy(law.unigram), rel_tol=1e-12)
    shuffled = zipf_law(1000, exponent=1.3, offset=2.0, id_order="random")
    assert not np.array_equal(shuffled.weight, law.weight)
    np.testing.assert_array_equal(np.sort(shuffled.weight), np.sort(law.weight))
    assert set(np.bincount(law.topic)) <= {1000 // 64, 1000 // 64 + 1}


def test_no_memory_means_unigram_entropy() -> None:
    law = zipf_law(300, stay=0.0)
    assert math.isclose(entropy_rate_nats(law), unigram_entropy_nats(law), rel_tol=1e-12)
    assert entropy_rate_nats(zipf_law(300, stay=0.7)) < unigram_entropy_nats(law) - 0.5


def test_samples_follow_the_unigram_law() -> None:
    """Tokens of one chain depend on each other, so chi-squared takes every 40th: 0.7^40 is nothing."""
    law = zipf_law(50, num_topics=8)
    thinned = sample(law, 1_500_000)[::40]
    _, p_value = stats.chisquare(np.bincount(thinned, minlength=50), law.unigram * len(thinned))
    assert p_value > 1e-3


def test_transitions_follow_the_law() -> None:
    law = zipf_law(12, num_topics=3, stay=0.6)
    tokens = sample(law, 1_200_000)  # more than one chunk: the topic is carried over
    counts = np.zeros((12, 12))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    expected = transition_matrix(law) * counts.sum(axis=1, keepdims=True)
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(statistic, 12 * 11) > 1e-3


def test_topic_is_carried_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabfold.data.zipf._TOKENS_PER_CHUNK", 3)
    law = zipf_law(100, num_topics=10, stay=0.99)
    topics = law.topic[sample(law, 3000)]
    assert (topics[1:] != topics[:-1]).mean() < 0.03


def test_plug_in_loss_is_the_entropy_rate() -> None:
    law = zipf_law(5000)
    tokens = sample(law, 1_000_000)
    losses = -np.log(law.conditional(tokens[1:], tokens[:-1]))
    assert abs(losses.mean() - entropy_rate_nats(law)) < 0.015
    unigram_losses = -np.log(law.unigram[tokens])
    assert abs(unigram_losses.mean() - unigram_entropy_nats(law)) < 0.03


def test_a_million_tokens_of_vocabulary() -> None:
    started = time.perf_counter()
    law = zipf_law(1_000_000)
    tokens = sample(law, 1_000_000)
    assert 0 < entropy_rate_nats(law) < unigram_entropy_nats(law) < math.log(1_000_000)
    assert len(tokens) == 1_000_000 and tokens.max() > 500_000
    assert time.perf_counter() - started < 10  # measured 0.5 s; the margin is for a busy machine


def test_same_everywhere_and_streams_differ() -> None:
    law = zipf_law(1000, seed=5)
    assert sample(law, 12).tolist() == KNOWN
    assert not np.array_equal(sample(law, 12, "valid"), KNOWN)
    assert not np.array_equal(sample(zipf_law(1000, seed=6), 12), KNOWN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary_size": 1}, "vocabulary_size"),
        ({"num_topics": 0}, "num_topics"),
        ({"num_topics": 101}, "num_topics"),
        ({"stay": 1.0}, "stay"),
        ({"stay": -0.1}, "stay"),
        ({"exponent": -1.0}, "exponent"),
        ({"exponent": math.nan}, "exponent"),
        ({"offset": 0.0}, "offset"),
        ({"seed": -1}, "seed"),
        ({"id_order": "alphabet"}, "id_order"),
    ],
)
def test_impossible_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        zipf_law(**{"vocabulary_size": 100, **settings})  # type: ignore[arg-type]


def test_no_tokens() -> None:
    with pytest.raises(UserError, match="num_train_tokens"):
        list(zipf_tokens(zipf_law(100), 0))
