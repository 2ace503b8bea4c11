"""A language model's own output layer, read through int8 rows: the same tokens for a fraction of the bytes.

The k best: ``screened_state``; draws and top_p: ``draws``; the bound that both rest on: ``quantised_rows``. Each
proves in its docstring what it does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vocabfold.errors import UserError
from vocabfold.heads.sampling import check_k, check_sampling, draw_from_sorted
from vocabfold.hugging_face.draws import NOT_FINITE, draw
from vocabfold.hugging_face.quantised_rows import QuantisedRows, States
from vocabfold.hugging_face.screened_batch import LEFT, likeliest
from vocabfold.hugging_face.screened_state import Counts, DenseRows, ScreenedState

DTYPES = (torch.float32, torch.bfloat16)
STATES_AT_A_TIME = 16


class ScreenedHead(nn.Module):
    """``weight`` [V, D], float32 or bfloat16 on a CPU: kept as it is (not copied), beside an int8 copy.

    The names are those of ``vocabfold.heads.base.Head``; there is no loss, and ``topk`` returns logits in place of
    log-probabilities, since a normaliser would need every row. At most STATES_AT_A_TIME states are looked at together.
    Greedily their bounds are held a panel of rows at a time; top_k and draws hold those of all rows. Raises UserError
    for rows that cannot be screened, and when rows were changed since.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.device.type != "cpu" or weight.dtype not in DTYPES:
            raise UserError(
                f"the screen works on a CPU in float32 or bfloat16, not on {weight.device.type} in "
                f"{str(weight.dtype).removeprefix('torch.')}: move or convert the model first"
            )
        self.weight = weight.detach()
        self.vocabulary_size, self.hidden_size = weight.shape
        self.quantised = QuantisedRows(self.weight)
        self.counts = Counts()
        self._rows_version = None if weight.is_inference() else weight._version

    @property
    def bytes_read(self) -> int:
        """Bytes of rows read since ``counts`` was last replaced."""
        row = self.hidden_size * self.weight.element_size()
        rows = self.counts.scored + self.counts.dense * self.vocabulary_size
        return rows * row + self.counts.products * self.quantised.num_bytes

    @torch.no_grad()
    def greedy(self, hidden: Tensor) -> Tensor:
        """``hidden`` [N, D] -> the token [N] that dense picks; of equal logits the smallest id."""
        self._check(hidden)
        tokens = [torch.empty(0, dtype=torch.long)]
        for some in hidden.split(STATES_AT_A_TIME) if len(hidden) else []:
            states = self.quantised.round_states(some)
            self.counts.products += 1
            self.counts.states += len(some)
            if len(some) == 1:  # [1, V] are less than a panel of 16: whole, for what is left
                upper = self.quantised.upper_bounds(states)
                best = likeliest(self, states, [(0, upper)], some)
            else:
                best = likeliest(self, states, self.quantised.panels(states), some)
            dense = DenseRows(some, self.weight)
            for index in (best == LEFT).nonzero().squeeze(-1).tolist():
                if len(some) > 1:
                    upper = self._again(states, index)
                best[index] = ScreenedState(self, states, index, upper[0], some[index], dense).topk(1)[1]
            tokens.append(best)
        return torch.cat(tokens)

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """``hidden`` [N, D] -> (logits [N, k] in the rows' dtype, tokens [N, k]), best first, equal logits by id.

        The k tokens are those of dense. Logits are rounded once, so they can differ from dense's in the last digit, and
        tokens closer than that can change places within the k. Raises UserError unless 1 <= k <= V.
        """
        return self._topk(hidden, k, as_dense=True)

    def _topk(self, hidden: Tensor, k: int, as_dense: bool) -> tuple[Tensor, Tensor]:
        self._check(hidden)
        check_k(k, self.vocabulary_size)
        best = [state.topk(k, as_dense) for state in self._screened(hidden)]
        if not best:
            return hidden.new_empty(0, k), torch.empty(0, k, dtype=torch.long)
        return torch.stack([logits for logits, _ in best]), torch.stack([tokens for _, tokens in best])

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw one token for each hidden state: [N, D] -> [N], as ``Head.sample`` does, from the model's softmax.

        Raises UserError for a negative temperature, top_k outside 1..V, top_p outside (0, 1], and logits that are not
        finite.
        """
        self._check(hidden)
        check_sampling(temperature, top_k, top_p, self.vocabulary_size)
        if temperature == 0:
            return self.greedy(hidden)
        if top_k is not None:
            logits, tokens = self._topk(hidden, top_k, as_dense=False)
            if not bool(logits.isfinite().all()):
                raise UserError(NOT_FINITE)
            choice = draw_from_sorted(logits.float(), temperature, top_p, generator)
            return tokens.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
        nucleus = 1.0 if top_p is None else top_p
        drawn = [draw(state, temperature, nucleus, generator) for state in self._screened(hidden)]
        return torch.tensor(drawn, dtype=torch.long)

    def _check(self, hidden: Tensor) -> None:
        if hidden.dim() != 2 or hidden.shape[-1] != self.hidden_size or hidden.dtype != self.weight.dtype:
            raise UserError(
                f"hidden states are {tuple(hidden.shape)} {hidden.dtype}: "
                f"give [N, {self.hidden_size}] {self.weight.dtype}"
            )
        if self.weight.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            raise UserError(
                "float32 products are set to less than float32: torch.set_float32_matmul_precision('highest')"
            )
        if self._rows_version is not None and self.weight._version != self._rows_version:
            raise UserError("the output layer was changed since it was screened: screen the model again")

    def bounds(self, hidden: Tensor) -> tuple[States, Tensor]:
        """``hidden`` [B, D] -> (the states rounded, ``QuantisedRows.upper_bounds`` [B, W])."""
        self.counts.products += 1
        states = self.quantised.round_states(hidden)
        return states, self.quantised.upper_bounds(states)

    def _again(self, states: States, index: int) -> Tensor:
        """The bounds [1, W] of one of ``states``, whose panels are forgotten; out of range it has none."""
        if not bool(states.in_range[index]):
            return states.margin.unsqueeze(0)
        self.counts.products += 1
        return self.quantised.upper_bounds(states.one(index))

    def _screened(self, hidden: Tensor) -> Iterator[ScreenedState]:
        for some in hidden.split(STATES_AT_A_TIME) if len(hidden) else []:
            states, upper = self.bounds(some)
            self.counts.states += len(some)
            dense = DenseRows(some, self.weight)
            for index in range(len(some)):
                yield ScreenedState(self, states, index, upper[index], some[index], dense)
