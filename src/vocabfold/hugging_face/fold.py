"""A folded head in place of ``lm_head`` of any causal language model of transformers, and back.

model = fold(AutoModelForCausalLM.from_config(config), training_tokens)   # then Trainer, generate(), save_pretrained
model = fold(finished, training_tokens, shortlist=2048, width=512, visited=16, fitted_on=ids)
original = unfold(model)
"""

from __future__ import annotations

import copy
import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vocabfold.errors import UserError
from vocabfold.heads.full import FullHead
from vocabfold.heads.orders import clustered_order, frequency_order
from vocabfold.heads.partition import Partition, equal_boundaries
from vocabfold.heads.settings import PartitionSettings
from vocabfold.heads.vocabulary_order import vocabulary_order
from vocabfold.hugging_face.distil import STEPS, distil
from vocabfold.hugging_face.embedding import CompressedInput
from vocabfold.hugging_face.fold_head import RescoredHead, rows_of
from vocabfold.hugging_face.full_head import full_head
from vocabfold.hugging_face.models import backbone, need
from vocabfold.tokens import TokenStream, token_counts

if TYPE_CHECKING:
    from vocabfold.hugging_face.folded_model import FoldedForCausalLM

ORDERS = ("neighbours", "rows", "frequency", "ids")
STATES_TOKENS = 1024  # of a text read at a time


def fold(
    model: Any,
    tokens: TokenStream | None = None,
    *,
    order: str | None = None,
    group_size: int | None = None,
    shortlist: int = 0,
    partition: Partition | None = None,
    start_from_counts: bool = False,
    condition_width: int | None = None,
    width: int = 0,
    visited: int = 0,
    fitted_on: Tensor | None = None,
    steps: int = STEPS,
) -> FoldedForCausalLM:
    """A folded model on the backbone of ``model``, whose modules it shares, and with its rows.

    ``tokens``: ids of the training text. ``order``, one of ORDERS, says which tokens share a group: those with the same
    neighbours in ``tokens`` (the default with tokens), those with similar rows of the output layer (without), equally
    frequent ones, or ids that follow each other. ``group_size`` S (None: about the root of V) and ``shortlist``, how
    many of the most frequent tokens get a group each: see ``equal_partition``. ``partition`` replaces all of these.

    For a model to be trained from scratch: ``start_from_counts`` makes the biases the logs of the frequencies in
    ``tokens``; ``condition_width`` adds a small network that sees the group: see ConditionedLinearScorer.
    For one that is finished: ``width`` and ``visited`` of RescoredHead, and ``fitted_on`` [B, T] or [T], ids of a text
    on whose hidden states the groups' scores are fitted, in ``steps`` of distil; None takes mean rows, which costs far
    more.

    Within a group probabilities are at first those of ``model``; what the groups cost, ``real_fold`` measures.
    Raises UserError, one line, for models without a plain output layer, impossible sizes and options that contradict.
    """
    need("transformers")
    from transformers import PreTrainedModel

    from vocabfold.hugging_face.folded_model import FoldedConfig, FoldedForCausalLM, make_head

    if isinstance(model, FoldedForCausalLM):
        raise UserError("this model is folded already: unfold it first")
    if isinstance(model, PreTrainedModel) and isinstance(model.get_input_embeddings(), CompressedInput):
        raise UserError("the model's embedding is compressed, which no folder of a folded model holds: fold it before")
    full = full_head(model, "fold")
    if full.softcap is not None:
        raise UserError(f"{type(model).__name__} caps its logits (final_logit_softcapping), which folding cannot keep")
    if start_from_counts and tokens is None:
        raise UserError("start_from_counts needs the tokens of the training text")
    base, table = backbone(model), model.get_input_embeddings().weight
    if partition is None:
        partition = partition_of(full, tokens, order, group_size, shortlist)
    elif partition.vocabulary_size != full.vocabulary_size:
        raise UserError(f"the partition has {partition.vocabulary_size} tokens, the model {full.vocabulary_size}")
    partition = partition.to(full.weight.device)
    tied = table is full.weight
    head = make_head(full.hidden_size, partition, table if tied else None, width, visited, condition_width)
    head.to(device=full.weight.device, dtype=full.weight.dtype)
    copy_rows(head, full)
    digest = rows_sha256(head)
    if start_from_counts and tokens is not None:
        head.start_from_counts(token_counts(tokens, full.vocabulary_size))
    if fitted_on is not None:
        distil(head, states_of(base, fitted_on), steps=steps)
    sizes, times = partition.sizes.unique_consecutive(return_counts=True)
    options: dict[str, Any] = {"attn_implementation": model.config._attn_implementation}  # else text_config loses it
    config = FoldedConfig(
        text_config=model.config,
        vocab_size=full.vocabulary_size,
        hidden_size=full.hidden_size,
        group_sizes=[list(pair) for pair in zip(sizes.tolist(), times.tolist(), strict=True)],
        group_width=width,
        visited=visited,
        condition_width=condition_width,
        tie_word_embeddings=tied,
        unfolded=type(model).__name__,
        rows_sha256=digest,
        dtype=model.config.dtype,
        **options,
    )
    for module in [*base.modules(), *head.modules()]:
        vars(module)["_is_hf_initialized"] = True  # transformers would begin them anew
    folded = FoldedForCausalLM(config, base, head)
    folded.generation_config = model.generation_config
    return folded.train(model.training)


