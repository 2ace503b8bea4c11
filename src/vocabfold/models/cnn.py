"""The convolutional network of arXiv 2411.06371's image study: pictures in, hidden states out, no head."""

from __future__ import annotations

from torch import Tensor, nn

from vocabfold.errors import UserError

FIRST_CHANNELS = 32


class CNN(nn.Module):
    """Pictures [B, 3, side, side] uint8 -> hidden [B, D].

    ``num_layers`` 3 x 3 convolutions (padding 1) of 32, 64, 128 ... channels, each with batch norm, ReLU and 2 x 2 max
    pooling, then one linear layer to D and ReLU. Published: three layers, side 100, so 18,432 numbers go into 512.
    Raises UserError where a side that has been halved ``num_layers`` times is nothing.
    """

    def __init__(self, hidden_size: int, num_layers: int, image_size: int) -> None:
        super().__init__()
        side = image_size >> num_layers
        if num_layers < 1 or side < 1:
            raise UserError(
                f"pictures of side {image_size} cannot be halved {num_layers} times: lower model.num_layers"
            )
        layers: list[nn.Module] = []
        channels = 3
        for layer in range(num_layers):
            wider = FIRST_CHANNELS << layer
            convolution = nn.Conv2d(channels, wider, kernel_size=3, padding=1)
            layers += [convolution, nn.BatchNorm2d(wider), nn.ReLU(), nn.MaxPool2d(2)]
            channels = wider
        self.convolutions = nn.Sequential(*layers)
        self.output = nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, hidden_size), nn.ReLU())

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, side, side] uint8 -> [B, D]."""
        # Scaled here: bytes are a quarter of the traffic from the workers to the device.
        return self.output(self.convolutions(pictures.to(next(self.parameters()).dtype) / 255))
