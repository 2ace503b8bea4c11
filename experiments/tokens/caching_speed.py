"""How the caches of experiments/tokens/caching.py are measured: speed in one interleaved run, peak memory, perplexity.

Peers: transformers' caches around a GPT-2 of the same size with random weights, since published ones need a network;
speeds of the two libraries stand side by side, and only ratios within one are concluded from.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.study.statistics import mean_and_interval
from experiments.tokens.quality import losses_through_cache
from vocabfold.data.batches import BatchPlan
from vocabfold.data.corpora import load_corpus
from vocabfold.errors import UserError
from vocabfold.generate import generate
from vocabfold.inference import LAYER_CACHES, PrefixCache, ResponseCache, bytes_a_position, fingerprint
from vocabfold.machine import BYTES_PER_MIB
from vocabfold.measure.memory import peak_memory_of
from vocabfold.measure.speed import interleaved_seconds
from vocabfold.models.build import ModelWithHead
from vocabfold.runs.load import load_run
from vocabfold.runs.record import finished_row
from vocabfold.runs.settings import load_settings

LIMIT_BYTES = 256 * BYTES_PER_MIB  # of each prefix and each response cache: nothing is evicted here
# Ours: (keys and values, prefix cache, response cache). The last one is the guide's last step, coding and caching
# combined: int8 keys and values, beginnings kept as the same int8 rows, answers deflated on disk.
OURS = {
    "none": ("none", False, False),
    "key/value": ("exact", False, False),
    "bf16": ("bf16", False, False),
    "int8": ("int8", False, False),
    "int4": ("int4", False, False),
    "prefix": ("exact", True, False),
    "response": ("exact", False, True),
    "all exact": ("exact", True, True),
    "all coded": ("int8", True, True),
}
PEERS = {"none": "none", "key/value": "dynamic", "static": "static", "fp8": "fp8", "int4": "int4", "prefix": "dynamic"}
CHUNK = 64  # tokens that are read at a time
SHORT_CONTEXT = 16  # tokens: the control, which tells how much the past that is rounded matters at all
TRAINED = (
    "corpus",
    "seed",
    "model",
    "hidden_size",
    "num_layers",
    "head",
    "scorer",
    "steps",
    "tokens",
    "num_parameters",
)
REUSE = ("key/value", "prefix", "response", "all exact", "all coded")  # what a prompt seen before can be read with


@dataclass(frozen=True)
class Workload:
    """Prompts of ``prompt_tokens``, the first ``shared_tokens`` the same in all; ``new_tokens`` are generated."""

    name: str
    prompt_tokens: int
    shared_tokens: int
    new_tokens: int
    caches: tuple[str, ...] = tuple({**OURS, **PEERS})

    def prompts(self, tokens: np.ndarray) -> Iterator[list[int]]:
        """Prompts cut from a token stream, one after the other, again from its beginning at its end."""
        own = self.prompt_tokens - self.shared_tokens
        shared = tokens[: self.shared_tokens].tolist()
        for index in itertools.count():
            start = self.shared_tokens + index * own % (len(tokens) - self.prompt_tokens)
            yield shared + tokens[start : start + own].tolist()


WORKLOADS = (
    Workload("distinct", 32, 0, 64),
    Workload("distinct", 448, 0, 64),
    Workload("repeated", 448, 448, 64, REUSE),
    Workload("shared beginning", 512, 448, 1),
)
# Peak memory is measured at a full context.
MEMORY_WORKLOADS = (Workload("distinct", 510, 0, 2), Workload("repeated", 510, 510, 2, REUSE))


@dataclass
class Decoder:
    """One library and cache under one workload, with caches of its own."""

    module: nn.Module
    library: str
    cache: str
    workload: Workload
    prompts: Iterator[list[int]]
    answer: Callable[[list[int], int], Iterator[int]]
    held: Callable[[], list[Tensor]] = list  # the tensors that stay between answers
    responses: ResponseCache | None = None
    first_seconds: list[float] = field(default_factory=list)
    written: list[list[int]] = field(default_factory=list)

    def step(self) -> None:
        """Answer the next prompt."""
        prompt = next(self.prompts)
        start = time.perf_counter()
        tokens: list[int] = []
        for token in self.answer(prompt, self.workload.new_tokens):
            if not tokens:
                self.first_seconds.append(time.perf_counter() - start)
            tokens.append(token)
        self.written.append(tokens)


def our_decoder(model: ModelWithHead, cache: str, workload: Workload, tokens: np.ndarray, folder: Path) -> Decoder:
    """Greedy decoding with our caches; ``folder`` takes the answers."""
    key_values, with_prefixes, with_responses = OURS[cache]
    prefixes = PrefixCache(LIMIT_BYTES) if with_prefixes else None
    responses = ResponseCache(folder, LIMIT_BYTES) if with_responses else None
    weights = fingerprint(model) if with_responses else ""

    def compute(prompt: list[int], count: int) -> Iterator[int]:
        return generate(model, prompt, count, temperature=0.0, key_values=key_values, prefixes=prefixes)

    def answer(prompt: list[int], count: int) -> Iterator[int]:
        if responses is None:
            return compute(prompt, count)
        request = {"weights": weights, "prompt": prompt, "max_tokens": count, "key_values": key_values}
        return responses.answer(request, lambda: compute(prompt, count))

    held = list if prefixes is None else prefixes.tensors
    return Decoder(model, "vocabfold", cache, workload, workload.prompts(tokens), answer, held, responses)


def peer_decoders(model: ModelWithHead, workload: Workload, tokens: np.ndarray) -> dict[str, Decoder]:
    """Greedy decoding of transformers' GPT-2 with transformers' caches; none where transformers is not installed."""
    try:
        from experiments.tokens import hugging_face
    except ImportError:
        tqdm.write("transformers is left out: pip install 'vocabfold[hf]' to measure its caches too", file=sys.stderr)
        return {}
    torch.manual_seed(0)
    peer = hugging_face.random_gpt2(model.gpt.config)
    decoders = {}
    for cache in [name for name in PEERS if name in workload.caches]:
        kind, beginning = PEERS[cache], None
        held: Callable[[], list[Tensor]] = list
        if kind not in hugging_face.available_caches():
            continue
        if cache == "prefix" and workload.shared_tokens:
            # One token of a repeated prompt must be read again, for its logits.
            shared = tokens[: min(workload.shared_tokens, workload.prompt_tokens - 1)].tolist()
            reader = hugging_face.HuggingFaceReader(peer, kind)
            reader.read(shared)
            assert reader.cache is not None
            beginning = (shared, reader.cache)
            held = partial(keys_and_values, reader.cache)

        def answer(prompt: list[int], count: int, kind: str = kind, beginning: Any = beginning) -> Iterator[int]:
            reader = hugging_face.HuggingFaceReader(peer, kind, beginning)
            text = list(prompt)
            for _ in range(count):
                text.append(int(reader.read(text).argmax()))
                yield text[-1]

        decoders[cache] = Decoder(peer, "transformers", cache, workload, workload.prompts(tokens), answer, held)
    return decoders


def keys_and_values(cache: Any) -> list[Tensor]:
    """The tensors of a dynamic cache of transformers."""
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def build_decoders(model: ModelWithHead, workload: Workload, tokens: np.ndarray, folder: Path) -> dict[str, Decoder]:
    """All that take turns under one workload; ``folder`` takes the answers of each."""
    decoders = {}
    for cache in [name for name in OURS if name in workload.caches]:
        decoders[f"vocabfold {cache}"] = our_decoder(model, cache, workload, tokens, folder / cache.replace("/", "-"))
    for cache, decoder in peer_decoders(model, workload, tokens).items():
        decoders[f"transformers {cache}"] = decoder
    return decoders


def speeds(model: ModelWithHead, tokens: np.ndarray, rounds: int, folder: Path) -> pd.DataFrame:
    """Every workload, one after the other; within one, all decoders take turns. One row a decoder and round."""
    rows = []
    for number, workload in enumerate(tqdm(WORKLOADS, desc="workloads")):
        decoders = build_decoders(model, workload, tokens, folder / str(number))
        steps = {name: decoder.step for name, decoder in decoders.items()}
        seconds = interleaved_seconds(steps, rounds, 1, torch.device("cpu"), progress=True)
        for name, decoder in decoders.items():
            baseline = decoders.get(f"{decoder.library} none", decoders[f"{decoder.library} key/value"])
            rows += decoder_rows(decoder, seconds[name], baseline)
    return pd.DataFrame(rows)


def decoder_rows(decoder: Decoder, seconds: list[float], baseline: Decoder) -> list[dict[str, Any]]:
    """One row a timed round; what holds for all rounds stands in each."""
    pairs = [pair for texts in zip(baseline.written, decoder.written, strict=True) for pair in zip(*texts, strict=True)]
    row: dict[str, Any] = described(decoder) | {
        "kept_between_answers_mib": sum(tensor.nbytes for tensor in decoder.held()) / BYTES_PER_MIB,
        "same_tokens_share": float(np.mean([ours == theirs for ours, theirs in pairs])),
    }
    if decoder.responses is not None:
        answers = len(list(decoder.responses.folder.iterdir()))
        row["answer_bytes_a_token"] = decoder.responses.stored_bytes / (answers * decoder.workload.new_tokens)
    return [
        row | {"round": index, "seconds": whole, "seconds_to_first_token": first}
        for index, (whole, first) in enumerate(zip(seconds, decoder.first_seconds[-len(seconds) :], strict=True))
    ]


def described(decoder: Decoder) -> dict[str, Any]:
    """What a row is about."""
    return {
        "library": decoder.library,
        "cache": decoder.cache,
        "workload": decoder.workload.name,
        "prompt_tokens": decoder.workload.prompt_tokens,
        "shared_tokens": decoder.workload.shared_tokens,
        "new_tokens": decoder.workload.new_tokens,
    }


def trained_model(run: Path, needed: int) -> tuple[ModelWithHead, np.ndarray]:
    """The run's model and its validation tokens. Raises UserError where it has not ``needed`` positions and tokens."""
    model = load_run(run, torch.device("cpu"))
    tokens = np.asarray(load_corpus(load_settings(run).data).valid.tokens)
    if model.gpt.config.max_positions < needed or len(tokens) <= needed:
        raise UserError(f"{run} has too few positions or validation tokens: {needed} are needed")
    return model, tokens


