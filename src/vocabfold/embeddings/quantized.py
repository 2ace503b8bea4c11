"""Rows in 8 or 4 bits: symmetric whole numbers times one scale for each group of columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocabfold.embeddings.base import TokenEmbedding, table_shape
from vocabfold.errors import UserError

LARGEST_CODE = {8: 127, 4: 7}


class QuantizedEmbedding(TokenEmbedding):
    """Entry = code * scale, codes of ``bits`` 8 or 4 (two a byte), a bfloat16 scale for ``group_size`` columns (None:
    the whole row).

    It trains in float32 (``weight`` [V, D]) with rounded lookups whose gradient passes straight through to the
    weight; ``prepare_for_inference`` leaves the codes only, and changes no lookup. Raises UserError for
    other bits, for groups that do not divide D, and for 4 bits with an odd D.
    """

    codes: Tensor | None
    scales: Tensor | None
    weight: nn.Parameter | None

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int, group_size: int | None = None) -> None:
        super().__init__()
        if bits not in LARGEST_CODE:
            raise UserError(f"embedding.bits is {bits}: choose 8 or 4")
        group_size = embedding_dim if group_size is None else group_size
        if group_size < 1 or embedding_dim % group_size:
            raise UserError(
                f"embedding.group_size is {group_size}: choose a divisor of the hidden size {embedding_dim}"
            )
        if bits == 4 and embedding_dim % 2:
            raise UserError(f"int4 keeps two columns in a byte, and {embedding_dim} is odd: use embedding=int8")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.bits, self.group_size = bits, group_size
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))
        # The two codes in each value of a byte, the lower half first.
        byte = torch.arange(256)
        self.pairs: Tensor
        self.register_buffer("pairs", torch.stack([byte & 15, byte >> 4], dim=1).float() - 8, persistent=False)
        self.register_buffer("codes", None)
        self.register_buffer("scales", None)
        self.draw(1.0)

    @torch.no_grad()
    def draw(self, std: float) -> None:
        """See TokenEmbedding. Raises UserError for one prepared for inference."""
        if self.weight is None:
            raise UserError("an embedding prepared for inference does not train any more: build another")
        self.weight.normal_(std=std)

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``rows`` [N, D] -> codes [N, D / group, group] (whole, float32), scales [N, D / group] (bfloat16)."""
        groups = rows.unflatten(1, (-1, self.group_size)).float()
        largest = LARGEST_CODE[self.bits]
        # The codes fit the scale as it is kept: rounding it costs nothing but a slightly wider step.
        scales = (groups.abs().amax(dim=2) / largest).bfloat16()
        steps = scales.float().unsqueeze(2)
        codes = (groups / torch.where(steps > 0, steps, 1.0)).round().clamp(-largest, largest)
        return codes, scales

    @staticmethod
    def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
        """codes [N, D / group, group], scales [N, D / group] -> [N, D] float32."""
        return (codes.float() * scales.float().unsqueeze(2)).flatten(1)

    def look_up(self, ids: Tensor) -> Tensor:
        """See TokenEmbedding."""
        flat = ids.flatten()
        if self.weight is not None:
            rows = F.embedding(flat, self.weight)
            rounded = self.dequantize(*self.quantize(rows.detach())).to(rows.dtype)
            # The value is the rounded one to the last bit; the gradient is that of ``rows``.
            vectors = rounded + (rows - rows.detach())
        else:
            assert self.codes is not None and self.scales is not None
            codes = self.codes.index_select(0, flat)
            vectors = F.embedding(codes.int(), self.pairs).flatten(1) if self.bits == 4 else codes.float()
            # As dequantize, in the place of the codes: a lookup is as fast as its bytes are few.
            vectors.unflatten(1, (-1, self.group_size)).mul_(self.scales.index_select(0, flat).float().unsqueeze(2))
        return vectors.view(*ids.shape, self.embedding_dim)

    @torch.no_grad()
    def prepare_for_inference(self) -> None:
        """Keep codes [V, D] int8, or [V, D / 2] uint8 for 4 bits, and scales; drop the float32 weight."""
        if self.weight is None:
            return
        codes, self.scales = self.quantize(self.weight)
        whole = codes.flatten(1).to(torch.int8)
        if self.bits == 4:
            low, high = (whole + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
            whole = low | high << 4
        self.codes = whole
        self.weight = None

    def stored(self) -> list[Tensor]:
        """See TokenEmbedding. Before settling: tensors without data that are as large."""
        if self.weight is None:
            return super().stored()
        count, size = self.num_embeddings, self.embedding_dim
        codes = (count, size // 2, torch.uint8) if self.bits == 4 else (count, size, torch.int8)
        scales = torch.empty(count, size // self.group_size, dtype=torch.bfloat16, device="meta")
        return [torch.empty(codes[:2], dtype=codes[2], device="meta"), scales]

    @property
    def num_parameters(self) -> int:
        """See TokenEmbedding. Two codes of 4 bits are two numbers."""
        return self.num_embeddings * (self.embedding_dim + self.embedding_dim // self.group_size)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, bits: int, group_size: int | None = None) -> QuantizedEmbedding:
        """``weight`` [V, D], to be trained further or prepared for inference."""
        embedding = cls(*table_shape(weight), bits, group_size)
        assert embedding.weight is not None
        embedding.weight.copy_(weight)
        return embedding
