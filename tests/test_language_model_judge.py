"""The language-model judge against a local server that answers well, late, with nonsense or refusals, or not at all."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from experiments.judging import Endpoint, Estimate, LanguageModelJudge, Story
from experiments.judging import language_model as module
from experiments.judging.language_model import marks_in

from vocabfold.errors import UserError

MARKS = {"grammar": 7, "creativity": 4.5, "consistency": 8, "plot": 6, "age": 6}
GOOD = json.dumps(MARKS)
STORIES = [Story("Once there was a fox", f" who had {number} hats.", True) for number in range(3)]


class Server(ThreadingHTTPServer):
    """Gives the answers of ``script`` one after the other, the last for ever: a text, a status code with headers, or
    seconds to wait before a good answer. ``requests`` are those that came, with their times."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Any] = [GOOD]
        self.requests: list[tuple[float, dict[str, Any], str | None]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((time.monotonic(), body, self.headers["Authorization"]))
            script = self.server.script
            answer = script.pop(0) if len(script) > 1 else script[0]
        headers: dict[str, str] = {}
        status = 200
        if isinstance(answer, tuple):
            status, headers = answer
            content: Any = {"error": {"message": "not\nnow"}}
        else:
            if isinstance(answer, float):
                time.sleep(answer)
                answer = GOOD
            content = {"choices": [{"message": {"role": "assistant", "content": answer}}]} if answer else {}
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def judge_at(url: str, cache: Path, repeats: int = 1, **changes: Any) -> LanguageModelJudge:
    settings = {"key": "secret", "timeout_seconds": 5.0, "retries": 2, "parallel": 1} | changes
    return LanguageModelJudge(Endpoint("some-model", url, **settings), cache, repeats)


def test_marks_come_back_by_their_columns_and_are_asked_for_once(server: Server, tmp_path: Path) -> None:
    server.script = [GOOD, GOOD.replace("7", "3"), f"Here you are:\n```json\n{GOOD}\n```"]
    judge = judge_at(server.url, tmp_path)
    scores = judge.scores(STORIES)
    assert scores[0] == {
        "grammar_of_10": 7,
        "creativity_of_10": 4.5,
        "consistency_of_10": 8,
        "plot_of_10": 6,
        "age_years": 6,
    }
    assert [score["grammar_of_10"] for score in scores] == [7, 3, 7] and set(scores[0]) == set(judge.quantities)
    _, body, authorization = server.requests[1]
    assert body["model"] == "some-model" and authorization == "Bearer secret"
    assert "Once there was a fox" in body["messages"][1]["content"] and "1 hats" in body["messages"][1]["content"]
    assert "max_completion_tokens" not in body
    assert judge_at(server.url, tmp_path).scores(STORIES) == scores and len(server.requests) == 3
    assert len(list(tmp_path.iterdir())) == 3
    assert not any("secret" in path.read_text() + path.name for path in tmp_path.iterdir())


def test_a_model_that_rambles_is_cut_short(server: Server, tmp_path: Path) -> None:
    server.script = [GOOD]
    judge_at(server.url, tmp_path, max_answer_tokens=60).scores(STORIES[:1])
    assert server.requests[0][1]["max_completion_tokens"] == 60


def test_repeats_are_asked_apart_and_averaged(server: Server, tmp_path: Path) -> None:
    server.script = [GOOD, GOOD.replace("7", "4")]
    (score,) = judge_at(server.url, tmp_path, repeats=2).scores(STORIES[:1])
    assert score["grammar_of_10"] == 5.5 and len(server.requests) == 2
    judge_at(server.url, tmp_path, repeats=3).scores(STORIES[:1])
    assert len(server.requests) == 3  # only the third is new


def test_another_model_rubric_or_story_is_another_question(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = judge_at(server.url, tmp_path)
    other = LanguageModelJudge(Endpoint("another-model", server.url), tmp_path)
    paths = {judge.path_of(STORIES[0], 0), judge.path_of(STORIES[1], 0), judge.path_of(STORIES[0], 1)}
    paths.add(other.path_of(STORIES[0], 0))
    monkeypatch.setattr(module, "RUBRIC_VERSION", 0)
    paths.add(judge.path_of(STORIES[0], 0))
    assert len(paths) == 5


def test_a_damaged_answer_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    judge = judge_at(server.url, tmp_path)
    judge.scores(STORIES[:1])
    judge.path_of(STORIES[0], 0).write_bytes(b"{\xff")
    assert judge.estimate(STORIES[:1]).requests == 1
    assert judge.scores(STORIES[:1]) and len(server.requests) == 2 and judge.estimate(STORIES[:1]).requests == 0


def test_requests_run_side_by_side_and_keep_their_order(server: Server, tmp_path: Path) -> None:
    server.script = [0.4, GOOD.replace("7", "2"), GOOD.replace("7", "2"), GOOD]
    scores = judge_at(server.url, tmp_path, parallel=3).scores(STORIES)
    arrived = [int(body["messages"][1]["content"].split("who had ")[1][0]) for _, body, _ in server.requests]
    assert scores[arrived[0]]["grammar_of_10"] == 7
    assert [scores[number]["grammar_of_10"] for number in arrived[1:]] == [2, 2]


def test_a_busy_or_broken_server_is_asked_again_but_not_before_it_says(server: Server, tmp_path: Path) -> None:
    server.script = [(429, {"Retry-After": "0.7"}), (500, {"Retry-After": "0.1"}), GOOD]
    judge_at(server.url, tmp_path).scores(STORIES[:1])
    times = [when for when, _, _ in server.requests]
    assert len(times) == 3 and times[1] - times[0] >= 0.7 and times[2] - times[1] >= 0.1


def test_nonsense_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.script = ["I liked it a lot.", GOOD.replace("7", "70"), GOOD]
    (score,) = judge_at(server.url, tmp_path).scores(STORIES[:1])
    assert score["grammar_of_10"] == 7 and len(server.requests) == 3


@pytest.mark.parametrize(
    ("script", "words", "requests"),
    [
        (["I liked it a lot."], "did not answer with five marks in 3 tries (the last: 'I liked it a lot.')", 3),
        ([""], "did not answer with five marks", 3),  # no choices at all: another protocol
        ([(429, {"Retry-After": "0.01"})], "HTTP 429): ", 3),
        ([(500, {"Retry-After": "0.01"})], "HTTP 500): ", 3),
        ([(401, {})], "HTTP 401): ", 1),
    ],
)
def test_what_goes_on_failing_ends_in_one_line(
    server: Server, tmp_path: Path, script: list[Any], words: str, requests: int
) -> None:
    server.script = script
    with pytest.raises(UserError) as failure:
        judge_at(server.url, tmp_path).scores(STORIES)
    assert words in str(failure.value) and "\n" not in str(failure.value) and "secret" not in str(failure.value)
    assert len(server.requests) == requests and not list(tmp_path.iterdir())


def test_a_slow_server_is_waited_for_and_one_too_slow_is_named(server: Server, tmp_path: Path) -> None:
    server.script = [0.3]
    assert judge_at(server.url, tmp_path).scores(STORIES[:1])
    with pytest.raises(UserError, match=r"took longer than 0.1 s, 1 times"):
        judge_at(server.url, tmp_path, timeout_seconds=0.1, retries=0).scores(STORIES[1:])


@pytest.mark.parametrize("url", [None, "nowhere"])
def test_a_server_that_is_not_there_is_told_in_one_line(tmp_path: Path, url: str | None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = url or f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="cannot be reached") as failure:
        judge_at(url, tmp_path, retries=0).scores(STORIES)
    assert url in str(failure.value) and "\n" not in str(failure.value)


def test_what_was_answered_before_an_error_stays(server: Server, tmp_path: Path) -> None:
    server.script = [GOOD, (401, {})]
    with pytest.raises(UserError):
        judge_at(server.url, tmp_path).scores(STORIES)
    assert judge_at(server.url, tmp_path).estimate(STORIES).requests == 2


def test_the_estimate_counts_what_is_not_stored_and_its_price(server: Server, tmp_path: Path) -> None:
    judge = judge_at(server.url, tmp_path, repeats=2)
    whole = judge.estimate(STORIES)
    assert whole.requests == 6 and 1500 < whole.tokens_in < 3000 and whole.tokens_out == 6 * module.ANSWER_TOKENS
    assert judge.estimate(STORIES * 2).requests == 6  # the same story twice is one question
    judge.scores(STORIES[:1])
    assert judge.estimate(STORIES).requests == 4
    line = Estimate(1000, 500_000, 40_000).words(2.0, 10.0)
    assert line == "1,000 requests, about 500,000 tokens in and 40,000 out: about $1.40"
    assert "--dollars-per-million" in Estimate(1, 1, 1).words(None, None)


def test_marks_are_five_numbers_in_range() -> None:
    assert marks_in(f"Sure! {GOOD} Anything else?") == MARKS
    for key, value in (("age", 1), ("plot", 10.5), ("grammar", -1), ("plot", "6"), ("plot", None), ("plot", True)):
        assert marks_in(json.dumps(MARKS | {key: value})) is None
    assert marks_in(GOOD.replace("7", "NaN")) is None
    assert marks_in("{") is None and marks_in("} {") is None and marks_in("[1, 2]") is None and marks_in("") is None
    assert marks_in(json.dumps({key: 5 for key in MARKS if key != "plot"})) is None


def test_settings_that_cannot_work_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        LanguageModelJudge(Endpoint("m"), tmp_path)
    with pytest.raises(UserError, match="--repeats is 0"):
        LanguageModelJudge(Endpoint("m", key="k"), tmp_path, repeats=0)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert LanguageModelJudge(Endpoint("m"), tmp_path).endpoint.address == "http://127.0.0.1:9/v1"