def peak_memories(model: ModelWithHead, tokens: np.ndarray, folder: Path) -> pd.DataFrame:
    """One row a cache, for an unseen prompt and for one that comes again; ``folder`` takes the answers."""
    decoders = [
        decoder
        for number, workload in enumerate(MEMORY_WORKLOADS)
        for decoder in build_decoders(model, workload, tokens, folder / str(number)).values()
    ]
    return pd.DataFrame([peak_row(decoder) for decoder in tqdm(decoders, desc="peak memory")])


def peak_row(decoder: Decoder) -> dict[str, object]:
    """Bytes at the peak of one answer after another one: weights, what is kept between answers, and the rest."""
    decoder.step()
    kept = decoder.held()
    kept_bytes = sum(tensor.nbytes for tensor in kept)
    memory = peak_memory_of(
        decoder.step, torch.device("cpu"), [*decoder.module.parameters(), *decoder.module.buffers(), *kept]
    )
    return described(decoder) | {
        "weights_mib": (memory.live_bytes_before - kept_bytes) / BYTES_PER_MIB,
        "kept_between_answers_mib": kept_bytes / BYTES_PER_MIB,
        "peak_memory_mib": memory.peak_bytes / BYTES_PER_MIB,
    }


def perplexities(run: Path) -> list[dict[str, Any]]:
    """One row a kind of keys and values, over the whole validation set of the run: loss, and its change from exact.

    The 95% interval of the change is over the rows of the validation set, each as long as a training sequence. A last
    row, without an interval, has exact keys and values but forgets all after SHORT_CONTEXT tokens.
    """
    settings = load_settings(run)
    model = load_run(run, torch.device("cpu"))
    corpus = load_corpus(settings.data)
    length = settings.sequence_length
    batches = corpus.batches("valid", BatchPlan(length, batch_size=4, seed=0))
    short = corpus.batches("valid", BatchPlan(SHORT_CONTEXT, batch_size=4 * length // SHORT_CONTEXT, seed=0))
    trained = finished_row(run) or {}
    rows, exact = [], None
    for kind, layer_cache in tqdm(LAYER_CACHES.items(), desc=run.name):
        sums, counts = losses_through_cache(model, batches.evaluation_batches(), kind, CHUNK)
        exact = sums if exact is None else exact
        whole = counts == length  # the last row may be shorter, and then has another spread
        change, half_width = mean_and_interval(((sums - exact)[whole] / length).tolist())
        loss = float(sums.sum() / counts.sum())
        cache = model.gpt.new_cache(1, layer_cache)
        with torch.inference_mode():
            model.gpt(torch.zeros(1, 1, dtype=torch.long), cache)
        row: dict[str, Any] = {name: trained.get(name) for name in TRAINED}
        row |= {"sequence_length": length, "key_values": kind, "validation_loss_nats": loss}
        row |= {"perplexity": np.exp(loss), "loss_change_nats": change, "loss_change_half_width_nats": half_width}
        rows.append(row | {"bytes_a_position": bytes_a_position(cache)})
    sums, counts = losses_through_cache(model, short.evaluation_batches(), "exact", SHORT_CONTEXT)
    loss = float(sums.sum() / counts.sum())
    control = {"key_values": f"exact, {SHORT_CONTEXT} tokens of context", "validation_loss_nats": loss}
    control |= {"perplexity": np.exp(loss), "loss_change_nats": loss - rows[0]["validation_loss_nats"]}
    rows.append(rows[0] | control | {"loss_change_half_width_nats": None})
    return rows
