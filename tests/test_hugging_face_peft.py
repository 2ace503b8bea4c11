"""PEFT's adapters on models with a folded head, and on finished ones that are screened or measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from test_hugging_face_fold import VOCABULARY, loss_by_hand, small_gpt2, small_llama, small_qwen, texts
from vocabfold.errors import UserError
from vocabfold.hugging_face import (
    compress_embedding,
    custom_generate,
    fold,
    generate,
    metrics,
    pretrained,
    screen,
    unfold,
)

peft = pytest.importorskip("peft", reason="needs peft: pip install peft")


def adapted(model: Any, **options: Any) -> Any:
    asked = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8} | options
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**asked))


def stirred(model: Any) -> Any:
    """With everything that learns moved: an adapter begins as none."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def trained(model: Any, folder: Path, **options: Any) -> list[float]:
    """The losses of three of Trainer's steps."""
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    rows = [{"input_ids": row, "labels": row} for row in texts(5, (6, 6))]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def loss_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        loss: torch.Tensor = model(input_ids=texts(), labels=texts()).loss
    return loss


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (small_llama, {}),
    "tied llama": (lambda: small_llama(tie_word_embeddings=True), {}),
    "qwen, tied, all layers": (small_qwen, {"target_modules": "all-linear"}),
    "gpt2, tied": (small_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "the head too": (small_llama, {"modules_to_save": ["head"]}),
    "tied, the head too": (lambda: small_llama(tie_word_embeddings=True), {"modules_to_save": ["head"]}),
    "the embedding": (small_llama, {"target_modules": ["embed_tokens"]}),
    "some tokens": (small_llama, {"trainable_token_indices": [1, 2]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_adapters_are_trained_saved_loaded_and_merged(name: str, tmp_path: Path) -> None:
    build, options = MODELS[name]
    model = adapted(fold(build(), group_size=10), **options)
    expected = loss_of(fold(build(), group_size=10))
    torch.testing.assert_close(loss_of(model), expected)
    trained(model, tmp_path)
    assert not torch.allclose(loss_of(model), expected)
    torch.testing.assert_close(loss_by_hand(model.get_base_model(), texts(), texts()), loss_of(model))
    with model.disable_adapter():
        torch.testing.assert_close(loss_of(model), expected)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(fold(build(), group_size=10), tmp_path / "adapter").eval()
    torch.testing.assert_close(loss_of(loaded), loss_of(model))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(loss_of(merged), loss_of(model))
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loss_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), loss_of(model))
    if "head" not in name:
        assert type(unfold(merged)) is type(build())
        return
    rows = merged.head.linear_scorer[0].weight  # in token order where they are tied
    plain = unfold(merged, drop_trained=True)
    plain.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.config.tie_word_embeddings is False and merged.config.tie_word_embeddings == ("tied" in name)
    assert torch.equal(plain.get_input_embeddings().weight, merged.get_input_embeddings().weight)
    if "tied" in name:
        assert torch.equal(plain.get_output_embeddings().weight, rows)
    assert not torch.equal(plain.get_output_embeddings().weight, build().get_output_embeddings().weight)


def test_an_adapters_folder_names_the_folded_models(tmp_path: Path) -> None:
    fold(small_llama(), group_size=10).save_pretrained(tmp_path / "folded")
    model = stirred(adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "folded")))
    model.save_pretrained(tmp_path / "adapter")
    for kind in (peft.AutoPeftModelForCausalLM, AutoModelForCausalLM):
        torch.testing.assert_close(loss_of(kind.from_pretrained(tmp_path / "adapter")), loss_of(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_takes_the_same_steps(reentrant: bool, tmp_path: Path) -> None:
    losses = [
        trained(adapted(fold(small_llama(), group_size=10)), tmp_path, **options)
        for options in (
            {},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_preparing_for_quantised_training_changes_no_loss(tmp_path: Path) -> None:
    model = peft.prepare_model_for_kbit_training(fold(small_llama(), group_size=10))
    assert trained(adapted(model), tmp_path) == trained(adapted(fold(small_llama(), group_size=10)), tmp_path)


@pytest.mark.parametrize("is_folded", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["embed_tokens", "down_proj"]}, {"modules_to_save": ["norm"]}],
    ids=["attention", "embedding", "norm"],
)
def test_texts_and_metrics_are_those_of_the_adapted_model(is_folded: bool, options: dict[str, Any]) -> None:
    model = stirred(adapted(fold(small_llama(), group_size=10) if is_folded else small_llama(), **options))
    head = model.head if is_folded else screen(model)
    ids = texts()
    asked: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**asked)
    assert torch.equal(generate(model, head, ids, 5), expected)
    assert torch.equal(model.generate(**asked, custom_generate=custom_generate(head)), expected)
    for context in (torch.no_grad, model.disable_adapter):
        with context():
            every = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
            chosen = every.gather(-1, ids[:, 1:, None]).squeeze(-1)
            torch.testing.assert_close(metrics.token_log_probs(model, ids), chosen, rtol=1e-4, atol=1e-4)
            spread = -(every.exp() * every).sum(-1)
            torch.testing.assert_close(metrics.entropy(model, ids), spread, rtol=1e-4, atol=1e-4)
            hits = (every.argmax(-1) == ids[:, 1:]).float().mean()
            torch.testing.assert_close(metrics.accuracy(model, ids), hits)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["head"]}], ids=["backbone", "head"])
