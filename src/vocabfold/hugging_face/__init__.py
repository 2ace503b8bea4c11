"""Finished causal language models of Hugging Face's transformers, decoded from fewer bytes without changing a token.

model, tokenizer = load(FOLDER_OR_GGUF)
head = screen(model)
ids = generate(model, head, tokenizer("Once upon a time", return_tensors="pt").input_ids, max_new_tokens=100)
"""

from vocabfold.hugging_face.decoding import custom_generate, generate
from vocabfold.hugging_face.embedding import compress_embedding
from vocabfold.hugging_face.models import load, screen
from vocabfold.hugging_face.pretrained import pretrained
from vocabfold.hugging_face.screened_head import ScreenedHead
from vocabfold.hugging_face.screened_state import Counts

__all__ = [
    "Counts",
    "ScreenedHead",
    "compress_embedding",
    "custom_generate",
    "generate",
    "load",
    "pretrained",
    "screen",
]
