"""What the server of tests/process_cases.py imports once, so that the processes forked from it need not."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import tiktoken  # noqa: F401
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401

import head_cases  # noqa: F401
import vocabfold.train  # noqa: F401
