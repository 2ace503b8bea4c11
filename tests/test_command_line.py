"""What a person gets wrong is told in one line on stderr with exit status 2, and leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from run_cases import TINY, call, start, write_corpus
from vocabfold import generate, train
from vocabfold.command_line import one_line_errors
from vocabfold.runs import record as records

Refused = Callable[..., str]
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
IMPOSSIBLE_SETTINGS = [
    ("batchsize=3", "unknown key batchsize: did you mean batch_size? --help lists the keys"),
    ("optimizer.learning_rte=1", "unknown key optimizer.learning_rte: did you mean optimizer.learning_rate?"),
    ("data.trian=x", "unknown key data.trian: did you mean data.train?"),
    ("+nothing=3", "unknown key nothing: --help lists the keys"),
    ("head=nonesuch", "there is no head=nonesuch: choose one of adaptive, chunked, full, fused, grouped"),
    ("data=nonesuch", "there is no data=nonesuch: choose one of shapes, stories, text"),
    ("experiment=nonesuch", "there is no experiment=nonesuch: choose one of both_ends, caching"),
    ("seed", "cannot read 'seed': write key=value"),
    ("seed=[1,", "cannot read 'seed=[1,': write key=value"),
    ("seed=1,2", "add --multirun"),
    ("seed=x", "seed: Value 'x' of type 'str' could not be converted to Integer"),
    ("seed=-1", "seed is -1: choose 0 or more, at most 2**63 - 1"),
    ("batch_size=0", "batch_size is 0: choose at least 1"),
    ("sequence_length=100000", "lower the batch size or the sequence length"),
    ("model.max_positions=8", "less than sequence_length 16: raise the first or lower the second"),
    ("model.num_heads=3", "hidden_size 16 is not a multiple of num_heads 3: choose"),
    ("budget.steps=null budget.tokens=null", "set budget.epochs, budget.steps, budget.tokens or budget.seconds"),
    ("budget.steps=0", "budget.steps is 0: choose more than 0"),
    ("head=grouped head.partition.group_size=0", "group_size is 0: choose between 1 and the vocabulary size 50257"),
    ("head=grouped head.partition.group_size=50258", "choose between 1 and the vocabulary size 50257"),
    ("head=grouped head.scorer=nonesuch", "choose one of scale_shift, scale_shift_sorted, "),
    ("head=grouped head.tied=true", "use head.tied=false or head.scorer=linear_sorted"),
    ("head.label_smoothing=2", "head.label_smoothing is 2.0: choose between 0 (none) and 1"),
    ("head=grouped head.scorer=low_rank_sorted head.softcap=30", "head.softcap works with the plain scorers only: use"),
    pytest.param("head=fused", "head=fused needs CUDA", marks=NO_CUDA),
    ("data.train=missing.txt", "there is no file missing.txt; give the path of a UTF-8 text file"),
    ("data.train=null", "data=text needs data.train=FILE and data.valid=FILE"),
    ("data.layout=nonesuch", "data.layout must be packed or padded"),
    ("data.tokenizer=nonesuch", "choose one of gpt2, cl100k"),
    ("optimizer.name=sgd", "optimizer.name is 'sgd': choose one of adam, adamw"),
    ("optimizer.learning_rate=0", "optimizer.learning_rate is 0.0: choose more than 0"),
    ("optimizer.betas=[1,2]", "optimizer.betas is [1.0, 2.0]: choose two numbers"),
    ("optimizer.gradient_clip=-1", "optimizer.gradient_clip is -1.0: choose more than 0, or null"),
    ("optimizer.warmup_steps=-1", "optimizer.warmup_steps is -1: choose 0 or more"),
    ("precision=fp8", "precision is 'fp8': choose one of fp32, bf16, fp16"),
    ("wandb.mode=nonesuch", "wandb.mode is 'nonesuch': choose one of offline, online, disabled"),
    ("run_dir=train.txt/run", "cannot make the run folder train.txt/run (Not a directory): set run_dir=FOLDER"),
    ("device=tpu", "choose auto, cpu or cuda"),
    pytest.param("device=cuda", "has no CUDA: use device=cpu", marks=NO_CUDA),
    ("hydra/launcher=nonesuch", "there is no hydra/launcher=nonesuch: choose one of basic"),
]
IMPOSSIBLE_SAMPLING = [
    (["--temperature", "-1"], "temperature is -1.0: choose 0"),
    (["--temperature", "nan"], "temperature is nan: choose 0"),
    (["--top-k", "0"], "choose between 1 and the vocabulary size 50257"),
    (["--top-k", "50258"], "choose between 1 and the vocabulary size 50257"),
    (["--top-p", "0"], "top_p is 0.0: choose more than 0 and at most 1"),
    (["--top-p", "1.5"], "top_p is 1.5: choose more than 0 and at most 1"),
    (["--max-tokens", "0"], "--max-tokens is 0: choose at least 1"),
    (["--top-k", "many"], "argument --top-k: invalid int value: 'many'; --help"),
    pytest.param(["--device", "cuda"], "use --device cpu", marks=NO_CUDA),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, its token cache beside it (not in it) and one finished run, called run."""
    folder = tmp_path_factory.mktemp("command_line") / "workplace"
    folder.mkdir()
    write_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VOCABFOLD_CACHE", str(folder.parent / "cache"))
        assert call(train.main, patch, *TINY, "run_dir=run") == 0
    return folder


