"""Continue a text from a trained run, any head: ``python -m vocabfold.generate RUN_FOLDER "Once upon a time"``."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from vocabfold.beam_search import beam_search
from vocabfold.checkpoint import load_weights, weights_metadata
from vocabfold.command_line import ArgumentParser, one_line_errors
from vocabfold.data.corpora import load_for_generation
from vocabfold.errors import UserError
from vocabfold.models.build import ModelWithHead, build_model
from vocabfold.settings import load_settings

TEMPERATURE = 0.8


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
) -> Iterator[int]:
    """Yield up to ``max_tokens`` tokens that continue ``prompt``, ending before ``end_token``.

    Keys and values are cached. Where the model has no position left, the later half of the text is read in again and
    the earlier half is forgotten. Raises UserError for an empty prompt or impossible sampling settings.
    """
    if not prompt:
        raise UserError("the prompt is empty: give at least one token")
    device = next(model.parameters()).device
    max_positions = model.backbone.config.max_positions
    text = list(prompt)
    fresh, cache = text[-max_positions:], model.backbone.new_cache(1)
    for _ in range(max_tokens):
        if cache.length + len(fresh) > max_positions:
            fresh, cache = text[-max(1, max_positions // 2) :], model.backbone.new_cache(1)
        hidden = model.backbone(torch.tensor([fresh], device=device), cache)[:, -1]
        token = int(model.head.sample(hidden, temperature, top_k, top_p, generator))
        if token == end_token:
            return
        text.append(token)
        fresh = [token]
        yield token


def load_run(folder: Path, device: torch.device) -> ModelWithHead:
    """The trained model of a finished run, ready to use. Raises UserError for a folder that is not one."""
    settings = load_settings(folder)
    vocabulary_size = weights_metadata(folder).get("vocabulary_size", "")
    if not vocabulary_size.isdecimal():
        raise UserError(f"{folder} holds weights without their vocabulary size: train it again with this version")
    model = build_model(settings.model, settings.head, int(vocabulary_size))
    load_weights(folder, model)
    return model.to(device).eval()


def parse_arguments() -> Namespace:
    """The command line."""
    parser = ArgumentParser(prog="python -m vocabfold.generate", description=__doc__)
    parser.add_argument(
        "run", type=Path, help="folder of a finished training run, such as results/runs/laptop/single/…"
    )
    parser.add_argument("prompt", help='the beginning of the text; "" begins a new document')
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
    return parser.parse_args()


def check_arguments(arguments: Namespace) -> None:
    """Raise UserError for values that cannot be, and for options that do not go together."""
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


def tokens_of(arguments: Namespace, model: ModelWithHead, prompt: list[int], end_token: int) -> Iterator[int]:
    """The continuation that the command line asks for."""
    if arguments.beams is not None:
        penalty = 1.0 if arguments.length_penalty is None else arguments.length_penalty
        beams = {"num_beams": arguments.beams, "length_penalty": penalty}
        return iter(beam_search(model, prompt, arguments.max_tokens, **beams, end_token=end_token)[0])
    return generate(
        model,
        prompt,
        arguments.max_tokens,
        temperature=TEMPERATURE if arguments.temperature is None else arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        end_token=end_token,
        generator=torch.Generator(arguments.device).manual_seed(arguments.seed),
    )


@one_line_errors
def main() -> None:
    """Command line; see --help."""
    arguments = parse_arguments()
    check_arguments(arguments)
    tokenizer = load_for_generation(load_settings(arguments.run).data)
    if tokenizer is None:
        raise UserError(f"{arguments.run} was trained on token sequences without a text form: there is nothing to read")
    model = load_run(arguments.run, torch.device(arguments.device))
    prompt = tokenizer.encode(arguments.prompt) or [tokenizer.end_token]
    tokens = tokens_of(arguments, model, prompt, tokenizer.end_token)
    written: list[int] = []
    shown = 0
    sys.stdout.write(arguments.prompt)
    for token in tokens:
        written.append(token)
        text = tokenizer.decode(written)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character waits for its other half
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
    sys.stdout.write(tokenizer.decode(written)[shown:] + "\n")


if __name__ == "__main__":
    main()
