"""Log-probabilities, entropy and accuracy of models of transformers: by hand in float64, and never as [N, V]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM

from test_hugging_face_fold import VOCABULARY, small_llama, small_qwen, stirred, texts
from test_hugging_face_models import NO_ENDS, SMALL, awake
from vocabfold.errors import UserError
from vocabfold.hugging_face import fold, metrics, screen


def capped() -> Any:
    torch.manual_seed(0)
    sizes = SMALL | {"vocab_size": VOCABULARY}
    config = Gemma2Config(**sizes, **NO_ENDS, num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0)
    return awake(Gemma2ForCausalLM(config))


MODELS = {
    "full": small_llama,
    "full, tied": small_qwen,
    "full, capped": capped,
    "folded": lambda: stirred(fold(small_llama())),
    "folded, visited": lambda: stirred(fold(small_llama(tie_word_embeddings=True), width=4, visited=2)),
}


def case() -> dict[str, Tensor]:
    ids, mask = texts(), torch.ones(3, 7, dtype=torch.long)
    mask[0, :2] = 0
    labels = ids.clone()
    labels[1, 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", MODELS)
def test_metrics_and_their_gradients_are_those_by_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("hugging_face.metrics", "heads.loss_options"):  # so that more than one chunk is needed
        monkeypatch.setattr(f"vocabfold.{module}.ROW_CHUNK_ELEMENTS", 5 * VOCABULARY)
    model, inputs = MODELS[name]().double(), case()
    if name == "full, capped":  # whose own attention makes NaN of padding in float64
        inputs["attention_mask"][:] = 1
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    every = logits.log_softmax(-1)
    targets = inputs["labels"][:, 1:]
    counted = targets != -100
    counted[0, :2] = name == "full, capped"  # padding, and the first token after it
    chosen = every.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).where(counted, 0.0)
    spread = -(every.exp() * every).sum(-1).where(counted, 0.0)
    hits = ((every.argmax(-1) == targets) & counted).sum() / counted.sum()
    log_probs, entropies = metrics.token_log_probs(model, **inputs), metrics.entropy(model, **inputs)
    torch.testing.assert_close(log_probs, chosen, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(entropies, spread, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(metrics.accuracy(model, **inputs), hits)
    weights = torch.randn(chosen.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    for ours, by_hand in ((log_probs, chosen), (entropies, spread)):
        expected = torch.autograd.grad((by_hand * weights).sum(), parameters, retain_graph=True, allow_unused=True)
        found = torch.autograd.grad((ours * weights).sum(), parameters, allow_unused=True)
        for one, other in zip(found, expected, strict=True):
            if one is None or other is None:
                assert all(each is None or not each.any() for each in (one, other))
            else:
                torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_preferences_are_learned_from_log_probs() -> None:
    """DPO's loss on two texts: the preferred one gains on the other, with a folded head as with a full one."""
    for build in (small_llama, lambda: fold(small_llama(), group_size=9)):
        model = build().train()
        good, bad = texts(5, (2, 6)), texts(6, (2, 6))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def margin(model: Any = model, good: Tensor = good, bad: Tensor = bad) -> Tensor:
            sums = [metrics.token_log_probs(model, ids).sum(-1) for ids in (good, bad)]
            return sums[0] - sums[1]

        before = margin().detach()
        (-torch.nn.functional.logsigmoid(0.1 * (margin() - before)).mean()).backward()
        optimizer.step()
        assert bool((margin() > before).all())


def test_a_screen_finds_the_same_likeliest_tokens() -> None:
    model, inputs = small_llama(), case()
    head = screen(model)
    assert metrics.accuracy(model, **inputs, screened=head) == metrics.accuracy(model, **inputs)
    assert head.counts.states == 15


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("name", ["full", "folded"])
@pytest.mark.parametrize("metric", ["token_log_probs", "entropy", "accuracy"])
def test_logits_of_all_rows_are_never_held(name: str, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("hugging_face.metrics", "heads.loss_options"):
        monkeypatch.setattr(f"vocabfold.{module}.ROW_CHUNK_ELEMENTS", 40 * VOCABULARY)
    model, ids = MODELS[name](), texts(shape=(5, 40))
    with Largest() as largest:
        result = getattr(metrics, metric)(model, ids)
        if metric != "accuracy":
            result.sum().backward()
    assert largest.elements < 195 * VOCABULARY


def test_bfloat16_models_give_float32_numbers() -> None:
    model = small_llama().bfloat16()
    exact = metrics.token_log_probs(small_llama(), texts())
    rounded = metrics.token_log_probs(model, texts())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.3)


def test_no_targets_and_other_shapes() -> None:
    model = small_llama()
    nothing = torch.full((3, 7), -100)
    assert metrics.accuracy(model, texts(), labels=nothing) == 0
    for metric in (metrics.token_log_probs, metrics.entropy):
        assert torch.equal(metric(model, texts(), labels=nothing).detach(), torch.zeros(3, 6))
        assert metric(model, texts(shape=(2, 1))).shape == (2, 0)
        with pytest.raises(UserError, match=r"give \[B, T\]"):
            metric(model, texts()[0])
    with pytest.raises(UserError, match="is not a model of transformers"):
        metrics.entropy(torch.nn.Linear(2, 2), texts())
