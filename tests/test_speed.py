"""Speed: counted operations, interleaved rounds and their ratios, and the machine and code that they are of."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vocabfold import limits, machine
from vocabfold.errors import UserError
from vocabfold.measure.flops import count_flops, training_flops_per_token
from vocabfold.measure.speed import interleaved_seconds, ratio_summary, tokens_per_second

CPU = torch.device("cpu")


def test_flops_of_a_linear_layer_by_hand() -> None:
    x, w = torch.randn(10, 20, requires_grad=True), torch.randn(20, 30, requires_grad=True)
    assert count_flops(lambda: (x @ w).exp()) == 2 * 10 * 20 * 30
    assert count_flops(lambda: (x @ w).sum().backward()) == 3 * 2 * 10 * 20 * 30
    assert training_flops_per_token(lambda: (x @ w).sum().backward(), num_tokens=10) == 3 * 2 * 20 * 30
    with torch.no_grad():
        assert count_flops(lambda: w @ torch.randn(30)) == 2 * 20 * 30
        assert count_flops(lambda: torch.addmv(torch.randn(20), w, torch.randn(30))) == 2 * 20 * 30
        assert count_flops(lambda: torch.randn(7) @ torch.randn(7)) == 2 * 7
        assert count_flops(lambda: torch.randn(10, 30).addmm_(x, w)) == 2 * 10 * 20 * 30
    with pytest.raises(UserError, match="at least one token"):
        training_flops_per_token(lambda: None, num_tokens=0)


@pytest.mark.parametrize("masked", [False, True])
def test_flops_of_attention_by_hand(masked: bool) -> None:
    batch, heads, sequence, width = 2, 3, 16, 8
    q, k, v = (torch.randn(batch, heads, sequence, width, requires_grad=True) for _ in range(3))
    mask = torch.ones(sequence, sequence, dtype=torch.bool).tril() if masked else None
    product = 2 * batch * heads * sequence * sequence * width

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked)

    assert count_flops(forward) == 2 * product
    # Forward two products; backward the scores again, then gradients of value, weights, query and key.
    assert count_flops(lambda: forward().sum().backward()) == (2 + 5) * product


def test_interleaved_seconds_rotates_sides_and_times_only_rounds() -> None:
    calls: list[str] = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b"), "c": lambda: time.sleep(0.02)}
    seconds = interleaved_seconds(sides, rounds=3, warmup=2, device=CPU, progress=False)
    assert calls == ["a", "a", "b", "b", "a", "b", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert min(seconds["c"]) >= 0.02
    assert ratio_summary(seconds, "a", "c").high < 0.5


def test_ratio_summary_pairs_rounds() -> None:
    summary = ratio_summary({"slow": [2.0, 40.0, 9.0], "fast": [1.0, 10.0, 3.0]}, "slow", "fast")
    assert summary.median == pytest.approx(3.0)
    assert (summary.low, summary.high) == (pytest.approx(2.05), pytest.approx(3.95))
    assert tokens_per_second([0.5, 2.0, 1.0], num_tokens=100) == 100.0


def test_speed_says_what_is_wrong() -> None:
    with pytest.raises(UserError, match="at least one method"):
        interleaved_seconds({}, rounds=1, warmup=0, device=CPU, progress=False)
    with pytest.raises(UserError, match="no timings of 'c'"):
        ratio_summary({"a": [1.0], "b": [1.0]}, "a", "c")
    with pytest.raises(UserError, match="same rounds"):
        ratio_summary({"a": [1.0], "b": [1.0, 2.0]}, "a", "b")
    with pytest.raises(UserError, match="at least one timed step"):
        tokens_per_second([], num_tokens=1)


def test_hardware_names_this_machine() -> None:
    assert limits.usable_cores() >= 1
    assert f"{limits.usable_cores()} cores" in machine.hardware()
    assert f"{limits.memory_bytes() / 2**30:.0f} GiB" in machine.hardware()
    assert "\n" not in machine.hardware()
    assert machine.torch_version() == torch.__version__


def test_machine_rates_are_floors_of_a_real_machine() -> None:
    rate = machine.matrix_rate_flops_per_second(CPU, torch.float32, sizes=(128, 256))
    bandwidth = machine.memory_bandwidth_bytes_per_second(CPU, size_bytes=2**24)
    assert 1e8 < rate < 1e15
    assert 1e8 < bandwidth < 1e14


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_code_commit_in_a_work_tree_and_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(machine.COMMIT_VARIABLE, raising=False)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def fresh() -> str:
        machine.code_commit.cache_clear()
        return machine.code_commit(tmp_path)

    assert fresh() == "unknown"
    git("init", "--quiet")
    assert fresh() == "unknown"
    tracked, table = tmp_path / "src" / "tracked", tmp_path / "results" / "table.csv"
    for path in (tracked, table):
        path.parent.mkdir()
        path.write_text("one")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    (tmp_path / "untracked").write_text("two")
    head = git("rev-parse", "--short", "HEAD")
    table.write_text("measured again")
    assert fresh() == head
    assert machine.code_commit(tmp_path / "results") == head
    tracked.write_text("three")
    assert fresh() == head + "+"
    assert machine.code_commit(tmp_path / "missing") == "unknown"
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "0123abc")
    assert fresh() == head + "+"  # where git knows, nobody is asked
    machine.code_commit.cache_clear()
    assert machine.code_commit(tmp_path / "missing") == "0123abc"
    machine.code_commit.cache_clear()
