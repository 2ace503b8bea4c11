"""What decoding need not compute twice: keys and values, beginnings of texts, whole answers."""

from vocabfold.inference.prefixes import PrefixCache
from vocabfold.inference.quantised import LAYER_CACHES, bytes_a_position
from vocabfold.inference.reader import KEY_VALUE_CACHES, Reader
from vocabfold.inference.responses import ResponseCache, fingerprint

__all__ = [
    "KEY_VALUE_CACHES",
    "LAYER_CACHES",
    "PrefixCache",
    "Reader",
    "ResponseCache",
    "bytes_a_position",
    "fingerprint",
]
