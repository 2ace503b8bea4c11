"""The backbone against transformers' own, the cache against the whole sequence, sizes, memory and initialisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.models.gpt import GPT, GPTConfig, causal_mask
from vocabfold.models.published import load_published

VOCABULARY_SIZE = 61
WINDOW = 8
MAX_POSITIONS = 40


def tiny(attention: str, **changes: Any) -> GPTConfig:
    sizes: dict[str, Any] = {"vocabulary_size": VOCABULARY_SIZE, "hidden_size": 24, "num_layers": 4, "num_heads": 3}
    sizes |= {"max_positions": MAX_POSITIONS, "attention": attention, "window": WINDOW}
    return GPTConfig(**(sizes | changes))


def reference(attention: str) -> transformers.PreTrainedModel:
    """A randomly initialised model of transformers whose attention is far from uniform and whose biases are not 0."""
    torch.manual_seed(11)
    shared: dict[str, Any] = {"vocab_size": VOCABULARY_SIZE, "bos_token_id": 0, "eos_token_id": 0}
    model: transformers.PreTrainedModel
    if attention == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=24, n_layer=4, n_head=3, n_positions=MAX_POSITIONS, **shared)
        )
    else:
        model = transformers.GPTNeoForCausalLM(
            transformers.GPTNeoConfig(
                hidden_size=24,
                num_layers=4,
                num_heads=3,
                max_position_embeddings=MAX_POSITIONS,
                window_size=WINDOW,
                attention_types=[[["global", "local"], 2]],
                **shared,
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=["gpt2", "gpt_neo"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder: Path = tmp_path_factory.mktemp(request.param)
    theirs = reference(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_published(folder).eval()


def some_tokens(length: int, batch_size: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(VOCABULARY_SIZE, (batch_size, length), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 5, WINDOW, WINDOW + 1, 30, MAX_POSITIONS])
def test_hidden_logits_and_gradients_equal_transformers(pair: tuple, length: int, dtype: torch.dtype) -> None:
    theirs, ours = (model.to(dtype) for model in pair)
    tokens = some_tokens(length)
    targets = some_tokens(length).flip(1)
    for model in (theirs, ours):
        model.zero_grad()

    hidden = ours(tokens)
    logits = hidden @ ours.token_embedding.weight.T
    expected = theirs(tokens, output_hidden_states=True)
    # transformers computes GPT-Neo's scores in float32 even where everything else is float64.
    tolerance = 1e-5 if dtype == torch.float32 or ours.config.attention == "gpt_neo" else 1e-12
    close: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(hidden, expected.hidden_states[-1], **close)
    torch.testing.assert_close(logits, expected.logits, **close)

    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    F.cross_entropy(expected.logits.flatten(0, 1), targets.flatten()).backward()
    torch.testing.assert_close(ours.token_embedding.weight.grad, theirs.transformer.wte.weight.grad, **close)
    torch.testing.assert_close(ours.blocks[1].widen.bias.grad, theirs.transformer.h[1].mlp.c_fc.bias.grad, **close)


@pytest.mark.parametrize("attention", ["gpt2", "gpt_neo"])
@pytest.mark.parametrize(
    "chunks",
    [[1] * 40, [20] + [1] * 20, [3, 1, 1, 9, 1, 25], [10, 30], [7, 1, 1, 31]],
    ids=lambda chunks: str(chunks[:3]),
)
def test_cache_gives_the_hidden_states_of_the_whole_sequence(attention: str, chunks: list[int]) -> None:
    torch.manual_seed(0)
    model = GPT(tiny(attention)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        tokens = some_tokens(sum(chunks))
        cache = model.new_cache(batch_size=3)
        pieces = [model(piece, cache) for piece in tokens.split(chunks, dim=1)]
        assert cache.length == sum(chunks)
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [1, 2, 64])
def test_cache_at_the_smallest_window_and_one_longer_than_the_model(window: int) -> None:
    torch.manual_seed(0)
    model = GPT(tiny("gpt_neo", window=window)).double().eval()
    tokens = some_tokens(20)
    with torch.no_grad():
        cache = model.new_cache(3)
        pieces = [model(piece, cache) for piece in tokens.split([6, 1, 1, 12], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_local_layers_keep_no_more_than_their_window_needs() -> None:
    model = GPT(tiny("gpt_neo", max_positions=200)).eval()
    cache = model.new_cache(1)
    for _ in range(200):
        model(torch.zeros(1, 1, dtype=torch.long), cache)
    capacities = [layer.stored.shape[3] for layer in cache.layers if layer.stored is not None]
    assert capacities == [200, 2 * WINDOW, 200, 2 * WINDOW]


def test_causal_mask_is_the_stated_set() -> None:
    for window in (None, 1, 3, 9):
        mask = causal_mask(4, 9, window)
        for row, position in enumerate(range(5, 9)):
            first = 0 if window is None else max(0, position - window + 1)
            assert mask[row].nonzero().flatten().tolist() == list(range(first, position + 1))


@pytest.mark.parametrize(
    ("hidden_size", "millions", "printed"),
    # The paper prints 152 M at 1024, which is 152.76 M cut off rather than rounded. It prints 659 M at 2048; the
    # architecture it describes has 507 M there.
    [(128, 8.084864, "8.1"), (256, 19.315456, "19.3"), (1024, 152.759296, "152"), (2048, 506.845184, "507")],
)
def test_parameter_counts_of_the_paper(hidden_size: int, millions: float, printed: str) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(50_257, hidden_size, num_layers=8, num_heads=8, max_positions=512))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == round(millions * 1e6)
    assert printed in (f"{millions:.1f}", f"{millions:.0f}", str(int(millions)))


@pytest.mark.parametrize("attention", ["gpt2", "gpt_neo"])
def test_initialisation(attention: str) -> None:
    config = tiny(attention, hidden_size=192, num_layers=8)
    torch.manual_seed(5)
    model = GPT(config)
    torch.manual_seed(5)
    again = GPT(config).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    torch.manual_seed(6)
    assert not torch.equal(GPT(config).token_embedding.weight, model.token_embedding.weight)

    residual_std = 0.02 / 4 if attention == "gpt2" else 0.02  # sqrt(2 * 8 layers) = 4
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            wanted = residual_std if "output" in name or "narrow" in name else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name
    assert ("blocks.0.attention.query_key_value.bias" in model.state_dict()) == (attention == "gpt2")


def test_a_model_built_without_memory_can_be_initialised_later() -> None:
    config = tiny("gpt_neo")
    with torch.device("meta"):
        late = GPT(config)
    late.to_empty(device="cpu")
    torch.manual_seed(1)
    late.reset_parameters()
    early = GPT(config)
    early.load_state_dict(late.state_dict())
    tokens = some_tokens(30)
    assert torch.equal(late(tokens), early(tokens))


@pytest.mark.parametrize("attention", ["gpt2", "gpt_neo"])
def test_training_keeps_sixteen_vectors_a_token_and_layer_and_no_square(attention: str) -> None:
    """Per layer: 2 norm inputs, 2 norm outputs, 3 q k v, 1 attention output, 4 + 4 in the perceptron, times D."""
    length, hidden_size, num_layers, num_heads = 256, 32, 4, 4
    model = GPT(tiny(attention, hidden_size=hidden_size, num_heads=num_heads, max_positions=length, window=length))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept_bytes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept_bytes[storage.data_ptr()] = storage.nbytes()
        kept_tensors.append(tensor)
        return tensor

    kept_tensors: list[Tensor] = []  # storages must not be freed and reused while they are counted
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model(some_tokens(length, batch_size=2))
    assert hidden.requires_grad
    vectors = sum(kept_bytes.values()) / (4 * 2 * length * hidden_size)
    # Besides the layers: the last norm's input, the token numbers, norm statistics and the attention's log-sums.
    assert vectors < 16 * num_layers + 3
    assert not any(tensor.shape[-2:] == (length, length) for tensor in kept_tensors)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = GPT(tiny("gpt2", dropout=0.3))
    tokens = some_tokens(12)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    plain = GPT(tiny("gpt2"))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(tokens), model(tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 100},
            "hidden_size 100 is not a multiple of num_heads 3: choose hidden_size 102 or num_heads 2",
        ),
        ({"num_layers": 0}, "num_layers is 0: choose at least 1"),
        ({"window": 0}, "window is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"attention": "linear"}, 'attention "linear" is unknown'),
    ],
)
def test_impossible_sizes_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(**{"attention": "gpt2", **changes})


def test_too_many_positions_and_a_foreign_cache_are_refused() -> None:
    model = GPT(tiny("gpt2")).eval()
    with pytest.raises(UserError, match="41 positions do not fit a model with max_positions 40"):
        model(some_tokens(41))
    with torch.no_grad():
        cache = model.new_cache(3)
        model(some_tokens(39), cache)
        model(some_tokens(1), cache)
        with pytest.raises(UserError, match="41 positions do not fit"):
            model(some_tokens(1), cache)
        with pytest.raises(UserError, match="a batch of 2 does not continue a cache of 3"):
            model(some_tokens(1, batch_size=2), model.new_cache(3))
