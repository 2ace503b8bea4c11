"""What a person gets wrong is told in one line on stderr with exit status 2, and leaves nothing behind."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from tqdm import tqdm

from run_cases import TINY, call, start, write_corpus
from vocabfold import generate, train
from vocabfold.command_line import one_line, one_line_errors
from vocabfold.errors import UserError
from vocabfold.runs import record as records
from vocabfold.runs.checkpoint import save_weights, weights_metadata
from vocabfold.runs.load import load_run

Refused = Callable[..., str]
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
IMPOSSIBLE_SETTINGS = [
    ("batchsize=3", "unknown key batchsize: did you mean batch_size? --help lists the keys"),
    ("optimizer.learning_rte=1", "unknown key optimizer.learning_rte: did you mean optimizer.learning_rate?"),
    ("data.trian=x", "unknown key data.trian: did you mean data.train?"),
    ("+nothing=3", "unknown key nothing: --help lists the keys"),
    ("head=nonesuch", "there is no head=nonesuch: choose one of adaptive, chunked, "),
    ("data=nonesuch", "there is no data=nonesuch: choose one of shapes, shapes_2304, shapes_256, stories, text"),
    ("experiment=nonesuch", "there is no experiment=nonesuch: choose one of both_ends, caching"),
    ("head=null", "there is no head=null: choose one of adaptive, chunked, "),
    ("head=[full,paper]", "there is no head=[full,paper]: choose one of adaptive, chunked, "),
    ("experiment=null", "there is no experiment=null: choose one of both_ends, caching"),
    ("data=null", "there is no data=null: choose one of shapes, "),
    ("size=64", "there is no size=64: choose one of hidden1024, "),
    ("model=true", "there is no model=true: choose one of cnn, gpt2"),
    ("hydra/launcher=null", "there is no hydra/launcher=null: choose one of local_executor"),
    ("hydra/sweeper=1", "there is no hydra/sweeper=1: choose one of its options, or leave it out"),
    ("--multirun head=paper,null", "there is no head=paper,null: choose one of adaptive, chunked, "),
    ("~experiment", "~experiment leaves a run without experiment: leave ~experiment out"),
    ("seed", "cannot read 'seed': write key=value"),
    ("seed=[1,", "cannot read 'seed=[1,': write key=value"),
    ("seed=1,2", "add --multirun"),
    ("seed=x", "seed: Value 'x' of type 'str' could not be converted to Integer"),
    ("seed=-1", "seed is -1: choose 0 or more, at most 2**63 - 1"),
    (f"seed={2**70}", f"seed is {2**70}: choose 0 or more, at most 2**63 - 1"),
    ("head.init_std=-1", "head.init_std is -1.0: choose 0 or more"),
    ("budget.seconds=nan", "budget.seconds is nan: choose a finite number"),
    ("budget.epochs=inf", "budget.epochs is inf: choose a finite number"),
    ("optimizer.learning_rate=nan", "optimizer.learning_rate is nan: choose a finite number"),
    ("optimizer.betas=[nan,0.9]", "optimizer.betas is nan: choose a finite number"),
    ("checkpoint_minutes=-1", "checkpoint_minutes is -1.0: choose 0 or more, or null"),
    ("data.train=5", "data.train is 5: give the path of a UTF-8 text file, or a list of paths"),
    ("data.train=[5]", "data.train is [5]: give the path of a UTF-8 text file, or a list of paths"),
    ("data.workers=many", "data.workers must be a whole number, not 'many'"),
    ("data=stories data.num_train_documents=lots", "data.num_train_documents must be a whole number, not 'lots'"),
    ("data=zipf data.stay=long", "data.stay must be a number, not 'long'"),
    ("data=zipf data.seed=x", "data.seed must be a whole number, not 'x'"),
    ("model=cnn", "pictures and their network need each other: use model=cnn with data=shapes, or neither"),
    ("model=cnn data=shapes data.workers=many", "data.workers is 'many': choose a whole number"),
    ("model=cnn data=shapes data.attributes={shape:[oval]}", "data.attributes.shape is ['oval']: choose among circle"),
    ("--multirun --cfg job", "--multirun and --cfg exclude each other: leave one out"),
    ("--nonesuch", "unknown option --nonesuch; --help lists what there is"),
    ("--cfg nonesuch", "argument --cfg/-c: invalid choice: 'nonesuch'"),
    ("batch_size=0", "batch_size is 0: choose at least 1"),
    ("sequence_length=100000", "lower the batch size or the sequence length"),
    ("model.max_positions=8", "less than sequence_length 16: raise the first or lower the second"),
    ("model.num_heads=3", "hidden_size 16 is not a multiple of num_heads 3: choose"),
    ("budget.steps=null budget.tokens=null", "set budget.epochs, budget.steps, budget.tokens or budget.seconds"),
    ("budget.steps=0", "budget.steps is 0: choose more than 0"),
    ("head=paper head.partition.group_size=0", "group_size is 0: choose between 1 and the vocabulary size 50257"),
    ("head=paper head.partition.group_size=50258", "choose between 1 and the vocabulary size 50257"),
    ("head=paper head.scorer=nonesuch", "choose one of scale_shift, scale_shift_sorted, "),
    ("head=paper head.tied=true", "use head.tied=false or head.scorer=linear_sorted"),
    ("head.label_smoothing=2", "head.label_smoothing is 2.0: choose between 0 (none) and 1"),
    ("head=paper head.scorer=low_rank_sorted head.softcap=30", "head.softcap works with the plain scorers only: use"),
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
    (["--top-k", "0"], "--top-k is 0: choose between 1 and"),
    (["--top-k", "50258"], "--top-k is 50258: choose between 1 and the vocabulary size 50257"),
    (["--top-p", "0"], "top_p is 0.0: choose more than 0 and at most 1"),
    (["--top-p", "1.5"], "top_p is 1.5: choose more than 0 and at most 1"),
    (["--seed", "18446744073709551616"], "--seed is 18446744073709551616: choose 0 or more, at most 2**63 - 1"),
    (["--seed", "-1"], "--seed is -1: choose 0 or more"),
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
    kept = [key for key in TINY if not (key.startswith("data") and "data=" in overrides)]
    assert words in refused(train.main, *kept, *overrides.split())


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
    for damaged in ("seed: [1,", "", "hello", "[" * 10_000):
        (tmp_path / "config.yaml").write_text(damaged)
        assert "config.yaml is damaged" in refused(generate.main, str(tmp_path), "the")


def test_a_configuration_of_aliases_is_refused_before_it_grows(refused: Refused, tmp_path: Path) -> None:
    """Nine lists of nine lists of ...: a few hundred letters that stand for 9 ** 9 words."""
    levels = [f"l{level}: &l{level} [{', '.join(['*l' + str(level - 1)] * 9)}]" for level in range(1, 10)]
    (tmp_path / "config.yaml").write_text("\n".join(["l0: &l0 word", *levels]))
    started = time.monotonic()
    assert "config.yaml holds a YAML alias" in refused(generate.main, str(tmp_path), "the")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["row.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", ["{\n", "[]\n", "{}\n", "\xff\n"])
def test_a_damaged_record_is_named(refused: Refused, workplace: Path, tmp_path: Path, name: str, content: str) -> None:
    run = shutil.copytree(workplace / "run", tmp_path / "run")
    if name == "metrics.jsonl":
        (run / "row.json").unlink()  # else the run counts as finished
    (run / name).write_bytes(content.encode("latin-1"))
    written = refused(train.main, *TINY, f"run_dir={run}")
    assert f"{run / name} is damaged" in written and "delete the run folder and train again" in written


def test_a_tokenizer_of_another_vocabulary_is_refused(refused: Refused, workplace: Path, tmp_path: Path) -> None:
    run = shutil.copytree(workplace / "run", tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("tokenizer: gpt2", "tokenizer: cl100k"))
    written = refused(generate.main, str(run), "the")
    assert "the tokenizer cl100k has 100277 tokens and the model in" in written and "50257" in written


def test_weights_that_are_no_numbers_are_refused(refused: Refused, workplace: Path, tmp_path: Path) -> None:
    run = shutil.copytree(workplace / "run", tmp_path / "run")
    model = load_run(run, torch.device("cpu"))
    next(model.parameters()).data.view(-1)[3] = torch.nan
    save_weights(run, model, weights_metadata(run))
    assert "holds weights that are no finite numbers" in refused(generate.main, str(run), "the")


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no")]
)
def test_too_little_memory_is_one_line(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, workplace: Path, error: Exception
) -> None:
    def starved(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(train, "Trainer", starved)
    assert "out of memory: lower batch_size" in refused(train.main, *TINY, "seed=9")


def test_a_sweep_takes_its_keys_in_any_order_and_names_each_job_that_fails(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    GlobalHydra.instance().clear()
    assert call(train.main, monkeypatch, *TINY, "run_dir=sweep", "--multirun", "batch_size=-1,0") == 2
    written = capfd.readouterr().err
    shutil.rmtree(workplace / "results", ignore_errors=True)  # Hydra writes down a sweep before it launches it
    for size in ("-1", "0"):
        assert re.search(f"^failed: .*batch_size={size} .*: batch_size is {size}: choose at least 1$", written, re.M)
    assert written.endswith("a job of the sweep failed, as told above; the same command runs what has not finished\n")


def test_an_error_begins_below_a_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    def stopped() -> None:
        bar = tqdm(total=3, file=sys.stderr)
        bar.update()
        raise UserError("too far")

    with pytest.raises(SystemExit):
        one_line_errors(stopped)()
    lines = re.split(r"[\r\n]", capfd.readouterr().err)
    assert any(line.endswith(": too far") and "%" not in line for line in lines)


def test_a_reason_is_told_once() -> None:
    cause = UserError("the file is cut short")
    error = UserError(f"cannot unpack a.vfz: {cause}")
    error.__cause__ = cause
    assert one_line(error) == "cannot unpack a.vfz: the file is cut short"


def test_a_reader_that_has_enough_ends_the_program_quietly(tmp_path: Path) -> None:
    program = (
        "from vocabfold.command_line import one_line_errors\n"
        "one_line_errors(lambda: [print('word', flush=True) for _ in range(100_000)])()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_command_lines_without_hydra_do_not_load_it() -> None:
    program = "import sys, vocabfold.command_line; assert 'hydra' not in sys.modules and 'omegaconf' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


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


def test_records_of_an_unknown_experiment_are_refused() -> None:
    with pytest.raises(UserError, match="holds no finished run: train experiment=nonesuch on that text first"):
        records.collect("nonesuch", "stories")


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
    assert capfd.readouterr().err == "interrupted\n"  # not every command goes on from where it was