def test_gradients_of_log_probs_are_those_of_the_loss(options: dict[str, Any]) -> None:
    model = stirred(adapted(fold(small_llama(), group_size=10).double(), **options))
    parameters = [each for each in model.parameters() if each.requires_grad]
    expected = torch.autograd.grad(model(input_ids=texts(), labels=texts()).loss, parameters)
    found = torch.autograd.grad(-metrics.token_log_probs(model, texts()).mean(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_what_would_be_lost_or_shared_is_one_line() -> None:
    def folded(**options: Any) -> Any:
        return fold(small_llama(**options), group_size=10)

    def used(**options: Any) -> Any:
        return loss_of(adapted(folded(tie_word_embeddings=True), **options))

    virtual = peft.get_peft_model(folded(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert loss_of(virtual).isfinite()
    for use, message in (
        (lambda: adapted(folded(), target_modules=["q_proj", "lm_head"]), "no lm_head for PEFT"),
        (lambda: adapted(folded(), modules_to_save=["lm_head"]), "no lm_head for PEFT"),
        (lambda: used(target_modules=["embed_tokens"]), "shares the embedding's rows"),
        (lambda: used(modules_to_save=["embed_tokens"]), "shares the embedding's rows"),
        (lambda: used(trainable_token_indices=[1]), "shares the embedding's rows"),
        (lambda: adapted(folded()).resize_token_embeddings(200), "unfold it, resize"),
        (lambda: unfold(adapted(folded())), "merge_and_unload"),
        (lambda: unfold(adapted(folded()).get_base_model()), "merge_and_unload"),
        (lambda: fold(adapted(small_llama())), "fold before adapting"),
        (lambda: pretrained(adapted(small_llama())), "merge_and_unload"),
        (lambda: compress_embedding(adapted(small_llama())), "merge_and_unload"),
        (lambda: screen(adapted(small_llama(), target_modules=["lm_head"])), "an adapter on its output layer"),
        (lambda: metrics.entropy(adapted(small_llama(), modules_to_save=["lm_head"]), texts()), "on its output layer"),
        (lambda: metrics.entropy(virtual, texts()), "PROMPT_TUNING"),
        (lambda: metrics.entropy(adapted(small_llama(), alora_invocation_tokens=[1]), texts()), "own forward alone"),
    ):
        with pytest.raises(UserError, match=message) as error:
            use()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="lm_head"):
        adapted(folded(), target_modules=["lm_head"])


def test_preferences_are_learned_against_the_model_without_its_adapter() -> None:
    model = adapted(fold(small_llama(), group_size=10)).train()
    good, bad = texts(5, (2, 6)), texts(6, (2, 6))

    def margin() -> torch.Tensor:
        sums = [metrics.token_log_probs(model, ids).sum(-1) for ids in (good, bad)]
        return sums[0] - sums[1]

    with torch.no_grad(), model.disable_adapter():
        before = margin()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):
        loss = -torch.nn.functional.logsigmoid(0.1 * (margin() - before)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.69
    assert model(input_ids=good).logits.shape == (2, 6, VOCABULARY)
