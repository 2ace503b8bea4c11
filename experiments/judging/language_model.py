"""A language model as the judge, through any endpoint that speaks OpenAI's chat protocol."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from experiments.judging.base import Judge, Story
from vocabfold.data.tokenizer import load_tokenizer
from vocabfold.errors import UserError
from vocabfold.files import write_text

RUBRIC_VERSION = 1  # another wording asks another question: count up, so that no old answer is taken for a new one
RUBRIC = """\
You mark creative writing. A writer was handed the first lines of a short story for young children and wrote on from
the exact place where they broke off, sometimes in the middle of a sentence. The writer may have run out of paper
before the end; do not mark that down. Mark only what the writer added, read together with the lines that were given.

Give four marks from 0 (worst) to 10 (best); half marks are allowed:
- "grammar": is the language correct, sentence by sentence?
- "creativity": are there ideas of the writer's own that suit the story, rather than stock phrases and repetition?
- "consistency": do the people, things, places and facts stay what the given lines made them?
- "plot": does what happens follow from what was begun, and does it lead somewhere?
And one estimate:
- "age": how old, in years, from 2 to 18, is a child who writes like this?

Answer with one JSON object of these five keys and numbers as their values, and nothing else."""
STORY = "The given lines:\n<<<\n{beginning}\n>>>\n\nWhat the writer added:\n<<<\n{continuation}\n>>>"
RANGES = {"grammar": (0, 10), "creativity": (0, 10), "consistency": (0, 10), "plot": (0, 10), "age": (2, 18)}
COLUMNS = {key: "age_years" if key == "age" else f"{key}_of_10" for key in RANGES}
ANSWER_TOKENS = 45  # of an answer as asked for; a model that thinks first writes more
NONSENSE_LIMIT = 3  # answers to one question that are not as asked for
MOST_ANSWER_LETTERS = 100_000  # that are read of a stored answer: five marks take a hundred
TIMEOUT_SECONDS = 60.0
RETRIES = 5  # of a request that was refused for now, failed or took too long


@dataclass(frozen=True)
class Endpoint:
    """Where the model is and what it costs. ``base_url`` None is the client's own choice (OPENAI_BASE_URL, or OpenAI);
    ``key`` is never written anywhere. ``max_answer_tokens`` None leaves the length of an answer to the endpoint: small
    models ramble up to its limit, large ones may think before they answer."""

    model: str
    base_url: str | None = None
    key: str | None = None
    timeout_seconds: float = TIMEOUT_SECONDS
    retries: int = RETRIES
    parallel: int = 4
    max_answer_tokens: int | None = None

    @property
    def address(self) -> str:
        """Of the endpoint, as far as it was named, for a person and for what is kept: a password in it is masked."""
        named = self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        scheme, slashes, rest = named.partition("://")
        user, at, _ = rest.partition("/")[0].rpartition("@")
        return f"{scheme}{slashes}***@{rest[len(user) + len(at) :]}" if at else named


@dataclass(frozen=True)
class Estimate:
    """What asking will take: requests that no stored answer saves, and about so many tokens in and out."""

    requests: int
    tokens_in: int
    tokens_out: int

    def words(self, dollars_per_million_in: float | None, dollars_per_million_out: float | None) -> str:
        """One line for a person; the prices may be unknown."""
        line = f"{self.requests:,} requests, about {self.tokens_in:,} tokens in and {self.tokens_out:,} out"
        if dollars_per_million_in is None or dollars_per_million_out is None:
            return f"{line}; with --dollars-per-million IN OUT also what that costs"
        dollars = (self.tokens_in * dollars_per_million_in + self.tokens_out * dollars_per_million_out) / 1e6
        return f"{line}: about ${dollars:,.2f}"


class LanguageModelJudge(Judge):
    """Marks from a language model: grammar, creativity, consistency and plot of 10, and the writer's age in years.

    Each story is asked about ``repeats`` times and gets the mean. Answers lie in ``cache`` (one file each, keyed by
    endpoint, model, rubric, story and repeat), so that nothing is paid for twice. Raises UserError where the endpoint
    cannot be reached, refuses, or answers nonsense again and again.
    """

    quantities: ClassVar[Mapping[str, str]] = {
        "grammar_of_10": "Grammar (of 10)",
        "creativity_of_10": "Creativity (of 10)",
        "consistency_of_10": "Consistency (of 10)",
        "plot_of_10": "Plot (of 10)",
        "age_years": "Age (years)",
    }

    def __init__(self, endpoint: Endpoint, cache: Path, repeats: int = 1) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError("the judge needs the openai client: pip install 'vocabfold[judge]'") from error
        if repeats < 1:
            raise UserError(f"--repeats is {repeats}: choose at least 1")
        if endpoint.key is None and endpoint.address.startswith("https://api.openai.com"):
            raise UserError("there is no key: set OPENAI_API_KEY, or name another endpoint with --base-url")
        self.endpoint = endpoint
        self.name = f"language model {endpoint.model}"
        self.cache = cache.expanduser()
        self.repeats = repeats
        # The client retries 408, 409, 429, 5xx, timeouts and lost connections, later each time, and not before the
        # endpoint's Retry-After.
        self.client = openai.OpenAI(
            api_key=endpoint.key or "none",  # a local endpoint wants none, the client does
            base_url=endpoint.base_url,
            timeout=endpoint.timeout_seconds,
            max_retries=endpoint.retries,
        )

    def estimate(self, stories: Sequence[Story]) -> Estimate:
        """What ``scores`` of these stories will take."""
        count = load_tokenizer("cl100k").encode
        asked = {
            self.path_of(story, repeat): story
            for story in stories
            for repeat in range(self.repeats)
            if self.stored(story, repeat) is None
        }
        tokens_in = sum(len(count(message["content"])) for story in asked.values() for message in messages_of(story))
        return Estimate(len(asked), tokens_in, len(asked) * ANSWER_TOKENS)

    def scores(self, stories: Sequence[Story]) -> list[dict[str, float]]:
        """One dictionary of ``quantities`` for each story. What was answered before an error stays stored."""
        questions = [(story, repeat) for story in stories for repeat in range(self.repeats)]
        answers: list[dict[str, float]] = []
        given_up = threading.Event()

        def answer(question: tuple[Story, int]) -> dict[str, float]:
            if given_up.is_set():  # what has failed for one is not paid for by another
                raise UserError("given up")
            try:
                return self.answer(*question)
            except BaseException:
                given_up.set()
                raise

        with (
            ThreadPoolExecutor(self.endpoint.parallel) as pool,
            tqdm(total=len(questions), desc=self.name, leave=False) as bar,
        ):
            try:
                for marks in pool.map(answer, questions):
                    answers.append(marks)
                    bar.update()
            except BaseException:
                given_up.set()
                raise
        groups = [answers[start : start + self.repeats] for start in range(0, len(answers), self.repeats)]
        return [
            {COLUMNS[key]: math.fsum(answer[key] for answer in group) / self.repeats for key in RANGES}
            for group in groups
        ]

    def answer(self, story: Story, repeat: int) -> dict[str, float]:
        """The stored marks of a story, or new ones."""
        stored = self.stored(story, repeat)
        if stored is not None:
            return stored
        for _ in range(NONSENSE_LIMIT):
            said = self.ask(messages_of(story))
            marks = marks_in(said)
            if marks is not None:
                write_text(self.path_of(story, repeat), json.dumps(marks) + "\n")
                return marks
        raise UserError(
            f"{self.endpoint.model} did not answer with five marks in {NONSENSE_LIMIT} tries "
            f"(the last: {' '.join(said.split())[:80]!r}): choose another model with --judge-model"
        )

    def ask(self, messages: list[dict[str, str]]) -> str:
        """One request, with the client's retries."""
        import openai

        send = partial(self.client.chat.completions.create, model=self.endpoint.model)
        where = f"the judge at {self.endpoint.address}"
        most = self.endpoint.max_answer_tokens
        limit_tokens = {} if most is None else {"max_completion_tokens": most}
        try:
            completion: Any = send(messages=messages, **limit_tokens)
        except openai.APITimeoutError as error:
            limit = self.endpoint.timeout_seconds
            raise UserError(f"{where} took longer than {limit:g} s, {self.endpoint.retries + 1} times") from error
        except openai.APIConnectionError as error:
            raise UserError(f"{where} cannot be reached ({error.__cause__ or error}): is --base-url right?") from error
        except openai.APIStatusError as error:
            reason = " ".join(str(error.message).split())[:160]
            raise UserError(f"{where} refuses (HTTP {error.status_code}): {reason}") from error
        except openai.OpenAIError as error:
            raise UserError(f"{where} cannot be used ({' '.join(str(error).split())[:160]})") from error
        try:
            return completion.choices[0].message.content or ""
        except (AttributeError, IndexError, TypeError):  # of another protocol: as good as nonsense
            return ""

    def stored(self, story: Story, repeat: int) -> dict[str, float] | None:
        """The marks in the cache, None where there are none or the file is damaged."""
        try:
            with self.path_of(story, repeat).open(encoding="utf-8") as file:
                return marks_in(file.read(MOST_ANSWER_LETTERS))
        except (OSError, UnicodeDecodeError):
            return None

    def path_of(self, story: Story, repeat: int) -> Path:
        """Where the answer to one question lies."""
        question = [self.endpoint.address, self.endpoint.model, RUBRIC_VERSION, messages_of(story), repeat]
        return self.cache / f"{hashlib.sha256(json.dumps(question).encode()).hexdigest()}.json"


def messages_of(story: Story) -> list[dict[str, str]]:
    """The question about one story."""
    asked = STORY.format(beginning=story.beginning, continuation=story.continuation)
    return [{"role": "system", "content": RUBRIC}, {"role": "user", "content": asked}]


def marks_in(said: str) -> dict[str, float] | None:
    """The five marks in an answer, also where a model wrote around the JSON; None unless all are there and in range."""
    try:
        found = json.loads(said[said.index("{") : said.rindex("}") + 1])
    except (ValueError, RecursionError):
        return None
    marks = {}
    for key, (least, most) in RANGES.items():
        mark = found.get(key)
        if isinstance(mark, bool) or not isinstance(mark, int | float) or not least <= mark <= most:
            return None
        marks[key] = float(mark)
    return marks
