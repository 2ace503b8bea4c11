"""Tables 2 and 3 of arXiv 2411.06371 measured on a card: whole training steps and forward passes, and their memory.

8 layers, 8 heads, 32 sequences of 512 tokens, AdamW in one pass, gradients clipped, in float32 as published and with
bfloat16 products. ``no_head`` is the same backbone with a head that costs nothing: no head can be faster or leaner.
``captured`` steps are recorded as a CUDA graph once and replayed, so that the host launches nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from experiments.cards.bench import Case, Plan, Work, built_on, captured, measure_cases
from experiments.cards.card_heads import FOLDED, FULL, PAPER, SETTINGS, WIDE, zipf_tokens
from experiments.cards.rows import Rows
from experiments.paper import paper_tables
from vocabfold.errors import UserError
from vocabfold.models.build import ModelSettings, ModelWithHead, build_model

KEYS = ("vocabulary_size", "hidden_size", "batch_size", "sequence_length", "precision", "side", "mode", "pass")
OWN = ("num_parameters", "tokens_per_second")
FULL_NEO, TIED, NO_HEAD, TIED_WIDE = "full_neo", "folded_tied", "no_head", "folded_tied_wide"
LEAN = (NO_HEAD, FOLDED, FULL, PAPER, TIED, TIED_WIDE, FULL_NEO)  # in the order of their value
CAPTURED_SIDES = (NO_HEAD, FOLDED, TIED, TIED_WIDE, FULL, PAPER)
PAPER_CODE = {f"paper_code_{model}": model for model in ("grouped", "gpt2", "gpt_neo")}
WORDS = {
    NO_HEAD: "no head",
    FOLDED: "linear, sees its group",
    TIED: "linear, sees its group, tied",
    TIED_WIDE: "head=folded",
    PAPER: "paper's head",
    FULL: "GPT-2, full",
    FULL_NEO: "GPT-Neo, full",
    "paper_code_grouped": "paper's code: grouped",
    "paper_code_gpt2": "paper's code: GPT-2",
    "paper_code_gpt_neo": "paper's code: GPT-Neo",
}
HEADS = {
    FULL: replace(SETTINGS[FULL], tied=True),
    FULL_NEO: replace(SETTINGS[FULL], tied=True),
    NO_HEAD: replace(SETTINGS[FULL], tied=True),  # no rows of its own
    PAPER: replace(SETTINGS[PAPER], init_std=0.02),
    FOLDED: SETTINGS[FOLDED],
    TIED: replace(SETTINGS[FOLDED], tied=True),
    TIED_WIDE: replace(SETTINGS[WIDE], tied=True),
}
FP32, BF16 = "fp32", "bf16"
EAGER, CAPTURED = "eager", "captured"
STEP, FORWARD = "training step", "forward"
VOCABULARY_SIZE = 50_257


@dataclass(frozen=True)
class Sizes:
    """Of a model and its batch."""

    hidden_size: int
    batch_size: int = 32
    sequence_length: int = 512
    vocabulary_size: int = VOCABULARY_SIZE
    num_layers: int = 8
    num_heads: int = 8

    def model(self, attention: str = "gpt2") -> ModelSettings:
        """For build_model."""
        return ModelSettings(
            attention=attention,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            max_positions=self.sequence_length,
        )

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.sequence_length

    def text(self, device: torch.device) -> Tensor:
        """Inputs and targets [B, T + 1]."""
        tokens = zipf_tokens(self.tokens + self.batch_size, self.vocabulary_size, device)
        return tokens.view(self.batch_size, self.sequence_length + 1)


Loss = Callable[[], Tensor]


def lean_loss(side: str, sizes: Sizes, device: torch.device) -> tuple[nn.Module, Loss, bool]:
    """(this project's model, its loss on one batch, whether a step of it can be captured)."""
    tokens = sizes.text(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    settings = sizes.model("gpt_neo" if side == FULL_NEO else "gpt2")

    def build() -> ModelWithHead:
        return build_model(settings, HEADS[side], sizes.vocabulary_size)

    model = built_on(device, build).train()
    if side == NO_HEAD:
        return model, lambda: model.backbone(inputs).float().mean(), True
    capturable = bool(getattr(model.head, "capturable", side == FULL))
    return model, lambda: model(inputs, targets).loss, capturable


def published_loss(side: str, sizes: Sizes, device: torch.device) -> tuple[nn.Module, Loss, bool]:
    """The same of the paper's own code, on as many tokens and one for padding."""
    case = paper_tables.Case(
        "paper_code",
        PAPER_CODE[side],
        sizes.hidden_size,
        sizes.batch_size,
        sizes.sequence_length,
        sizes.vocabulary_size,
        sizes.num_layers,
        sizes.num_heads,
    )
    module, _, loss = case.build(device)
    return module, loss, False


class StepSide:
    """A model, its optimizer, and a step."""

    def __init__(self, side: str, sizes: Sizes, precision: str, device: torch.device) -> None:
        make = published_loss if side in PAPER_CODE else lean_loss
        self.module, self.plain_loss, self.capturable = make(side, sizes, device)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=1e-4, fused=True, capturable=device.type == "cuda" and self.capturable
        )
        self.device, self.precision = device, precision

    def loss(self) -> Tensor:
        """In the precision asked for."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == BF16):
            return self.plain_loss()

    def step(self) -> None:
        """A whole training step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()

    def forward(self) -> None:
        """The loss, as in training."""
        self.loss()

    def live(self) -> list[Tensor]:
        """What stands before a step."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        parameters = list(self.module.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return [*parameters, *gradients, *self.module.buffers(), *(v for v in state if isinstance(v, Tensor))]


def cases_of(side: str, sizes: Sizes, precision: str, mode: str, device: torch.device) -> list[Case]:
    """The passes of a side, which share one model; a captured one is a whole step."""
    made: list[StepSide] = []

    def shared() -> StepSide:
        if not made:
            made.append(StepSide(side, sizes, precision, device))
        return made[0]

    def columns(one: StepSide) -> dict[str, object]:
        return {"num_parameters": sum(parameter.numel() for parameter in one.module.parameters())}

    def step() -> Work:
        one = shared()
        one.step()  # the optimizer makes its state
        return Work(one.step, one.live, columns(one))

    def forward() -> Work:
        one = shared()
        return Work(one.forward, one.live, columns(one) | {"peak_memory_gib": None})

    def replay() -> Work:
        one = shared()
        if not one.capturable:
            raise UserError("a step of this side waits for the device: it cannot be captured")
        return Work(captured(one.step, device), one.live, columns(one), peak_of_building=True)

    builders = {STEP: replay} if mode == CAPTURED else {STEP: step, FORWARD: forward}
    key = {"vocabulary_size": sizes.vocabulary_size, "hidden_size": sizes.hidden_size}
    key |= {"batch_size": sizes.batch_size, "sequence_length": sizes.sequence_length}
    return [
        Case({**key, "precision": precision, "side": side, "mode": mode, "pass": name}, build)
        for name, build in builders.items()
    ]


Group = tuple[int, str, str, tuple[str, ...]]  # hidden size, precision, mode, sides that take turns
CARD_GROUPS: list[Group] = [
    (128, FP32, EAGER, LEAN),
    (128, BF16, EAGER, LEAN),
    (128, BF16, CAPTURED, CAPTURED_SIDES),
    (128, FP32, CAPTURED, CAPTURED_SIDES),
    (256, FP32, EAGER, LEAN),
    (256, BF16, EAGER, LEAN),
    # The larger ones lie on the card one at a time.
    *((1024, precision, EAGER, (side,)) for precision in (FP32, BF16) for side in LEAN),
    (128, FP32, EAGER, tuple(PAPER_CODE)),
    (256, FP32, EAGER, tuple(PAPER_CODE)),
    *((2048, precision, EAGER, (side,)) for precision in (BF16, FP32) for side in LEAN),
    (256, BF16, CAPTURED, CAPTURED_SIDES),
]
TINY_GROUPS: list[Group] = [
    (32, FP32, EAGER, LEAN),
    (32, BF16, EAGER, (NO_HEAD, FOLDED)),
    (32, BF16, CAPTURED, CAPTURED_SIDES),
    (32, FP32, EAGER, tuple(PAPER_CODE)),
]


def groups_and_sizes(tiny: bool) -> tuple[list[Group], Callable[[int], Sizes]]:
    """What is measured, and the sizes at a hidden size."""
    if not tiny:
        return CARD_GROUPS, Sizes
    return TINY_GROUPS, lambda hidden_size: Sizes(hidden_size, 2, 16, 499, num_layers=2, num_heads=2)


def measure_part(rows: Rows, plan: Plan) -> None:
    """All groups, one after the other."""
    groups, sizes_of = groups_and_sizes(plan.tiny)
    for hidden_size, precision, mode, sides in groups:
        if plan.seconds_left <= 0:
            return
        sizes = sizes_of(hidden_size)
        cases = [case for side in sides for case in cases_of(side, sizes, precision, mode, plan.device)]
        measure_cases(cases, rows, plan)
        cases.clear()  # they hold the models
