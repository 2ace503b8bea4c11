"""Models of transformers with a folded head: the loss by hand, Trainer, generate, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from test_hugging_face_models import REFUSED, SMALL, awake
from vocabfold.errors import UserError
from vocabfold.heads import equal_partition
from vocabfold.hugging_face import custom_generate, fold, generate, unfold

VOCABULARY = 101
NO_ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def small_llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return awake(LlamaForCausalLM(LlamaConfig(**(SMALL | {"vocab_size": VOCABULARY}), **NO_ENDS, **options)))


def small_qwen(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=1, tie_word_embeddings=True, **sizes, **NO_ENDS)
    return awake(Qwen2ForCausalLM(config))


def small_gpt2() -> Any:
    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return awake(GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, **NO_ENDS)))


MODELS = {
    "llama": small_llama,
    "tied llama": lambda: small_llama(tie_word_embeddings=True),
    "qwen, tied": small_qwen,
    "gpt2, tied": small_gpt2,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "uneven": {"group_size": 7, "order": "ids"},
    "shortlist": {"tokens": np.arange(400) % 37, "shortlist": 11, "order": "frequency"},
    "conditioned, counts": {"tokens": np.arange(999) % 50, "condition_width": 5, "start_from_counts": True},
    "finished": {"width": 6, "visited": 2, "fitted_on": torch.arange(90) % 60, "steps": 40},
}


def texts(seed: int = 1, shape: tuple[int, int] = (3, 7)) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def stirred(model: Any) -> Any:
    """With every parameter of the head moved, as training does."""
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loss_by_hand(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """The mean over labels of -log P, from the log-probabilities of every token."""
    log_prob = model.head.log_prob(model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1))
    targets = labels[:, 1:].flatten()
    counted = targets != -100
    return -log_prob[counted].gather(-1, targets[counted].unsqueeze(-1)).mean()


@pytest.mark.parametrize("name", MODELS)
def test_groups_of_one_token_are_the_model_itself(name: str) -> None:
    model = MODELS[name]().double()
    ids = texts()
    expected = model(input_ids=ids).logits.log_softmax(dim=-1)
    folded = fold(model, group_size=1)
    torch.testing.assert_close(folded(input_ids=ids).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["llama", "tied llama"])
def test_loss_logits_and_gradients_are_those_by_hand(name: str, options: dict[str, Any]) -> None:
    model = stirred(fold(MODELS[name]().double(), **options))
    ids = texts()
    labels = ids.clone()
    labels[0, :4] = -100
    labels[2] = -100
    output = model(input_ids=ids, labels=labels)
    expected = loss_by_hand(model, ids, labels)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=1e-9)
    parameters = list(model.parameters())
    for ours, by_hand in zip(
        torch.autograd.grad(output.loss, parameters, allow_unused=True),
        torch.autograd.grad(expected, parameters, allow_unused=True),
        strict=True,
    ):
        ours = torch.zeros(1).double() if ours is None else ours
        torch.testing.assert_close(ours, torch.zeros_like(ours) if by_hand is None else by_hand, rtol=1e-7, atol=1e-9)
    counted = int((labels[:, 1:] != -100).sum())
    for items in (7, torch.tensor(7)):
        scaled = model(input_ids=ids, labels=labels, num_items_in_batch=items).loss
        torch.testing.assert_close(scaled, expected * counted / 7, rtol=1e-9, atol=1e-9)
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    torch.testing.assert_close(model(input_ids=ids, shift_labels=shifted).loss, expected, rtol=1e-9, atol=1e-9)
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(3, 7).double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=2).logits, logits[:, -2:])
    kept = model(input_ids=ids, labels=labels, logits_to_keep=torch.tensor([1, 4]))
    torch.testing.assert_close(kept.logits, logits[:, [1, 4]])
    assert len(model(input_ids=ids, return_dict=False)) == 2


def test_no_label_costs_nothing() -> None:
    model = fold(small_llama())
    loss = model(input_ids=texts(), labels=torch.full((3, 7), -100)).loss
    loss.backward()
    assert loss == 0
    assert all(bool((each.grad == 0).all()) for each in model.parameters() if each.grad is not None)
    assert model(input_ids=texts(shape=(2, 1)), labels=texts(shape=(2, 1))).loss == 0


def test_no_logits_of_all_tokens_are_made_in_training() -> None:
    model = fold(small_llama().train())
    calls: list[Any] = []
    model.head.log_prob = lambda *arguments: calls.append(arguments)  # type: ignore[assignment]
    model(input_ids=texts(), labels=texts()).loss.backward()
    assert calls == []


@pytest.mark.parametrize("name", ["llama", "gpt2, tied", "qwen, tied"])
def test_trainer_takes_the_steps_that_a_loop_takes(name: str, tmp_path: Path) -> None:
    batches = [texts(seed, (4, 6)) for seed in range(20)]
    models = [fold(MODELS[name](), group_size=9) for _ in range(2)]
    by_hand = []
    optimizer = torch.optim.AdamW(models[0].parameters(), lr=1e-2, weight_decay=0.0)
    models[0].train()
    for ids in batches:
        loss = loss_by_hand(models[0], ids, ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models[0].parameters(), 1.0)
        optimizer.step()
        by_hand.append(float(loss.detach()))
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=20,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    rows = [{"input_ids": row, "labels": row} for ids in batches for row in ids]
    trainer = Trainer(models[1], arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(logged, by_hand, rtol=2e-3)
    assert by_hand[-1] < by_hand[0]
    expected = float(loss_by_hand(models[1].eval(), torch.stack([row["input_ids"] for row in rows[:4]]), batches[0]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_texts_of_generate_and_of_our_loop_are_the_same(options: dict[str, Any]) -> None:
    model = stirred(fold(small_llama(), **options))
    ids, mask = texts(), torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = 0
    asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=mask, **asked)
    assert torch.equal(generate(model, model.head, ids, 6, attention_mask=mask), expected)
    fast = model.generate(input_ids=ids, attention_mask=mask, custom_generate=custom_generate(model.head), **asked)
    assert torch.equal(fast, expected)
    no_cache = ids[1:2]
    for _ in range(6):
        no_cache = torch.cat([no_cache, model(input_ids=no_cache).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(no_cache, expected[1:2])


def test_beams_are_those_of_the_model_where_the_distribution_is() -> None:
    model = small_llama()
    asked: dict[str, Any] = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    expected = model.generate(input_ids=texts(), **asked)
    assert torch.equal(fold(model, group_size=1).generate(input_ids=texts(), **asked), expected)


def test_what_would_train_a_wrong_loss_is_refused_in_one_line() -> None:
    model = fold(small_llama(tie_word_embeddings=True), group_size=10)
    ids = texts()

    def set_loss() -> None:
        model.loss_function = nn.CrossEntropyLoss()

    for use, message in (
        (lambda: model.get_output_embeddings().weight, "no output layer with a row for each token"),
        (lambda: model.get_output_embeddings().bias, "no output layer"),
        (lambda: model.lm_head.weight, "no output layer"),
        (lambda: model.lm_head(torch.ones(1, 32)), "no output layer"),
        (lambda: model.set_output_embeddings(nn.Linear(32, VOCABULARY)), "no output layer"),
        (lambda: model.set_input_embeddings(nn.Embedding(VOCABULARY, 32)), "shares the embedding's rows"),
        (lambda: model.resize_token_embeddings(200), "unfold it, resize"),
        (lambda: model.loss_function, "computes its own loss"),
        (set_loss, "computes its own loss"),
        (lambda: model(input_ids=ids, labels=ids, ignore_index=0), "in place of ignore_index"),
        (lambda: fold(model), "folded already"),
    ):
        with pytest.raises(UserError, match=message) as error:
            use()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", [case for case in REFUSED if case not in ("half", "bias")])
def test_a_model_that_cannot_be_folded_is_one_line(case: str) -> None:
    with pytest.raises(UserError) as error:
        fold(REFUSED[case][0]())
    assert "\n" not in str(error.value) and "screen" not in str(error.value)


def test_a_bias_is_kept() -> None:
    model = awake(REFUSED["bias"][0]())
    ids = texts() % 50
    expected = model(input_ids=ids).logits
    for group_size, visited in ((1, 0), (7, 8)):  # 8 groups of 6 or 7
        folded = fold(model, group_size=group_size, visited=visited)
        torch.testing.assert_close(folded(input_ids=ids).logits, expected.log_softmax(-1), rtol=1e-4, atol=1e-4)
    assert torch.equal(unfold(folded)(input_ids=ids).logits, expected)


def test_options_that_contradict_are_one_line() -> None:
    model = small_llama()
    for options, message in (
        ({"shortlist": 3}, "give the tokens of a text"),
        ({"order": "frequency"}, "give the tokens of a text"),
        ({"order": "bpe"}, "choose one of neighbours"),
        ({"start_from_counts": True}, "needs the tokens"),
        ({"partition": equal_partition(50)}, "has 50 tokens, the model 101"),
        ({"visited": 60}, "choose from 0 to"),
        ({"width": -1}, "choose 0"),
        ({"condition_width": 4, "visited": 2}, "leave condition_width out"),
        ({"fitted_on": torch.empty(0, dtype=torch.long)}, "holds no tokens"),
        ({"group_size": 500}, "group_size is 500"),
    ):
        with pytest.raises(UserError, match=message) as error:
            fold(model, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not a folded model"):
        unfold(model)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    ids, gradients = texts(), []
    for checkpointed in (False, True):
        model = fold(small_llama().double(), group_size=10).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([each.grad for each in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


class Adapter(nn.Module):
    """What a library of adapters puts in a linear layer's place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.change = nn.Linear(layer.in_features, layer.out_features, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + self.change(inputs)


def test_adapters_on_the_backbone_learn_and_unfolding_keeps_them() -> None:
    model = fold(small_llama(), group_size=10).requires_grad_(False)
    names = [name for name, module in model.named_modules() if name.endswith("q_proj")]
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    for name in names:
        model.set_submodule(name, Adapter(model.get_submodule(name)))
    ids = texts()
    assert set(model.prepare_inputs_for_generation(ids)) >= {"input_ids"}
    assert model.get_input_embeddings().weight.shape == (VOCABULARY, 32)
    model.enable_input_require_grads()
    model(input_ids=ids, labels=ids).loss.backward()
    learned = {name for name, each in model.named_parameters() if each.grad is not None}
    assert learned == {f"{name}.change.weight" for name in names}
    plain = unfold(model)
    assert isinstance(plain.model.layers[0].self_attn.q_proj, Adapter)
    assert plain(input_ids=ids).logits.shape == (3, 7, VOCABULARY)
