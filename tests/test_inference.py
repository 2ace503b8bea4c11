"""Caches of decoding: exact ones change nothing, rounded ones keep their bounds, prefixes keep within their bytes."""

from __future__ import annotations

import random

import pytest
import torch
from experiments.tokens.quality import losses_through_cache
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.generate import generate
from vocabfold.heads import HeadSettings
from vocabfold.inference import KEY_VALUE_CACHES, LAYER_CACHES, PrefixCache, Reader, bytes_a_position
from vocabfold.inference.quantised import (
    INT4_CHANNELS,
    INT8_CHANNELS,
    dequantise_int4,
    dequantise_int8,
    group_size,
    quantise_int4,
    quantise_int8,
)
from vocabfold.models.build import ModelSettings, ModelWithHead, build_model

VOCABULARY_SIZE = 97
MAX_POSITIONS = 24
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def small_model(attention: str = "gpt2") -> ModelWithHead:
    torch.manual_seed(0)
    settings = ModelSettings(
        name=attention,
        attention=attention,
        hidden_size=16,
        num_layers=3,
        num_heads=2,
        max_positions=MAX_POSITIONS,
        window=5,
    )
    model = build_model(settings, HeadSettings(tied=True), VOCABULARY_SIZE).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))  # else every token is about as likely as any other
    return model


def some_text(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY_SIZE), k=length)


def limit_of(model: ModelWithHead, tokens: int, key_values: str = "exact") -> int:
    """The bytes that so many tokens take in a prefix cache."""
    cache = model.backbone.new_cache(1, LAYER_CACHES[key_values])
    with torch.inference_mode():
        model.backbone(torch.tensor([[0]]), cache)
    return int(tokens * bytes_a_position(cache))


@torch.inference_mode()
def whole(model: ModelWithHead, text: list[int]) -> Tensor:
    return model.backbone(torch.tensor([text]))[:, -1]


@torch.inference_mode()
def read(model: ModelWithHead, text: list[int], prefixes: PrefixCache, key_values: str = "exact") -> Tensor:
    return Reader(model.backbone, key_values, prefixes).read(text)


@pytest.mark.parametrize("attention", ["gpt2", "gpt_neo"])
@pytest.mark.parametrize("prompt_length", [1, 7, MAX_POSITIONS, 3 * MAX_POSITIONS])
def test_exact_caches_write_the_text_of_no_cache_with_the_same_log_probabilities(
    attention: str, prompt_length: int
) -> None:
    model = small_model(attention)
    prompt, count = some_text(prompt_length), 2 * MAX_POSITIONS
    expected = list(generate(model, prompt, count, temperature=0.0, key_values="none"))
    assert len(set(expected)) > 2
    prefixes = PrefixCache(1 << 20)
    for shared in (None, prefixes, prefixes):  # the second time the prompt is in the prefix cache
        assert list(generate(model, prompt, count, temperature=0.0, prefixes=shared)) == expected
    assert prefixes.stored_bytes > 0

    plain, cached = Reader(model.backbone, "none"), Reader(model.backbone, "exact", prefixes)
    text = list(prompt)
    with torch.inference_mode():
        for token in expected:
            log_prob = [model.head.log_prob(reader.read(text)) for reader in (plain, cached)]
            torch.testing.assert_close(*log_prob, **CLOSE)
            text.append(token)


