"""From settings to a model: a backbone (tokens or pictures to hidden states) and a head (these to a distribution)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from vocabfold.embeddings import (
    DenseEmbedding,
    EmbeddingSettings,
    TokenEmbedding,
    build_embedding,
    compress_table,
    relative_error,
)
from vocabfold.errors import UserError
from vocabfold.heads import Head, HeadLoss, HeadSettings, build_head
from vocabfold.models.cnn import CNN
from vocabfold.models.gpt import GPT, GPTConfig


@dataclass
class ModelSettings:
    """One node of conf/model. A model of pictures (``image_size`` is their side) has a hidden size and a number of
    layers; the other sizes are those of a model of tokens."""

    name: str = "gpt2"
    attention: str = "gpt2"
    hidden_size: int = 128
    num_layers: int = 8
    num_heads: int = 8
    max_positions: int = 512
    window: int = 256
    dropout: float = 0.0
    image_size: int | None = None


class ModelWithHead(nn.Module):
    """A backbone whose hidden states [..., D] a head turns into a loss."""

    def __init__(self, backbone: GPT | CNN, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(
        self, inputs: Tensor, targets: Tensor, with_accuracy: bool = False, with_exact_accuracy: bool = False
    ) -> HeadLoss:
        """``inputs`` and ``targets`` [B, T] -> the head's loss over N = B x T positions; pictures [B, 3, side, side]
        and targets [B] -> N = B.

        ``with_exact_accuracy`` adds the part ``accuracy`` for every head; a folded one may have to visit many groups.
        """
        hidden, targets = self.backbone(inputs).flatten(0, -2), targets.flatten()
        output: HeadLoss = self.head(hidden, targets, with_accuracy)
        if with_exact_accuracy and "accuracy" not in output.parts:
            output.parts["accuracy"] = self.head.accuracy(hidden, targets)
        return output

    @property
    def gpt(self) -> GPT:
        """The backbone of a language model. Raises UserError for a model that reads pictures."""
        if not isinstance(self.backbone, GPT):
            raise UserError("this model reads pictures, and text is wanted: name the run of a language model")
        return self.backbone

    @property
    def embedding(self) -> TokenEmbedding | None:
        """What turns tokens into vectors; None in a model that reads pictures."""
        return self.backbone.token_embedding if isinstance(self.backbone, GPT) else None

    def prepare_for_inference(self) -> None:
        """Take the form in which a finished model is kept: see TokenEmbedding.prepare_for_inference."""
        if self.embedding is not None:
            self.embedding.prepare_for_inference()

    @property
    def num_parameters(self) -> int:
        """Numbers that a finished model keeps, a shared one once."""
        own = {id(parameter) for parameter in self.embedding.parameters()} if self.embedding is not None else set()
        others = sum(parameter.numel() for parameter in self.parameters() if id(parameter) not in own)
        return others + (self.embedding.num_parameters if self.embedding is not None else 0)

    @property
    def bytes_at_rest(self) -> int:
        """Bytes that a finished model keeps, a shared tensor once."""
        kept = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in self.state_dict().values()}
        if self.embedding is None:
            return sum(kept.values())
        own = {tensor.data_ptr() for tensor in self.embedding.state_dict().values()}
        return self.embedding.bytes_at_rest + sum(size for place, size in kept.items() if place not in own)

    def take_over(self, other: ModelWithHead, settings: EmbeddingSettings) -> float:
        """Become ``other``, a model with a dense embedding, in place, but with that embedding compressed; return the
        relative error of its rows.

        Raises UserError where ``other`` is of another shape, has no dense embedding, or lends its rows to its head.
        """
        table = other.embedding
        if not isinstance(table, DenseEmbedding):
            raise UserError("the embedding is compressed already: name a run with a dense one")
        state = other.state_dict()
        if settings.name != "dense":
            prefix = "backbone.token_embedding."
            state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
            if table.weight.data_ptr() in {tensor.data_ptr() for tensor in state.values()}:
                raise UserError(
                    "the head borrows the embedding's rows, which would have to stay: compress a run with "
                    "head.tied=false"
                )
            self.gpt.token_embedding = compress_table(settings, table.weight.detach())
        try:
            self.load_state_dict(state, strict=settings.name == "dense")
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the model to take over is another one ({reason})") from error
        return relative_error(self.gpt.token_embedding, table.weight)


def build_model(
    model: ModelSettings,
    head: HeadSettings,
    vocabulary_size: int,
    order: Tensor | None = None,
    embedding: EmbeddingSettings | None = None,
    counts: Tensor | None = None,
) -> ModelWithHead:
    """A model with fresh weights from torch's global generator; ``order`` and ``counts`` as in ``build_head``;
    ``embedding`` None is a dense one.

    Raises UserError for impossible settings.
    """
    if model.image_size is not None:
        # Pictures have no input embedding: one without rows says so to a head that would borrow them.
        no_rows = nn.Embedding(0, model.hidden_size)
        pictures = CNN(model.hidden_size, model.num_layers, model.image_size)
        return ModelWithHead(pictures, build_head(head, vocabulary_size, no_rows, order))
    config = GPTConfig(
        vocabulary_size=vocabulary_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        max_positions=model.max_positions,
        attention=model.attention,
        window=model.window,
        dropout=model.dropout,
    )
    backbone = GPT(config, build_embedding(embedding or EmbeddingSettings(), vocabulary_size, model.hidden_size))
    # A head reads the sizes of any embedding, and asks before it borrows the rows of a dense one.
    rows = cast(nn.Embedding, backbone.token_embedding)
    return ModelWithHead(backbone, build_head(head, vocabulary_size, rows, order, counts))
