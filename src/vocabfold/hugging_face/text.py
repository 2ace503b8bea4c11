"""A finished model of transformers as a coder of texts: ``python -m vocabfold.compress FILE --model PATH``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from vocabfold.data.tokenizer import Tokenizer
from vocabfold.hugging_face.byte_tokens import ByteTokens
from vocabfold.hugging_face.models import load
from vocabfold.hugging_face.pretrained import MAX_POSITIONS, pretrained
from vocabfold.inference.text_file import TextModel, text_model

ROWS = 16  # side by side: a step reads the weights once for all of them
ROW_TOKENS = 512  # a row begins without a context, so a short text has fewer


def text_model_of(model: Any, tokenizer: Any, max_positions: int = MAX_POSITIONS) -> TextModel:
    """``model`` and its byte-level ``tokenizer``. Raises UserError for models and tokenizers that code no text."""
    ours = pretrained(model, max_positions)
    # It has what coders ask of a Tokenizer.
    tokens = cast(Tokenizer, ByteTokens(tokenizer, ours.head.vocabulary_size))
    return text_model(ours, tokens, ROWS, ROW_TOKENS)


def load_text_model(path: Path) -> TextModel:
    """The model in a folder or GGUF file. Raises UserError where there is none."""
    return text_model_of(*load(path))