@pytest.mark.parametrize("attention", ["gpt2", "gpt_neo"])
def test_prefixes_of_many_texts_are_exact_and_found_token_by_token(attention: str) -> None:
    model = small_model(attention)
    prefixes = PrefixCache(limit_of(model, 60))
    generator = random.Random(1)
    texts = [some_text(20)]
    for index in range(60):  # most continue or cut an earlier one somewhere; many are forgotten on the way
        beginning = generator.choice(texts[-8:])
        text = beginning[: generator.randint(0, len(beginning))] + some_text(generator.randint(0, 12), index)
        texts.append((text or [0])[:MAX_POSITIONS])
    for text in texts:
        torch.testing.assert_close(read(model, text, prefixes), whole(model, text), **CLOSE)
        assert sum(tensor.nbytes for tensor in prefixes.tensors()) == prefixes.stored_bytes <= prefixes.limit_bytes
        cache = model.backbone.new_cache(1)
        assert prefixes.restore([[*text, 0]], cache) == cache.length == len(text)  # the newest is never forgotten
    for text in (texts[-1][:5], [*texts[-1][:5], VOCABULARY_SIZE, 0]):
        longest = max(common_length(text[:-1], other) for other in stored_texts(prefixes))
        assert prefixes.restore([text], model.backbone.new_cache(1)) == longest


def test_a_text_that_leaves_a_run_in_its_middle_does_not_go_on_in_what_follows_the_run() -> None:
    model, prefixes = small_model(), PrefixCache(1 << 20)
    for text in ([1, 2, 3, 4, 7, 8], [1, 2, 3, 4, 9, 9]):  # a run of four tokens, and two that follow it
        read(model, text, prefixes)
    assert prefixes.restore([[1, 2, 7, 8, 5]], model.backbone.new_cache(1)) == 2
    torch.testing.assert_close(read(model, [1, 2, 7, 8, 5], prefixes), whole(model, [1, 2, 7, 8, 5]), **CLOSE)


def common_length(text: list[int], other: list[int]) -> int:
    pairs = zip(text, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))


def stored_texts(prefixes: PrefixCache) -> list[list[int]]:
    texts, waiting = [[]], [(prefixes.root, [])]
    while waiting:
        run, before = waiting.pop()
        texts.append([*before, *run.tokens])
        waiting += [(child, texts[-1]) for child in run.children.values()]
    return texts


@pytest.mark.parametrize("key_values", LAYER_CACHES)
def test_a_prompt_that_is_stored_whole_reads_its_last_token_only(key_values: str) -> None:
    model, prefixes = small_model(), PrefixCache(1 << 20)
    text = some_text(12)
    first = read(model, text, prefixes, key_values)
    lengths = []
    handle = model.backbone.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    for prompt in (text, [*text, 3], text[:4], [*text[:6], 95, 96]):
        again = read(model, prompt, prefixes, key_values)
        torch.testing.assert_close(again, read(model, prompt, PrefixCache(0), key_values), **CLOSE)
    handle.remove()
    assert lengths[0::2] == [1, 1, 1, 2]
    torch.testing.assert_close(read(model, text, prefixes, key_values), first, **CLOSE)
    assert prefixes.stored_bytes == limit_of(model, len(text) + 1 + 2, key_values)  # what is shared is stored once


def test_the_least_recently_used_prefix_goes_first_and_one_that_cannot_fit_displaces_nothing() -> None:
    model = small_model()
    prefixes = PrefixCache(limit_of(model, 20))

    def known(text: list[int]) -> int:
        return max(common_length(text, other) for other in stored_texts(prefixes))

    old, newer, newest = ([first, *some_text(9, first)] for first in (1, 2, 3))
    read(model, old, prefixes)
    read(model, newer, prefixes)
    read(model, old, prefixes)  # used again: now the other one is older
    read(model, newest, prefixes)
    assert [known(text) for text in (old, newer, newest)] == [10, 0, 10]
    too_long = [4, *some_text(20, 4)]
    torch.testing.assert_close(read(model, too_long, prefixes), whole(model, too_long), **CLOSE)
    assert [known(text) for text in (old, newest, too_long)] == [10, 10, 0]
    continued = old + some_text(11, 5)  # fits only without its own beginning, which must stay
    torch.testing.assert_close(read(model, continued, prefixes), whole(model, continued), **CLOSE)
    assert known(continued) == 10


