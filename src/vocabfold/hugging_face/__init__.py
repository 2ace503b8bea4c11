"""Causal language models of Hugging Face's transformers with a cheaper vocabulary.

Finished ones, decoded from fewer bytes without changing a token:

model, tokenizer = load(FOLDER_OR_GGUF)
head = screen(model)
ids = generate(model, head, tokenizer("Once upon a time", return_tensors="pt").input_ids, max_new_tokens=100)

Those that are still to be trained, with a folded head in place of their output layer:

model = fold(model, training_tokens)

Importing this makes transformers' Auto classes read folders of folded models.
"""

import importlib.util

from vocabfold.hugging_face.decoding import custom_generate, generate
from vocabfold.hugging_face.embedding import compress_embedding
from vocabfold.hugging_face.fold import fold, unfold
from vocabfold.hugging_face.models import load, screen
from vocabfold.hugging_face.pretrained import pretrained
from vocabfold.hugging_face.screened_head import ScreenedHead
from vocabfold.hugging_face.screened_state import Counts

if importlib.util.find_spec("transformers") is not None:
    importlib.import_module("vocabfold.hugging_face.folded_model")

__all__ = [
    "Counts",
    "ScreenedHead",
    "compress_embedding",
    "custom_generate",
    "fold",
    "generate",
    "load",
    "pretrained",
    "screen",
    "unfold",
]
