"""Losses of Liger-Kernel and TRL, where these are installed, on folded models: right, or one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from test_hugging_face_fold import VOCABULARY, small_llama, texts
from vocabfold.errors import UserError
from vocabfold.hugging_face import fold, metrics


def folded() -> Any:
    return fold(small_llama(), group_size=10)


def test_liger_is_refused_after_folding_and_does_nothing_before() -> None:
    pytest.importorskip("triton")
    liger = pytest.importorskip("liger_kernel.transformers", reason="needs liger-kernel: pip install liger-kernel")
    ids = texts()
    loss_alone: dict[str, Any] = {"rope": False, "rms_norm": False, "swiglu": False}  # the others need a card
    with pytest.raises(UserError, match="fused_linear_cross_entropy=False") as error:
        liger.apply_liger_kernel_to_llama(model=folded(), **loss_alone)
    assert "\n" not in str(error.value)
    expected = folded()(input_ids=ids, labels=ids).loss
    plain = small_llama()
    liger.apply_liger_kernel_to_llama(model=plain, **loss_alone)
    model = fold(plain, group_size=10)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)
    torch.testing.assert_close(-metrics.token_log_probs(model, ids).mean(), expected)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def words(ids: Any) -> list[str]:
    return [" ".join(f"w{max(3, token)}" for token in row) for row in ids.tolist()]


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(each)) for each in completions]


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_trl_multiplies_with_the_output_layer_and_is_told_that_there_is_none(name: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", minversion="1.16", reason="needs trl: pip install trl")
    from datasets import Dataset

    prompts, good, bad = (words(texts(seed, (4, 3))) for seed in range(3))
    columns, own = {
        "SFT": ({"text": good}, {}),
        "DPO": ({"prompt": prompts, "chosen": good, "rejected": bad}, {}),
        "GRPO": ({"prompt": prompts}, {"num_generations": 2, "max_completion_length": 3}),
    }[name]
    given: dict[str, Any] = {"SFT": {}, "DPO": {"ref_model": folded()}, "GRPO": {"reward_funcs": lengths}}[name]
    arguments = getattr(trl, f"{name}Config")(
        str(tmp_path),
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_steps=1,
        per_device_train_batch_size=2,
        save_strategy="no",
        gradient_checkpointing=False,
        **own,
    )
    dataset = Dataset.from_dict(columns)
    trainer = getattr(trl, f"{name}Trainer")(
        folded(), args=arguments, train_dataset=dataset, processing_class=tokenizer(), **given
    )
    with pytest.raises(UserError, match=r"vocabfold\.hugging_face\.metrics") as error:
        trainer.train()
    assert "\n" not in str(error.value)
