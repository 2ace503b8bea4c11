"""Continue a text from a trained run, any head: ``python -m vocabfold.generate RUN_FOLDER "Once upon a time"``."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.data.corpora import load_for_generation
from vocabfold.data.tokenizer import Tokenizer
from vocabfold.errors import UserError
from vocabfold.inference import KEY_VALUE_CACHES, PrefixCache, Reader, ResponseCache, fingerprint
from vocabfold.inference.beam_search import beam_search
from vocabfold.machine import BYTES_PER_MIB
from vocabfold.models.build import ModelWithHead
from vocabfold.runs.load import load_run
from vocabfold.runs.record import finished_row
from vocabfold.runs.settings import MOST_SEED, load_settings

TEMPERATURE = 0.8
GIBBERISH_PERPLEXITY = 30  # above it hardly a sentence holds together


@torch.inference_mode()
def generate(
    model: ModelWithHead,
    prompt: list[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end_token: int | None = None,
    generator: torch.Generator | None = None,
    key_values: str = "exact",
    prefixes: PrefixCache | None = None,
) -> Iterator[int]:
    """Yield up to ``max_tokens`` tokens that continue ``prompt``, ending before ``end_token``.

    ``key_values`` and ``prefixes`` say what is cached: see inference.Reader, also for prompts and texts longer than the
    model's positions. Raises UserError for an empty prompt, or impossible sampling settings or caches.
    """
    reader = Reader(model.gpt, key_values, prefixes)
    text = list(prompt)
    for _ in range(max_tokens):
        token = int(model.head.sample(reader.read(text), temperature, top_k, top_p, generator))
        if token == end_token:
            return
        text.append(token)
        yield token


def parse_arguments() -> Namespace:
    """The command line."""
    parser = ArgumentParser(prog="python -m vocabfold.generate", description=__doc__)
    parser.add_argument(
        "run", type=Path, help="folder of a finished training run, such as results/runs/laptop/single/…"
    )
    parser.add_argument("prompt", nargs="+", help='the beginning of each text; "" begins a new document')
    parser.add_argument("--max-tokens", type=int, default=200, help="at most so many tokens (default %(default)s)")
    parser.add_argument("--temperature", type=float, help=f"0: always the likeliest (default {TEMPERATURE})")
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw among the likeliest tokens that hold this probability only")
    parser.add_argument("--beams", type=int, help="search for the likeliest text with so many beams instead of drawing")
    parser.add_argument(
        "--length-penalty", type=float, help="beams: texts compare by log P / length ** this; 0: by log P (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--key-values",
        choices=KEY_VALUE_CACHES,
        default="exact",
        help="how keys and values are cached; none: not at all; bf16, int8 and int4 round them (default %(default)s)",
    )
    parser.add_argument(
        "--prefix-cache-mib",
        type=float,
        default=0.0,
        help="keep the keys and values of prompts for others that begin like them; 0: do not (default %(default)s)",
    )
    parser.add_argument("--response-cache", type=Path, help="folder of whole answers, for a request that comes again")
    parser.add_argument("--response-cache-mib", type=float, default=64.0, help="its limit (default %(default)s)")
    return parser.parse_args()


def check_arguments(arguments: Namespace) -> None:
    """Raise UserError for values that cannot be, and for options that do not go together."""
    if not 0 <= arguments.seed <= MOST_SEED:
        raise UserError(f"--seed is {arguments.seed}: choose 0 or more, at most 2**63 - 1")
    if arguments.top_k is not None and arguments.top_k < 1:
        raise UserError(f"--top-k is {arguments.top_k}: choose between 1 and the size of the vocabulary")
    if arguments.max_tokens < 1:
        raise UserError(f"--max-tokens is {arguments.max_tokens}: choose at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but there is no CUDA here: use --device cpu")
    if arguments.beams is None:
        if arguments.length_penalty is not None:
            raise UserError("--length-penalty compares the texts of --beams N: give both or neither")
        return
    for name in ("temperature", "top_k", "top_p"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for drawing, and --beams draws nothing: leave one out")
    if arguments.key_values != "exact" or arguments.prefix_cache_mib or arguments.response_cache is not None:
        raise UserError(
            "--beams keeps keys and values of its own: leave out --key-values, --prefix-cache-mib and --response-cache"
        )


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    arguments = parse_arguments()
    check_arguments(arguments)
    tokenizer = load_for_generation(load_settings(arguments.run).data)
    if tokenizer is None:
        raise UserError(f"{arguments.run} was trained on data without a text form: there is nothing to read")
    model = load_run(arguments.run, torch.device(arguments.device))
    model.head.prepare_to_decode()
    check_fit(model, tokenizer, arguments)
    answer = answers(model, arguments, tokenizer.end_token)
    for number, prompt in enumerate(arguments.prompt, 1):
        if len(arguments.prompt) > 1:
            print(f"--- text {number} of {len(arguments.prompt)} ---")
        tokens = answer(tokenizer.encode(prompt) or [tokenizer.end_token])
        if arguments.beams is None:
            write(prompt, tokens, tokenizer)
        else:
            print((prompt + tokenizer.decode(list(tokens))).rstrip())  # the likeliest text may end in blank lines
    perplexity = (finished_row(arguments.run) or {}).get("perplexity")
    if isinstance(perplexity, int | float) and perplexity > GIBBERISH_PERPLEXITY:
        told = f"this run's perplexity is {perplexity:.0f}: expect gibberish; a larger budget.tokens writes better"
        print(told, file=sys.stderr)


def check_fit(model: ModelWithHead, tokenizer: Tokenizer, arguments: Namespace) -> None:
    """Raise UserError where the tokenizer numbers other tokens than the model, or the model cannot draw as asked."""
    size = model.head.vocabulary_size
    if tokenizer.vocabulary_size != size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocabulary_size} tokens and the model in {arguments.run} "
            f"{size}: its config.yaml names another data.tokenizer than it was trained with"
        )
    if arguments.top_k is not None and arguments.top_k > size:
        raise UserError(f"--top-k is {arguments.top_k}: choose between 1 and the vocabulary size {size}")
    if arguments.beams is None:
        model.head.check_sampling(temperature_of(arguments), arguments.top_k, arguments.top_p)


def temperature_of(arguments: Namespace) -> float:
    """What is asked for, or else the default."""
    return TEMPERATURE if arguments.temperature is None else float(arguments.temperature)


def answers(model: ModelWithHead, arguments: Namespace, end_token: int) -> Callable[[list[int]], Iterator[int]]:
    """What continues a prompt: the best of the beams, or draws through the caches that the command line switches on."""
    if arguments.beams is not None:
        penalty = 1.0 if arguments.length_penalty is None else arguments.length_penalty
        beams = {"num_beams": arguments.beams, "length_penalty": penalty, "end_token": end_token}
        return lambda prompt: iter(beam_search(model, prompt, arguments.max_tokens, **beams)[0])
    sampling = {name: getattr(arguments, name) for name in ("max_tokens", "top_k", "top_p", "key_values")}
    sampling["temperature"] = temperature_of(arguments)
    prefixes = responses = None
    if arguments.prefix_cache_mib:
        prefixes = PrefixCache(limit_bytes("--prefix-cache-mib", arguments.prefix_cache_mib))
    if arguments.response_cache is not None:
        limit = limit_bytes("--response-cache-mib", arguments.response_cache_mib)
        responses = ResponseCache(arguments.response_cache, limit)
        request = {name: getattr(arguments, name) for name in ("seed", "device")} | sampling
        request |= {"end_token": end_token, "weights": fingerprint(model), "torch": torch.__version__}

    def compute(prompt: list[int]) -> Iterator[int]:
        generator = torch.Generator(arguments.device).manual_seed(arguments.seed)
        return generate(model, prompt, end_token=end_token, generator=generator, prefixes=prefixes, **sampling)

    if responses is None:
        return compute
    return lambda prompt: responses.answer(request | {"prompt": prompt}, lambda: compute(prompt))


def limit_bytes(option: str, mib: float) -> int:
    """Raise UserError unless ``mib`` is a size."""
    if not 0 <= mib < math.inf:
        raise UserError(f"{option} is {mib}: choose 0 or more")
    return int(mib * BYTES_PER_MIB)


def write(prompt: str, tokens: Iterator[int], tokenizer: Tokenizer) -> None:
    """Write a text to stdout while it grows."""
    written: list[int] = []
    shown = 0
    sys.stdout.write(prompt)
    try:
        for token in tokens:
            written.append(token)
            text = tokenizer.decode(written)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character waits for its other half
                sys.stdout.write(text[shown:])
                sys.stdout.flush()
                shown = len(text)
    except (UserError, KeyboardInterrupt):
        print(flush=True)  # what is told then begins on a line of its own
        raise
    print(tokenizer.decode(written)[shown:], flush=True)


if __name__ == "__main__":
    main()
