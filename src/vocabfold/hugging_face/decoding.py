"""Decoding a Hugging Face model with its own key/value cache and a screened output layer, or a folded one.

    head = screen(model)
    ids = generate(model, head, tokenizer("Once", return_tensors="pt").input_ids, max_new_tokens=100)

or, with transformers' own options, ``model.generate(**inputs, custom_generate=custom_generate(head))``. Of a folded
model ``head`` is ``model.head``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vocabfold.errors import UserError
from vocabfold.heads.base import Head
from vocabfold.hugging_face.models import backbone
from vocabfold.hugging_face.screened_head import ScreenedHead
from vocabfold.hugging_face.steps import NextStates, read_prompt


@torch.inference_mode()
def generate(
    model: Any,
    head: ScreenedHead | Head,
    input_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    with_own_steps: bool = True,
) -> Tensor:
    """``input_ids`` [B, L] -> [B, L + n] with n <= ``max_new_tokens``: each text continued up to an end token.

    ``attention_mask`` [B, L]: 0 where a text is padded, on the left. Temperature 0 is greedy: the tokens of the model's
    own ``generate``. Texts that have ended are padded (with their first end token by default). ``with_own_steps``: by
    ``steps`` where they give transformers' bits, which in bfloat16 keep a copy of the layers' weights; otherwise by
    transformers' own code. Raises UserError for texts that are empty or padded on the right.
    """
    if input_ids.dim() != 2 or 0 in input_ids.shape or max_new_tokens < 1:
        raise UserError(f"{tuple(input_ids.shape)} tokens and {max_new_tokens} new ones: give at least one of each")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape or not bool(attention_mask[:, -1].all()):
            raise UserError("the attention mask must have the tokens' shape and end in ones: pad on the left")
        if bool(attention_mask.all()):
            attention_mask = None
    ends = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ()), dtype=torch.long)
    padding = pad_token_id if pad_token_id is not None else int(ends[0]) if len(ends) else 0

    def next_tokens(hidden: Tensor) -> Tensor:
        return head.sample(hidden, temperature, top_k, top_p, generator)

    return _decode(
        backbone(model, with_adapters=True),
        next_tokens,
        input_ids,
        attention_mask,
        max_new_tokens,
        ends,
        padding,
        None,
        with_own_steps,
    )


def _decode(
    base: Any,
    next_tokens: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    ends: Tensor,
    padding: int,
    streamer: Any,
    with_own_steps: bool,
) -> Tensor:
    """The loop. ``next_tokens``: hidden states [B, D] -> [B]."""
    batch, length = input_ids.shape
    texts = [input_ids]
    is_running = torch.ones(batch, dtype=torch.bool)
    hidden, cache = read_prompt(base, input_ids, attention_mask)
    next_states: NextStates | None = None
    for index in range(max_new_tokens):
        tokens = next_tokens(hidden).masked_fill_(~is_running, padding)
        texts.append(tokens.unsqueeze(-1))
        if streamer is not None:
            streamer.put(tokens)
        is_running &= ~torch.isin(tokens, ends)
        if not bool(is_running.any()) or index + 1 == max_new_tokens:
            break
        if next_states is None:
            next_states = NextStates(base, cache, attention_mask, length, max_new_tokens - 1, with_own_steps)
        hidden = next_states(texts[-1])
    if streamer is not None:
        streamer.end()
    return torch.cat(texts, dim=-1)


def custom_generate(
    head: ScreenedHead | Head, generator: torch.Generator | None = None, with_own_steps: bool = True
) -> Callable[..., Tensor]:
    """What ``model.generate(custom_generate=...)`` takes: greedy decoding, temperature, top_k and top_p.

    ``with_own_steps`` as in ``generate``. What it returns raises UserError for any other option that changes the tokens
    (beams, penalties, stop strings ...).
    """

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        generation_config: Any = None,
        streamer: Any = None,
        **model_options: Any,
    ) -> Tensor:
        sampling = _sampling_options(logits_processor, generation_config)
        unknown = {type(each).__name__ for each in stopping_criteria} - {"MaxLengthCriteria", "EosTokenCriteria"}
        if unknown or generation_config.num_beams > 1 or generation_config.return_dict_in_generate:
            what = ", ".join(sorted(unknown)) or "beams or return_dict_in_generate"
            raise UserError(f"the screened loop does not know {what}: leave it out, or use the model's own generate")
        ends = generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        mask = model_options.get("attention_mask")
        mask = None if mask is None or bool(mask.all()) else mask

        def next_tokens(hidden: Tensor) -> Tensor:
            return head.sample(hidden, generator=generator, **sampling)

        padding = generation_config.pad_token_id
        padding = padding if padding is not None else ends[0] if ends else 0
        length = generation_config.max_length - input_ids.shape[1]
        base = backbone(model, with_adapters=True)
        return _decode(
            base, next_tokens, input_ids, mask, length, torch.tensor(ends), padding, streamer, with_own_steps
        )

    return decode


def _sampling_options(processors: Any, generation_config: Any) -> dict[str, Any]:
    known = {"TemperatureLogitsWarper": "temperature", "TopKLogitsWarper": "top_k", "TopPLogitsWarper": "top_p"}
    options: dict[str, Any] = {"temperature": 1.0 if generation_config.do_sample else 0.0}
    for processor in processors:
        name = type(processor).__name__
        if name not in known:
            raise UserError(f"the screened loop does not know {name}: leave it out, or use the model's own generate")
        options[known[name]] = getattr(processor, known[name])
    return options