@pytest.fixture
def refused(workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """A function: run a program with arguments, check that it is refused and leaves no trace; its line on stderr."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("VOCABFOLD_CACHE", str(workplace.parent / "cache"))
    GlobalHydra.instance().clear()
    capfd.readouterr()

    def check(main: Callable[[], None], *arguments: str) -> str:
        before = sorted(workplace.rglob("*"))
        status = call(main, monkeypatch, *arguments)
        written = capfd.readouterr().err
        assert status == 2, written
        assert written.count("\n") == 1 and written.endswith("\n"), written
        assert sorted(workplace.rglob("*")) == before
        return written

    return check


@pytest.mark.parametrize(("overrides", "words"), IMPOSSIBLE_SETTINGS)
def test_impossible_settings_are_refused(refused: Refused, overrides: str, words: str) -> None:
    assert words in refused(train.main, *TINY, *overrides.split())


@pytest.mark.parametrize("launcher", ["ray", "ray_local"])
def test_a_launcher_without_its_plugin_says_what_to_install(refused: Refused, launcher: str) -> None:
    try:
        import hydra_plugins.hydra_ray_launcher  # noqa: F401
    except ImportError:
        written = refused(train.main, "--multirun", *TINY, f"hydra/launcher={launcher}")
        assert "the launcher ray is not installed: pip install 'vocabfold[ray]'" in written
    else:
        pytest.skip("Ray's plugin is installed")


def test_slurm_where_there_is_none(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PATH", str(workplace))
    assert call(train.main, monkeypatch, "--multirun", *TINY, "hydra/launcher=slurm") == 2
    written = capfd.readouterr().err
    shutil.rmtree(workplace / "results")  # Hydra writes down a sweep before it launches it
    assert written.count("\n") == 1 and "start this on a cluster, or choose another launcher" in written


@pytest.mark.parametrize(("arguments", "words"), IMPOSSIBLE_SAMPLING)
def test_impossible_sampling_is_refused(refused: Refused, arguments: list[str], words: str) -> None:
    assert words in refused(generate.main, "run", "the cat", *arguments)


def test_a_folder_that_is_no_finished_run_is_refused(refused: Refused, workplace: Path, tmp_path: Path) -> None:
    assert "holds no config.yaml: name the folder of a training run" in refused(generate.main, str(tmp_path), "the")
    shutil.copy(workplace / "run" / "config.yaml", tmp_path)
    assert "has not finished; run its command again first" in refused(generate.main, str(tmp_path), "the")
    (tmp_path / "config.yaml").write_text("seed: [1,")
    assert "config.yaml is damaged" in refused(generate.main, str(tmp_path), "the")


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "weights"])
def test_damaged_weights_are_refused(refused: Refused, workplace: Path, tmp_path: Path, damage: str) -> None:
    run = shutil.copytree(workplace / "run", tmp_path / "run")
    path = run / "model.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = content[:0]
    else:
        at = 9 if damage == "header" else len(content) // 2
        content[at] ^= 0xFF
    path.write_bytes(content)
    written = refused(generate.main, str(run), "the")
    assert "model.safetensors is damaged" in written and "train again" in written


def test_records_of_an_unknown_experiment_are_refused(refused: Refused) -> None:
    assert "usage: python -m vocabfold.runs.record EXPERIMENT SCALE" in refused(records.main, "single")
    written = refused(records.main, "nonesuch", "smoke")
    assert "holds no finished run: run `make everything SCALE=smoke` first" in written


def test_the_program_itself_names_itself_and_prints_no_traceback(tmp_path: Path) -> None:
    ended = start(tmp_path, "-m", "vocabfold.train", "batchsize=3")
    assert ended.returncode == 2 and ended.stdout == ""
    expected = "python -m vocabfold.train: unknown key batchsize: did you mean batch_size? --help lists the keys\n"
    assert ended.stderr == expected
    assert list(tmp_path.iterdir()) == []


def test_other_errors_keep_their_traceback_and_an_interrupt_its_status(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("a fault of the program")

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match="a fault of the program"):
        one_line_errors(broken)()
    assert call(one_line_errors(interrupted), monkeypatch) == 130
    assert capfd.readouterr().err.count("\n") == 1