@pytest.mark.parametrize("attention", ["gpt2", "gpt_neo"])
@torch.inference_mode()
def test_a_batch_of_different_prompts_shares_the_shortest_of_its_beginnings(attention: str) -> None:
    model, prefixes = small_model(attention), PrefixCache(1 << 20)
    for text in (some_text(10), [7, *some_text(14, 2)]):
        read(model, text, prefixes)
    batch = [some_text(10) + [5] * 5, [7, *some_text(14, 2)], [7, *some_text(11, 2), 1, 2, 3]]
    cache = model.backbone.new_cache(3)
    length = prefixes.restore(batch, cache)
    assert length == 10
    hidden = model.backbone(torch.tensor(batch)[:, length:], cache)
    torch.testing.assert_close(hidden, model.backbone(torch.tensor(batch))[:, length:], **CLOSE)
    prefixes.store(batch, cache)
    for row, text in enumerate(batch):
        torch.testing.assert_close(read(model, [*text, 9], prefixes), whole(model, [*text, 9]), **CLOSE)
        assert prefixes.restore([[*text, 9]], model.backbone.new_cache(1)) == 15, row


def test_bad_input_is_one_clear_line() -> None:
    model, prefixes = small_model(), PrefixCache(1 << 20)
    cases = [
        (lambda: PrefixCache(-1), "limited to -1 bytes"),
        (lambda: Reader(model.backbone, "int2"), "choose one of none, exact, bf16, int8, int4"),
        (lambda: Reader(model.backbone, "none", prefixes), "needs a key/value cache"),
        (lambda: Reader(model.backbone).read([]), "prompt is empty"),
        (lambda: prefixes.restore([[]], model.backbone.new_cache(1)), "texts of 0 tokens"),
        (lambda: prefixes.restore([[1], [1, 2]], model.backbone.new_cache(2)), "texts of 1, 2 tokens"),
        (lambda: prefixes.restore([[1]], model.backbone.new_cache(2)), "1 texts do not fill a cache of 2 rows"),
        (lambda: prefixes.store([[1]], model.backbone.new_cache(1)), "holds 0 positions"),
        (lambda: bytes_a_position(model.backbone.new_cache(1)), "empty cache has no size"),
        (lambda: losses_through_cache(model, [], "none", 1), "choose exact"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    used = model.backbone.new_cache(1)
    with torch.inference_mode():
        model.backbone(torch.tensor([[1, 2]]), used)
        with pytest.raises(UserError, match="cannot begin again"):
            prefixes.restore([[1, 2]], used)
        odd = LAYER_CACHES["int8"](None, 8)
        with pytest.raises(UserError, match="a multiple of 4, not 18"):
            odd.extend(torch.zeros(1, 3, 1, 6), torch.zeros(1, 3, 1, 6))


@pytest.mark.parametrize("channels", [4, 12, 64, 128, 192, 236])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_quantised_rows_come_back_within_their_bounds(channels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(channels)
    rows = torch.randn(3, 50, channels, generator=generator) * torch.logspace(-3, 4, 50).unsqueeze(-1)
    rows[0, 0], rows[0, 1], rows[0, 2, 0] = 0.0, 3.0, 1e9  # nothing, a constant, one beyond float16
    rows[:, 3] = rows[:, 3].abs()
    rows = rows.to(dtype)
    rounding = torch.finfo(dtype).eps + 1e-6  # of the result, and of float32 on the way
    for quantise, dequantise, size, largest, slack in (
        (quantise_int8, dequantise_int8, group_size(channels, INT8_CHANNELS), 127, 2**-11),
        (quantise_int4, dequantise_int4, group_size(channels, INT4_CHANNELS), 15, 2**-10),
    ):
        stored = quantise(rows)
        assert stored.dtype == torch.uint8
        scales = channels // size * (2 if largest == 127 else 4)
        assert stored.shape[-1] == (channels if largest == 127 else channels // 2) + scales
        back = dequantise(stored, channels, dtype)
        assert back.dtype == dtype and torch.isfinite(back).all()
        grouped = rows.double().unflatten(-1, (-1, size))
        most = grouped.abs().amax(dim=-1, keepdim=True)
        spread = most if largest == 127 else grouped.amax(dim=-1, keepdim=True) - grouped.amin(dim=-1, keepdim=True)
        step = (spread / largest).clamp(min=2**-14)
        error = (back.double().unflatten(-1, (-1, size)) - grouped).abs()
        bound = step * (0.5 + 2**-10) + (slack + rounding) * most
        fits = most < 60_000
        assert (error <= bound)[fits.expand_as(error)].all()
        assert (back[0, 0] == 0).all()


@pytest.mark.parametrize("attention", ["gpt2", "gpt_neo"])
@pytest.mark.parametrize("key_values", LAYER_CACHES)
@torch.inference_mode()
def test_what_comes_out_of_a_cache_does_not_depend_on_how_a_text_was_cut(attention: str, key_values: str) -> None:
    model = small_model(attention)
    tokens = torch.tensor([some_text(MAX_POSITIONS, seed) for seed in range(3)])
    results = []
    for chunks in ([MAX_POSITIONS], [1] * MAX_POSITIONS, [7, 1, 1, 10, 5]):
        cache = model.backbone.new_cache(3, LAYER_CACHES[key_values])
        results.append(torch.cat([model.backbone(piece, cache) for piece in tokens.split(chunks, dim=1)], dim=1))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **CLOSE)
    error = (results[0] - model.backbone(tokens)).norm() / results[0].norm()
    bounds = {"exact": (0, 1e-12), "bf16": (1e-6, 0.02), "int8": (1e-6, 0.05), "int4": (1e-3, 0.5)}
    assert bounds[key_values][0] <= error <= bounds[key_values][1]


def test_bytes_of_a_position_count_codes_and_scales() -> None:
    settings = ModelSettings(hidden_size=128, num_layers=2, num_heads=8, max_positions=MAX_POSITIONS)
    model = build_model(settings, HeadSettings(tied=True), VOCABULARY_SIZE).eval()
    sizes = {}
    for name, layer_cache in LAYER_CACHES.items():
        cache = model.backbone.new_cache(2, layer_cache)
        with torch.inference_mode():
            model.backbone(torch.zeros(2, 3, dtype=torch.long), cache)
        sizes[name] = bytes_a_position(cache)
    layers_and_both = 2 * 2
    assert sizes == {
        "exact": layers_and_both * 128 * 4,
        "bf16": layers_and_both * 128 * 2,
        "int8": layers_and_both * (128 + 2),
        "int4": layers_and_both * (64 + 4 * 4),
    }


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_losses_through_an_exact_cache_are_the_models_own(chunk: int) -> None:
    model = small_model()
    tokens = torch.tensor([some_text(13, seed) for seed in range(4)])
    targets = tokens[:, 1:].clone()
    targets[2, 4:] = -100
    batches = [(tokens[:3, :-1], targets[:3]), (tokens[3:, :-1], targets[3:])]
    sums, counts = losses_through_cache(model, batches, "exact", chunk)
    assert counts.tolist() == [12, 12, 4, 12]
    with torch.no_grad():
        expected = model(tokens[:, :-1], targets)
    torch.testing.assert_close(sums.sum() / counts.sum(), expected.loss, **CLOSE)
    rounded, _ = losses_through_cache(model, batches, "int4", chunk)
    assert not torch.equal(rounded, sums)


def test_every_cache_writes_text_past_the_last_position() -> None:
    model = small_model()
    for key_values in KEY_VALUE_CACHES:
        prefixes = None if key_values == "none" else PrefixCache(1 << 16)
        text = list(generate(model, [1, 2], 50, temperature=0.0, key_values=key_values, prefixes=prefixes))
        assert len(text) == 50
