"""One training step of Tables 2 and 3 of arXiv 2411.06371, with this project's models or in the paper's own setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.paper.paper_code import HuggingFaceModel, PaperSizes, PostNormGrouped
from vocabfold.heads import HeadSettings
from vocabfold.measure.simulate import TrainingParts
from vocabfold.models.build import ModelSettings, build_model

MODELS = {"gpt2": "GPT-2", "gpt_neo": "GPT-Neo", "grouped": "grouped"}
SETTINGS = {
    "lean": "lean backbone",
    "paper_code": "paper's code",
    "paper_code_unfused": "paper's code, unfused attention",
}


@dataclass(frozen=True)
class Case:
    """One training step: ``setting`` is a key of SETTINGS, ``model`` one of MODELS."""

    setting: str
    model: str
    hidden_size: int
    batch_size: int = 32
    sequence_length: int = 512
    vocabulary_size: int = 50_257
    num_layers: int = 8
    num_heads: int = 8

    def build(self, device: torch.device | str = "cpu") -> TrainingParts:
        """The model, its optimizer and its loss on random tokens."""
        shape = (self.batch_size, self.sequence_length + (self.setting == "lean"))
        tokens = torch.randint(self.vocabulary_size, shape, device=device)
        with torch.device(device):
            module, loss = self.lean_model(tokens) if self.setting == "lean" else self.paper_model(tokens)
        return module.train(), torch.optim.Adam(module.parameters(), foreach=True), loss

    def lean_model(self, tokens: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
        """This project's backbone, fused attention, no dropout; ``grouped`` on GPT-2."""
        sizes = ModelSettings(
            attention="gpt_neo" if self.model == "gpt_neo" else "gpt2",
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            max_positions=self.sequence_length,
        )
        folded, full = HeadSettings("paper", "folded", tied=False), HeadSettings("full", "full", tied=True)
        head = folded if self.model == "grouped" else full
        module = build_model(sizes, head, self.vocabulary_size)
        return module, lambda: module(tokens[:, :-1], tokens[:, 1:]).loss

    def paper_model(self, tokens: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
        """Hugging Face's modules, and the paper's own encoder under the grouped head."""
        fused = self.setting == "paper_code"
        sizes = PaperSizes(
            self.hidden_size, self.vocabulary_size + 1, self.num_layers, self.num_heads, self.sequence_length
        )
        module: nn.Module
        if self.model == "grouped":
            module = PostNormGrouped(sizes, fused)
        else:
            module = HuggingFaceModel(self.model, sizes, fused and self.model == "gpt2")
        return module, lambda: module(tokens)
