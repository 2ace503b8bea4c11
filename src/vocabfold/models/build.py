"""From settings to a model: a backbone (tokens or pictures to hidden states) and a head (these to a distribution)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

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


def build_model(
    model: ModelSettings, head: HeadSettings, vocabulary_size: int, order: Tensor | None = None
) -> ModelWithHead:
    """A model with fresh weights from torch's global generator; ``order`` as in ``build_head``.

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
    backbone = GPT(config)
    return ModelWithHead(backbone, build_head(head, vocabulary_size, backbone.token_embedding, order))