def unfold(model: Any, drop_trained: bool = False) -> Any:
    """The model that ``fold`` was given, with the backbone as it is now: its own class, its own output layer.

    Exact where the head's rows are those that it was folded with, whatever the backbone or the groups' scores learned
    since. Otherwise there is no full softmax that says what the head says, and UserError names what would be lost;
    ``drop_trained`` takes the head's rows all the same, and drops the rest. A tied model whose head learned apart from
    the embedding, as PEFT's copies do, becomes an untied one.
    """
    need("transformers")
    from transformers.models.auto import modeling_auto

    from vocabfold.hugging_face.folded_model import FoldedForCausalLM

    if hasattr(model, "peft_config"):
        raise UserError(f"{type(model).__name__} has adapters: merge_and_unload() them first")
    if not isinstance(model, FoldedForCausalLM):
        raise UserError(f"{type(model).__name__} is not a folded model: there is nothing to unfold")
    head, config = model.head, model.config
    if rows_sha256(head) != config.rows_sha256 and not drop_trained:
        raise UserError(
            "the folded head was trained or converted since the model was folded: its rows can be kept, but its "
            "groups' scores and biases have no place in a plain output layer, and the loss will be another; "
            "unfold(model, drop_trained=True) does that"
        )
    kind: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]
    if kind.__name__ != config.unfolded:
        raise UserError(f"the model was a {config.unfolded}, which this transformers no longer makes of its config")
    rows, bias = _plain_rows(head)
    text_config: Any = config.text_config
    inputs: Any = model.get_input_embeddings().weight if config.tie_word_embeddings else None
    shares_rows = inputs is not None and torch.equal(rows, inputs)
    if inputs is not None and not shares_rows:
        text_config = copy.deepcopy(text_config)
        text_config.tie_word_embeddings = False
    with torch.device("meta"):
        plain = kind(text_config)
    setattr(plain, plain.base_model_prefix, model.model)
    layer = plain.get_output_embeddings()
    layer.weight = inputs if shares_rows else nn.Parameter(rows.detach())
    if layer.bias is not None:
        layer.bias = nn.Parameter(bias)
    plain.generation_config = model.generation_config
    return plain.train(model.training)


def partition_of(
    full: FullHead, tokens: TokenStream | None, order: str | None, group_size: int | None, shortlist: int
) -> Partition:
    """The partition that these options of ``fold`` mean. Raises UserError for those that contradict."""
    order = order or ("rows" if tokens is None else "neighbours")
    if order not in ORDERS:
        raise UserError(f"order is {order!r}: choose one of {', '.join(ORDERS)}")
    if tokens is None and (shortlist or order in ("neighbours", "frequency")):
        raise UserError("a shortlist, neighbours and frequency are counted: give the tokens of a text too")
    vocabulary_size = full.vocabulary_size
    boundaries = equal_boundaries(vocabulary_size, group_size, shortlist)
    if order == "rows":
        counted = None if tokens is None else frequency_order(token_counts(tokens, vocabulary_size))[:shortlist]
        return Partition(clustered_order(full.weight, boundaries, counted), boundaries)
    if order == "ids" and (tokens is None or not shortlist):
        return Partition(torch.arange(vocabulary_size), boundaries)
    assert tokens is not None
    if order == "ids":
        first = frequency_order(token_counts(tokens, vocabulary_size))[:shortlist]
        rest = torch.ones(vocabulary_size, dtype=torch.bool).index_fill(0, first, False).nonzero().squeeze(-1)
        return Partition(torch.cat([first, rest]), boundaries)
    name = "clustered" if order == "neighbours" else "frequency"
    settings = PartitionSettings(name, group_size, shortlist)
    return Partition(_order(settings, vocabulary_size, tokens), boundaries)


