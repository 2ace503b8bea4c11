"""Every claim of the papers, with the function that compares it with our tables. report.py writes them down."""

from __future__ import annotations

from experiments.claims import (
    caching_guide,
    cost,
    image_study,
    largest_budget,
    quality,
    story_quality,
    tensor_gpt,
    two_forms,
)
from experiments.claims.base import Source

SOURCES = (
    Source(
        "LLM Vocabulary Compression for Low-Compute Environments",
        "https://arxiv.org/abs/2411.06371",
        (
            *largest_budget.CLAIMS,
            *cost.CLAIMS,
            *quality.CLAIMS,
            story_quality.CLAIM,
            two_forms.CLAIM,
            *image_study.CLAIMS,
        ),
    ),
    Source("TensorGPT", "https://arxiv.org/abs/2307.00526", tensor_gpt.CLAIMS),
    Source("A guide to token compression and caching", "", caching_guide.CLAIMS),
)
