"""Corpora from their configurations: each kind loads, and what is wrong is said in one line."""

from __future__ import annotations

import gzip
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from vocabfold.data.corpora import Corpus, load_corpus, load_for_generation
from vocabfold.data.sources import wikitext_articles
from vocabfold.data.token_file import TokenFile
from vocabfold.data.tokenizer import load_tokenizer
from vocabfold.data.zipf import entropy_rate_nats, zipf_law, zipf_tokens
from vocabfold.errors import UserError

CONF = Path(__file__).parents[1] / "conf" / "data"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VOCABFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def configured(name: str, **overrides: Any) -> dict[str, Any]:
    """The committed configuration, resolved as train.py does, with overrides."""
    resolved = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=True)
    assert isinstance(resolved, dict)
    unknown = set(overrides) - set(resolved)
    assert not unknown, f"{unknown} are not keys of {name}.yaml"
    return {**{str(key): value for key, value in resolved.items()}, **overrides}


def texts(tokens: TokenFile) -> list[str]:
    tokenizer = load_tokenizer("gpt2")
    starts = tokens.document_starts.astype(int)
    documents = [tokens.tokens[start:stop].tolist() for start, stop in pairwise(starts)]
    assert all(document[-1] == tokenizer.end_token for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


@pytest.fixture
def text_data(cache: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "train.txt").write_text(
        "One day.\nIt rained.\n<|endoftext|>\nTwo <|endoftext|> inline.\n\n<|endoftext|>\n"
    )
    (tmp_path / "valid.txt").write_text("No separator here,\nso one document.\n")
    return configured("text", train=str(tmp_path / "train.txt"), valid=str(tmp_path / "valid.txt"))


def test_text(text_data: dict[str, Any]) -> None:
    corpus = load_corpus(text_data)
    assert texts(corpus.train) == ["One day.\nIt rained.", "Two <|endoftext|> inline."]
    assert texts(corpus.valid) == ["No separator here,\nso one document."]
    assert (corpus.name, corpus.vocabulary_size, corpus.end_token) == ("text", 50257, 50256)
    assert corpus.tokenizer is not None and corpus.entropy_rate_nats is None
    text_bytes = len("No separator here,\nso one document.")  # the end token is a token of no bytes
    assert corpus.valid_bytes_per_token == pytest.approx(text_bytes / len(corpus.valid))


def test_text_with_windows_line_ends_and_byte_order_mark(text_data: dict[str, Any]) -> None:
    Path(text_data["train"]).write_bytes(b"\xef\xbb\xbfOne.\r\n<|endoftext|>\r\nTwo.\r\n")
    assert texts(load_corpus(text_data).train) == ["One.", "Two."]


def test_text_lists_globs_and_gzip(text_data: dict[str, Any], tmp_path: Path) -> None:
    for name in ("b", "a"):
        with gzip.open(tmp_path / f"part-{name}.txt.gz", "wt") as out:
            out.write(f"file {name}")
    text_data["train"] = OmegaConf.create([text_data["valid"], f"{tmp_path}/part-*.gz"])
    found = texts(load_corpus(text_data).train)
    assert found == ["No separator here,\nso one document.", "file a", "file b"]


def test_cache_follows_content_not_path(text_data: dict[str, Any], tmp_path: Path) -> None:
    first = load_corpus(text_data).train.folder
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(text_data["train"]).read_bytes())
    assert load_corpus({**text_data, "train": str(copy)}).train.folder == first
    copy.write_bytes(copy.read_bytes().replace(b"One", b"Odd"))
    changed = load_corpus({**text_data, "train": str(copy)}).train
    assert changed.folder != first and texts(changed)[0].startswith("Odd")
    assert load_corpus({**text_data, "tokenizer": "cl100k"}).train.folder != first


