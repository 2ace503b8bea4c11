"""From settings to a model: a backbone (tokens to hidden states) and a head (hidden states to a distribution)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vocabfold.heads import Head, HeadLoss, HeadSettings, build_head
from vocabfold.models.gpt import GPT, GPTConfig


@dataclass
class ModelSettings:
    """One node of conf/model."""

    name: str = "gpt2"
    attention: str = "gpt2"
    hidden_size: int = 128
    num_layers: int = 8
    num_heads: int = 8
    max_positions: int = 512
    window: int = 256
    dropout: float = 0.0


class ModelWithHead(nn.Module):
    """A backbone whose hidden states [..., D] a head turns into a loss."""

    def __init__(self, backbone: GPT, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, inputs: Tensor, targets: Tensor, with_accuracy: bool = False) -> HeadLoss:
        """``inputs`` and ``targets`` [B, T] -> the head's loss over N = B x T positions."""
        hidden = self.backbone(inputs)
        return self.head(hidden.flatten(0, -2), targets.flatten(), with_accuracy)


def build_model(
    model: ModelSettings, head: HeadSettings, vocabulary_size: int, order: Tensor | None = None
) -> ModelWithHead:
    """A model with fresh weights from torch's global generator; ``order`` as in ``build_head``.

    Raises UserError for impossible settings.
    """
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
