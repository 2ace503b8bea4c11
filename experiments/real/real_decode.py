"""Decoding of finished models with the screened output layer, against dense ones and transformers' generate.

    python -m experiments real_decode measure --smollm2 FILE.gguf --valid TEXT [--rounds 3] [--tokens 12] [--threads 2]
    python -m experiments real_decode measure
    python -m experiments real_decode draw

SmolLM2-135M-Instruct (``python -m vocabfold.hugging_face.fetch`` prints its path) continues the beginnings of the
stories of TEXT. Without it: the shape of Gemma 3 270M (V = 262,144, D = 640) with random weights, for speed only; the
rows of the other model stay in the table. Methods take turns, so ratios hold on a machine that is not idle.

``measure`` writes results/real/real_decode.csv, one row a model, part, method, batch, sampling and round. Parts:
``decode``, the whole of decoding (seconds a step), ``head``, the output layer alone on the states of those texts
(seconds a call), ``step``, a step of the decoder below it, ``quality``, how far the int8 rows without their bounds are
from the model on TEXT, and ``bound``, which share of the rows other bounds would leave.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.real.decode_tables import draw_bars, in_words
from experiments.real.other_bounds import shares_left
from experiments.real.output_layers import OutputLayer, WholeLayer, distance, rounded_logits, stories_of
from experiments.study.figures import report
from experiments.study.measuring import add_rounds, at_least_one, identity, write_measured
from vocabfold.errors import UserError
from vocabfold.hugging_face import ScreenedHead, generate, load, screen
from vocabfold.hugging_face.products import same_product
from vocabfold.hugging_face.screened_state import Counts
from vocabfold.hugging_face.steps import NextStates, read_prompt
from vocabfold.machine import origin
from vocabfold.measure.speed import interleaved_seconds
from vocabfold.runs.tables import RESULTS

NAME = "real_decode"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES = (1, 16)
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
}
PROMPT_LENGTH = 20
NUM_READ = 4  # tokens before the states that other bounds are tried on
CONTEXT = 1024
STEPS_TIMED = 8
WITH_OUR_STEPS, WITH_THEIR_STEPS = "screened", "screened, transformers' steps"


def gemma_shape() -> Any:
    """A model of Gemma 3 270M's shape with random weights."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


def of_type(model: Any, dtype: torch.dtype) -> Any:
    """A copy of the model in another type."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype).eval()


def by_transformers(model: Any, ids: Tensor, num_tokens: int, sampling: str) -> Tensor:
    """transformers' own decoding of exactly ``num_tokens`` tokens, with its own output layer."""
    greedy = sampling == "greedy"
    options = {} if greedy else {"top_p": SAMPLINGS[sampling]["top_p"], "top_k": 0, "temperature": 1.0}
    text: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=not greedy,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
        **options,
    )
    return text


class Methods:
    """What is compared on one model in one type. ``prompts`` [16, PROMPT_LENGTH]."""

    def __init__(self, model: Any, prompts: Tensor, num_tokens: int) -> None:
        self.model, self.prompts, self.num_tokens = model, prompts, num_tokens
        self.rows = model.get_output_embeddings().weight.detach()
        self.screened: ScreenedHead = screen(model)
        self.layers: dict[str, Any] = {  # each an OutputLayer
            WITH_OUR_STEPS: self.screened,
            "dense": WholeLayer(partial(F.linear, weight=self.rows)),
            "dense, faster product": WholeLayer(same_product(self.rows)),
            "int8, not exact": WholeLayer(rounded_logits(self.screened)),
        }

    def decoding(self, batch: int, sampling: str) -> dict[str, Callable[[], Tensor]]:
        """Whole texts by each method."""
        ids, options = self.prompts[:batch], SAMPLINGS[sampling]
        calls: dict[str, Callable[[], Tensor]] = {
            name: partial(generate, self.model, layer, ids, self.num_tokens, **options)
            for name, layer in self.layers.items()
        }
        calls[WITH_THEIR_STEPS] = partial(
            generate, self.model, self.screened, ids, self.num_tokens, with_own_steps=False, **options
        )
        calls["transformers"] = partial(by_transformers, self.model, ids, self.num_tokens, sampling)
        return calls

    @torch.inference_mode()
    def states(self, texts: Tensor) -> Tensor:
        """The states [num_tokens, B, D] from which the last tokens of ``texts`` [B, L] were drawn."""
        hidden: Tensor = self.model.base_model(input_ids=texts).last_hidden_state
        return hidden[:, -self.num_tokens - 1 : -1].transpose(0, 1).contiguous()

    def steps(self, batch: int) -> dict[str, Callable[[], object]]:
        """One step of the decoder, by ours and by transformers' code; each call is one token further."""
        ids = self.prompts[:batch]
        calls: dict[str, Callable[[], object]] = {}
        for name, with_own_steps in (("ours", True), ("transformers", False)):
            with torch.inference_mode():
                _, cache = read_prompt(self.model.base_model, ids, None)
            room = 4 * self.num_tokens * STEPS_TIMED + 64
            following = NextStates(self.model.base_model, cache, None, ids.shape[1], room, with_own_steps)
            calls[name] = partial(_some_steps, following, ids[:, :1])
        return calls


@torch.inference_mode()
def _some_steps(following: NextStates, tokens: Tensor) -> None:
    for _ in range(STEPS_TIMED):
        following(tokens)


