"""transformers' own caches behind our interface: the exact ones change nothing, the rounded ones little."""

from __future__ import annotations

import pytest
import torch
from experiments.tokens import hugging_face
from experiments.tokens.hugging_face import HuggingFaceReader, available_caches, new_cache, random_gpt2

from vocabfold.errors import UserError
from vocabfold.models.gpt import GPTConfig

TEXT = [(7 * index + index * index) % 61 for index in range(40)]
TOLERANCE = {"none": 1e-5, "dynamic": 1e-5, "static": 1e-5, "fp8": 0.1, "int4": 0.3}  # of the logits' spread


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = random_gpt2(GPTConfig(61, hidden_size=64, num_layers=2, num_heads=2, max_positions=48))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", available_caches())
def test_a_growing_text_has_the_logits_of_the_whole(model: torch.nn.Module, kind: str) -> None:
    reader = HuggingFaceReader(model, kind)
    for length in (30, 31, 32, 36, 40):
        logits = reader.read(TEXT[:length])
        with torch.inference_mode():
            expected = model(torch.tensor([TEXT[:length]]), use_cache=False).logits[:, -1]
        assert logits.shape == (1, 61)
        assert (logits - expected).abs().max() <= TOLERANCE[kind] * expected.std()


def test_a_beginning_is_reused_by_every_text_that_has_it_and_by_no_other(model: torch.nn.Module) -> None:
    first = HuggingFaceReader(model)
    first.read(TEXT[:20])
    assert first.cache is not None
    lengths = []
    handle = model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    for text in (TEXT, [*TEXT[:20], 5, 6], TEXT[1:], TEXT[:20], TEXT):
        reader = HuggingFaceReader(model, beginning=(TEXT[:20], first.cache))
        torch.testing.assert_close(reader.read(text), HuggingFaceReader(model, "none").read(text), rtol=1e-4, atol=1e-4)
    handle.remove()
    assert lengths[0::2] == [20, 2, 39, 20, 20]
    assert first.cache.get_seq_length() == 20


def test_unknown_and_missing_caches_are_one_clear_line(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="choose one of none, dynamic, static, fp8, int4"):
        new_cache(model, "int2")
    monkeypatch.setattr(hugging_face, "is_optimum_quanto_available", lambda: False)
    assert "int4" not in available_caches()
    with pytest.raises(UserError, match="pip install 'vocabfold\\[quanto\\]'"):
        new_cache(model, "int4")
