"""Token ids to vectors. The contract is ``TokenEmbedding``; ``build_embedding`` makes the one that settings name."""

from vocabfold.embeddings.base import DenseEmbedding, TokenEmbedding, relative_error
from vocabfold.embeddings.build import EmbeddingSettings, build_embedding, compress_table
from vocabfold.embeddings.low_rank import LowRankEmbedding
from vocabfold.embeddings.mixed import MixedEmbedding
from vocabfold.embeddings.quantized import QuantizedEmbedding
from vocabfold.embeddings.tensor_train import TensorTrainEmbedding
from vocabfold.embeddings.tt_matrix import TTMatrixEmbedding

__all__ = [
    "DenseEmbedding",
    "EmbeddingSettings",
    "LowRankEmbedding",
    "MixedEmbedding",
    "QuantizedEmbedding",
    "TTMatrixEmbedding",
    "TensorTrainEmbedding",
    "TokenEmbedding",
    "build_embedding",
    "compress_table",
    "relative_error",
]
