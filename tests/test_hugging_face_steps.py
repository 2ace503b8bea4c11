"""Steps of a decoder by fewer operations: transformers' hidden states bit for bit, or transformers itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vocabfold.hugging_face import generate, products, screen, steps
from vocabfold.hugging_face.products import same_product
from vocabfold.hugging_face.steps import NextStates, Steps, decoder_of, read_prompt

NUM_STEPS = 7
SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROTATION = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama 3": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROTATION)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "as many key heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 6})),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "qwen 2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen 3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "gemma 3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=9)),
    "large heads": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=264, sliding_window=4)),
}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Float32 products are shared by threads; slow on a machine that has other things to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def awake(model: Any) -> Any:
    """With weights large enough that its states depend on what it reads, norms' and biases' too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def prompt(batch: int, is_padded: bool) -> tuple[Tensor, Tensor | None]:
    ids = torch.randint(90, (batch, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask if is_padded else None


@torch.inference_mode()
def states(base: Any, batch: int, is_padded: bool, with_own_steps: bool) -> tuple[Tensor, NextStates]:
    """[NUM_STEPS, B, D] after a prompt, and what computed them."""
    ids, mask = prompt(batch, is_padded)
    _, cache = read_prompt(base, ids, mask)
    following = NextStates(base, cache, mask, ids.shape[1], NUM_STEPS, with_own_steps)
    tokens = torch.randint(90, (NUM_STEPS, batch, 1), generator=torch.Generator().manual_seed(2))
    return torch.stack([following(each) for each in tokens]), following


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_of_transformers_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    check_bits(awake(MODELS[name]()).to(dtype).base_model)


def test_threads_change_no_bit(two_threads: None) -> None:
    check_bits(awake(MODELS["llama"]()).base_model)


def check_bits(base: Any) -> None:
    for batch, is_padded in ((1, False), (3, False), (3, True)):
        expected, _ = states(base, batch, is_padded, with_own_steps=False)
        for time in ("checked", "trusted"):
            found, following = states(base, batch, is_padded, with_own_steps=True)
            assert following.steps is not None, (time, batch, is_padded)
            assert torch.equal(found, expected), (time, batch, is_padded)
    decoder = decoder_of(base)
    assert decoder is not None and len(decoder.has_same_bits) == 3
    assert float((expected[1:] - expected[:-1]).abs().max()) > 0.1


def test_a_long_text_has_the_same_bits() -> None:
    base = awake(MODELS["llama"]()).base_model
    with torch.inference_mode():
        ids = torch.randint(90, (2, 530), generator=torch.Generator().manual_seed(1))
        following = []
        for with_own_steps in (False, True):
            _, cache = read_prompt(base, ids, None)
            following.append(NextStates(base, cache, None, 530, 3, with_own_steps))
        for tokens in ids.split(1, dim=1)[:3]:
            assert torch.equal(*(each(tokens) for each in following))
        assert following[1].steps is not None


def test_where_a_bit_differs_transformers_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    base = awake(MODELS["llama"]()).base_model
    expected, _ = states(base, 1, False, with_own_steps=False)
    right = Steps.__call__
    monkeypatch.setattr(Steps, "__call__", lambda self, tokens: right(self, tokens) * (1 + 1e-6))
    found, following = states(base, 1, False, with_own_steps=True)
    assert torch.equal(found, expected) and following.steps is None
    assert states(base, 1, False, with_own_steps=True)[1].steps is None  # known by now


def hooked(model: Any) -> Any:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    return model


def patched(model: Any) -> Any:
    model.model.layers[0].forward = model.model.layers[0].forward
    return model


def adapted(model: Any) -> Any:
    class AdaptedLinear(torch.nn.Linear):
        """As adapters put them in a linear layer's place."""

    model.model.layers[1].self_attn.q_proj = AdaptedLinear(48, 48, bias=False)
    return model.eval()


UNKNOWN: dict[str, Any] = {
    "another decoder": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=48, n_layer=1, n_head=2)),
    "hooks": lambda: hooked(MODELS["llama"]()),
    "a forward of its own": lambda: patched(MODELS["llama"]()),
    "adapters": lambda: adapted(MODELS["llama"]()),
    "eager attention": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")),
    "a rotation that changes": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0})
    ),
    "training": lambda: MODELS["llama"]().train(),
    "meta": lambda: MODELS["llama"]().to("meta"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_left_to_transformers(case: str) -> None:
    model = UNKNOWN[case]()
    model = model if case == "training" else model.eval()
    assert decoder_of(model.base_model) is None


def test_a_model_without_known_steps_is_decoded_all_the_same() -> None:
    model = hooked(awake(MODELS["llama"]()))
    ids = torch.arange(1, 6).unsqueeze(0)
    expected = model.generate(input_ids=ids, do_sample=False, max_new_tokens=6, pad_token_id=0)
    assert torch.equal(generate(model, screen(model), ids, 6), expected)


def test_changed_weights_are_seen_and_a_forgotten_model_is_freed() -> None:
    gc.collect()
    before = len(steps._decoders)
    model = awake(MODELS["llama"]()).to(torch.bfloat16)
    first = decoder_of(model.base_model)
    assert decoder_of(model.base_model) is first
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert decoder_of(model.base_model) is not first
    expected = states(model.base_model, 1, False, with_own_steps=False)[0]
    assert torch.equal(states(model.base_model, 1, False, with_own_steps=True)[0], expected)
    assert len(steps._decoders) == before + 1
    del model
    gc.collect()
    assert len(steps._decoders) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_torchs_own(dtype: torch.dtype, two_threads: None) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 1), (7, 33), (96, 576), (130, 64)):
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype)
        for batch in (1, 2, 5, 16, 70):
            some = torch.randn(batch, columns, generator=generator).to(dtype)
            assert torch.equal(same_product(weight)(some), F.linear(some, weight))
            assert torch.equal(same_product(weight, bias)(some), F.linear(some, weight, bias))
            across = weight.T.contiguous().T
            assert torch.equal(same_product(across)(some), F.linear(some, across))


def test_without_an_instruction_the_product_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: Tensor) -> products.Product:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(products, "_packed", missing)
    weight, some = torch.randn(7, 33).bfloat16(), torch.randn(2, 33).bfloat16()
    assert torch.equal(same_product(weight)(some), F.linear(some, weight))