def write_bad(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_text_errors(text_data: dict[str, Any], tmp_path: Path) -> None:
    cases = [
        (None, r"data=text needs data\.train=FILE and data\.valid=FILE"),
        (tmp_path / "nowhere.txt", "there is no file"),
        (f"{tmp_path}/*.nothing", "there is no file"),
        (tmp_path, "is a folder"),
        (write_bad(tmp_path / "latin.txt", "line\ncafé".encode("latin-1")), "not UTF-8 at byte 8"),
        (write_bad(tmp_path / "empty.txt", b"\n<|endoftext|>\n \n"), "holds no text"),
        (write_bad(tmp_path / "cut.gz", gzip.compress(b"text" * 1000)[:-9]), "to its end"),
        (write_bad(tmp_path / "not.gz", b"plain"), "to its end"),
    ]
    for value, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            load_corpus({**text_data, "train": value and str(value)})
        assert "\n" not in str(caught.value)


def test_a_file_in_both_splits_is_told_once(
    text_data: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load_corpus(text_data)
    assert capfd.readouterr().err == ""
    copy = tmp_path / "copy.txt"
    copy.write_bytes((tmp_path / "valid.txt").read_bytes())
    load_corpus(text_data | {"train": [text_data["train"], str(copy)]})
    written = capfd.readouterr().err
    assert written.count("\n") == 1 and "data.train and data.valid hold the same file" in written


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("text", "valid", 5, "data.valid is 5: give the path"),
        ("text", "workers", 1.5, "data.workers must be a whole number, not 1.5"),
        ("text", "workers", 0, "data.workers must be 1 or more, not 0"),
        ("stories", "num_valid_documents", "lots", "data.num_valid_documents must be a whole number, not 'lots'"),
        ("stories", "seed", True, "data.seed must be a whole number, not True"),
        ("zipf", "exponent", "steep", "data.exponent must be a number, not 'steep'"),
        ("zipf", "num_train_tokens", "many", "data.num_train_tokens must be a whole number, not 'many'"),
        ("tinystories", "max_train_documents", "all", "data.max_train_documents must be a whole number, not 'all'"),
    ],
)
def test_a_value_of_another_type_is_refused(
    text_data: dict[str, Any], name: str, key: str, value: object, words: str
) -> None:
    data = text_data if name == "text" else configured(name)
    with pytest.raises(UserError, match=re.escape(words)):
        load_corpus(data | {key: value})