def measure_type(methods: Methods, type_name: str, rounds: int) -> list[dict[str, object]]:
    """Rows of one model in one type."""
    table: list[dict[str, object]] = []
    element = methods.rows.element_size()
    quantised = methods.screened.quantised

    def timed(
        calls: Mapping[str, Callable[[], object]],
        columns: Mapping[str, dict[str, object]],
        unit: int,
        warmup: int,
        **more: object,
    ) -> None:
        seconds = interleaved_seconds(calls, rounds, warmup, torch.device("cpu"), progress=False)
        medians = ", ".join(f"{name} {1e3 * np.median(values) / unit:.2f}" for name, values in seconds.items())
        print(f"{type_name} {' '.join(map(str, more.values()))}, ms: {medians}", flush=True)
        for name, values in seconds.items():
            row = {**more, "method": name, "type": type_name, **columns.get(name, {})}
            table.extend(row | {"round": index, "seconds": value / unit} for index, value in enumerate(values))

    for batch in BATCHES:
        timed(methods.steps(batch), {}, STEPS_TIMED, 1, part="step", batch=batch)
        for sampling, options in SAMPLINGS.items():
            calls = methods.decoding(batch, sampling)
            texts = {name: call() for name, call in calls.items()}  # which warms them up too
            columns: dict[str, dict[str, object]] = {name: {} for name in calls}
            if sampling == "greedy":
                for name, text in texts.items():
                    same = (text == texts["transformers"])[:, PROMPT_LENGTH:].float().mean()
                    columns[name]["same_tokens"] = float(same)
            timed(calls, columns, methods.num_tokens, 0, part="decode", batch=batch, sampling=sampling)
            states = methods.states(texts["dense"])
            methods.screened.counts = Counts()
            for some in states:
                methods.screened.sample(some, **options)
            counts, num_calls = methods.screened.counts, len(states)
            reading: dict[str, dict[str, object]] = {
                WITH_OUR_STEPS: {
                    "mib_a_call": methods.screened.bytes_read / num_calls / 2**20,
                    "rows_scored_a_token": counts.scored / num_calls / batch,
                    "dense_products_a_call": counts.dense / num_calls,
                },
                "int8, not exact": {"mib_a_call": quantised.num_bytes / 2**20},
            }
            for name in ("dense", "dense, faster product"):
                reading[name] = {"mib_a_call": methods.rows.numel() * element / 2**20}
            layers = {
                name: partial(_next_state, layer, states, options, count()) for name, layer in methods.layers.items()
            }
            timed(layers, reading, 1, 1, part="head", batch=batch, sampling=sampling)
    return table


def _next_state(layer: OutputLayer, states: Tensor, options: dict[str, Any], turn: count[int]) -> Tensor:
    return layer.sample(states[next(turn) % len(states)], **options)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``measure``."""
    parser.add_argument(
        "--smollm2", type=Path, help="GGUF file of SmolLM2-135M-Instruct; without it Gemma's shape is measured"
    )
    parser.add_argument("--valid", type=Path, help="validation text of TinyStories: what SmolLM2 continues and is read")
    parser.add_argument("--documents", type=int, default=40, help="of that text, for the quality of int8")
    parser.add_argument("--tokens", type=int, default=12, help="new tokens of each text")
    parser.add_argument("--threads", type=int, default=2)
    add_rounds(parser, 3)


def measure(arguments: argparse.Namespace) -> None:
    """Write results/real/real_decode.csv."""
    at_least_one(arguments, "rounds", "tokens", "threads", "documents")
    if arguments.smollm2 is not None and arguments.valid is None:
        raise UserError("--smollm2 needs --valid: the text whose beginnings it continues")
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, object]] = []
    if arguments.smollm2 is not None:
        model, tokenizer = load(arguments.smollm2)
        documents = [
            tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0, :CONTEXT]
            for text in stories_of(arguments.valid)
        ]
        documents = [ids for ids in documents if len(ids) >= PROMPT_LENGTH]
        if len(documents) < max(BATCHES):
            raise UserError(f"{arguments.valid} holds {len(documents)} documents: {max(BATCHES)} are continued")
        prompts = torch.stack([ids[:PROMPT_LENGTH] for ids in documents[: max(BATCHES)]])
        name = "SmolLM2-135M"
        rows += measure_model(name, model, prompts, arguments)
        for type_name, dtype in DTYPES.items():
            other = of_type(model, dtype)
            head = screen(other)
            quality = distance(other, head, documents[: arguments.documents], rounded_logits(head))
            rows.append({"model": name, "part": "quality", "method": "int8, not exact", "type": type_name, **quality})
    else:
        gemma, shape = gemma_shape(), (max(BATCHES), PROMPT_LENGTH)
        prompts = torch.randint(gemma.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        rows += measure_model("Gemma 3 270M shape", gemma, prompts, arguments)
    table = pd.DataFrame(rows).assign(experiment=NAME, threads=arguments.threads, **origin())
    write_measured(table, RESULTS / "real" / f"{NAME}.csv", identity(NAME, arguments), beside="model")


def measure_model(name: str, model: Any, prompts: Tensor, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of one model in both types, and of other bounds in float32."""
    head = screen(model)
    with torch.inference_mode():
        states = model.base_model(input_ids=prompts).last_hidden_state[:, NUM_READ:].flatten(0, 1)
        shares = shares_left(head, states)
    rows: list[dict[str, object]] = [
        {"model": name, "part": "bound", "method": bound, "type": "fp32", "rows_left": share}
        for bound, share in shares.items()
    ]
    for type_name, dtype in DTYPES.items():
        methods = Methods(of_type(model, dtype), prompts, arguments.tokens)
        rows += [{"model": name, **row} for row in measure_type(methods, type_name, arguments.rounds)]
    return rows


def draw(corpus: str) -> None:
    """Write results/CORPUS/real_decode.md and .png from its table."""
    report(RESULTS / corpus / f"{NAME}.csv", in_words, draw_bars, ("model", "part", "method", "type", "sampling"))