def _order(partition: PartitionSettings, vocabulary_size: int, tokens: TokenStream) -> Tensor:
    from vocabfold.heads.settings import HeadSettings

    order = vocabulary_order(HeadSettings(type="folded", partition=partition), vocabulary_size, tokens)
    assert order is not None
    return order


@torch.no_grad()
def copy_rows(head: RescoredHead, full: FullHead) -> None:
    """Give ``head`` the rows of ``full``, and each group the mean of its tokens' rows with the log of their number, or
    of the sum of exp(bias), as bias: to first order around h = 0 the group's share of ``full``."""
    partition, scorer = head.partition, head.linear_scorer[0]
    bias = torch.zeros(full.vocabulary_size) if full.bias is None else full.bias.detach()
    bias = bias.to(device=full.weight.device, dtype=torch.float64)
    if not scorer.tied:
        scorer.weight.copy_(full.weight[partition.multi_tokens])
    scorer.bias.copy_(bias[partition.multi_tokens])
    shares = bias.exp()
    totals = torch.zeros(partition.num_groups, dtype=torch.float64, device=bias.device)
    totals.index_add_(0, partition.group_of, shares)
    means = torch.zeros(partition.num_groups, full.hidden_size, dtype=torch.float64, device=bias.device)
    means.index_add_(0, partition.group_of, full.weight.double() * shares.unsqueeze(-1))
    head.group_weight.copy_(means / totals.unsqueeze(-1))
    assert head.group_bias is not None
    head.group_bias.copy_(totals.log())
    singles = partition.single_groups  # as they are, not through exp and log
    tokens = partition.order[partition.boundaries[singles]]
    head.group_weight[singles] = full.weight[tokens]
    head.group_bias[singles] = bias[tokens].to(head.group_bias.dtype)


@torch.no_grad()
def states_of(base: Any, ids: Tensor) -> Tensor:
    """The last hidden states [N, D] of a text of ids [B, T] or [T], STATES_TOKENS of each row at a time."""
    rows = ids.reshape(-1, ids.shape[-1]) if ids.dim() > 1 else ids.unsqueeze(0)
    was_training = base.training
    base.eval()
    device = base.get_input_embeddings().weight.device
    try:
        parts = [
            base(input_ids=some.unsqueeze(0).to(device), use_cache=False).last_hidden_state[0]
            for row in rows
            for some in row.split(STATES_TOKENS)
            if len(some)
        ]
    finally:
        base.train(was_training)
    if not parts:
        raise UserError("fitted_on holds no tokens: give a few thousand ids of text, or None")
    return torch.cat(parts)


def rows_sha256(head: RescoredHead) -> str:
    """Of the tokens' rows and biases, bit by bit."""
    digest = hashlib.sha256()
    for tensor in rows_of(head):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _plain_rows(head: RescoredHead) -> tuple[Tensor, Tensor]:
    """(rows [V, D], biases [V]) in token order."""
    partition, scorer = head.partition, head.linear_scorer[0]
    singles = partition.single_groups
    tokens = partition.order[partition.boundaries[singles]]
    assert head.group_bias is not None
    bias = scorer.bias.new_zeros(partition.vocabulary_size)
    bias[partition.multi_tokens], bias[tokens] = scorer.bias, head.group_bias[singles]
    if scorer.tied:
        return scorer.weight, bias
    rows = scorer.weight.new_zeros(partition.vocabulary_size, head.hidden_size)
    rows[partition.multi_tokens], rows[tokens] = scorer.weight, head.group_weight[singles]
    return rows, bias