def test_missing_validation_file_costs_no_tokenising(text_data: dict[str, Any], cache: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        load_corpus({**text_data, "valid": "nowhere.txt"})
    assert not cache.exists()


def test_unknown_names(text_data: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="stories, text, tinystories, wikitext, zipf"):
        load_corpus({**text_data, "name": "books"})
    with pytest.raises(UserError, match="gpt2, cl100k"):
        load_corpus({**text_data, "tokenizer": "words"})
    with pytest.raises(UserError, match="workers"):
        load_corpus({**text_data, "workers": 0})


def test_stories(cache: Path) -> None:
    from vocabfold.data.stories import stories

    corpus = load_corpus(configured("stories", num_train_documents=12, num_valid_documents=5, seed=3))
    assert texts(corpus.train) == list(stories(3, 0, 12))
    assert texts(corpus.valid) == list(stories(3, 12, 17))
    with pytest.raises(UserError, match="num_valid_documents"):
        load_corpus(configured("stories", num_valid_documents=0))


def test_zipf(cache: Path) -> None:
    data = configured("zipf", vocabulary_size=100_000, num_train_tokens=1_500_000, num_valid_tokens=3000)
    corpus = load_corpus(data)
    assert (len(corpus.train), len(corpus.valid)) == (1_500_000, 3000)
    assert corpus.train.tokens.dtype == np.uint32 and corpus.train.document_starts.tolist() == [0, 1_500_000]
    assert corpus.tokenizer is None and corpus.end_token is None and corpus.vocabulary_size == 100_000
    assert corpus.valid_bytes_per_token is None
    law = zipf_law(100_000)
    assert corpus.entropy_rate_nats == entropy_rate_nats(law)
    np.testing.assert_array_equal(corpus.train.tokens, np.concatenate(list(zipf_tokens(law, 1_500_000))))
    assert not np.array_equal(corpus.train.tokens[:3000], corpus.valid.tokens)
    with pytest.raises(UserError, match="num_valid_tokens"):
        load_corpus({**data, "num_valid_tokens": 0})
    assert load_corpus({**data, "stay": 0.5}).train.folder != corpus.train.folder
    assert math.isclose(load_corpus(data).entropy_rate_nats or 0.0, corpus.entropy_rate_nats)


STORIES = {"train": ["First story.", "Second\nstory.", "Third."], "validation": ["Held out.", None]}


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    for split, rows in STORIES.items():
        (tmp_path / "set").mkdir(exist_ok=True)
        pd.DataFrame({"text": rows}).to_parquet(tmp_path / "set" / f"{split}-00000.parquet")
    return tmp_path / "set"


def load_local(source: Path, name: str = "tinystories", **overrides: Any) -> Corpus:
    return load_corpus(configured(name, source=str(source), config_name=None, **overrides))


def test_tinystories_from_a_folder(cache: Path, parquet_folder: Path) -> None:
    corpus = load_local(parquet_folder)
    assert texts(corpus.train) == STORIES["train"]
    assert texts(corpus.valid) == ["Held out."]
    assert texts(load_local(parquet_folder, max_train_documents=2).train) == STORIES["train"][:2]


def test_tinystories_from_one_parquet_file(cache: Path, parquet_folder: Path) -> None:
    corpus = load_local(parquet_folder / "train-00000.parquet", train_split="train[:2]", valid_split="train[2:]")
    assert texts(corpus.train) == STORIES["train"][:2]
    assert texts(corpus.valid) == ["Third."]


def test_data_set_settings_that_do_not_fit(cache: Path, parquet_folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.text_column to one of text"):
        load_local(parquet_folder, text_column="story")
    with pytest.raises(UserError, match="cannot load the data set"):
        load_local(parquet_folder, train_split="practice")


WIKI_LINES = """
 = Robert Boulter =

 Robert is an actor .

 = = Career = =

 He acted .
 = not a heading =
 He wrote .

 = Du Fu =

 Du Fu was a poet ."""


def test_wikitext(cache: Path, tmp_path: Path) -> None:
    """As published: a line a row, the newline kept, blank rows empty."""
    rows = [line and line + " \n" for line in WIKI_LINES.split("\n")]
    (tmp_path / "wiki").mkdir()
    for split in ("train", "validation"):
        pd.DataFrame({"text": rows}).to_parquet(tmp_path / "wiki" / f"{split}.parquet")
    first, second = texts(load_local(tmp_path / "wiki", "wikitext").train)
    assert first.startswith(" = Robert Boulter = \n\n Robert is") and first.endswith(" He wrote . ")
    assert " = = Career = = \n" in first and " = not a heading = \n" in first
    assert second == " = Du Fu = \n\n Du Fu was a poet . "
    assert len(texts(load_local(tmp_path / "wiki", "wikitext", max_train_documents=1).train)) == 1


def test_wikitext_without_headings_is_one_article() -> None:
    assert list(wikitext_articles(["some \n", "", "text \n"])) == ["some \n\ntext "]
    assert list(wikitext_articles(["", " \n"])) == []
    assert list(wikitext_articles([" \n", " = Du Fu = \n"])) == [" = Du Fu = "]


def test_data_set_out_of_reach(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("tinystories", "wikitext"):
        with pytest.raises(UserError, match=r"cannot load the data set .*data\.source=FOLDER.*data=text") as caught:
            load_corpus(configured(name, source="vocabfold-tests/no-such-data-set"))
        assert "\n" not in str(caught.value)


def test_generation_needs_no_corpus(cache: Path) -> None:
    for name in ("stories", "text", "tinystories", "wikitext"):
        assert load_for_generation(configured(name)) is load_tokenizer("gpt2")
    assert load_for_generation(configured("zipf")) is None
    assert not cache.exists()


def test_cache_folder_without_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VOCABFOLD_CACHE", raising=False)
    for path in CONF.glob("*.yaml"):
        if path.stem in ("stories", "text", "tinystories", "wikitext", "zipf"):
            assert configured(path.stem)["cache_dir"] == "~/.cache/vocabfold"
            assert path.read_text().startswith("# python -m vocabfold.train data=")
