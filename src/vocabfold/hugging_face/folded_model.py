"""A causal language model of transformers with a folded head in the place of ``lm_head``.

Importing this registers both classes, so that ``AutoModelForCausalLM.from_pretrained(folder)`` reads such a model
without running code from the folder. ``fold`` in fold.py makes one.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from vocabfold.errors import UserError
from vocabfold.heads.conditioned import ConditionedLinearScorer
from vocabfold.heads.linear import SortedLinearScorer
from vocabfold.heads.partition import Partition
from vocabfold.hugging_face.fold_head import RescoredHead
from vocabfold.tokens import IGNORE_INDEX

NO_ROWS = (
    "a folded model has no output layer with a row for each token: train through forward(labels=...) or "
    "vocabfold.hugging_face.metrics, read log-probabilities from logits, or unfold the model"
)
TIED = (
    "the folded head shares the embedding's rows: leave the embedding out of what PEFT adapts, trains or saves, or "
    "fold the model with rows of its own"
)


class FoldedConfig(PretrainedConfig):
    """What a folded model is made of; the order of its vocabulary lies with the weights.

    ``text_config``: that of the model below. ``group_sizes``: [size, how many groups in a row have it] of the groups in
    order. ``group_width``, ``visited``: see RescoredHead. ``condition_width``: that of a ConditionedLinearScorer, None:
    one linear layer a group. ``unfolded``: the name of the class that ``unfold`` gives back; ``rows_sha256``: of the
    tokens' rows when the model was folded.
    """

    model_type = "vocabfold_folded"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    text_config: dict | PretrainedConfig | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    group_sizes: list[list[int]] | None = None
    group_width: int = 0
    visited: int = 0
    condition_width: int | None = None
    tie_word_embeddings: bool = False
    unfolded: str | None = None
    rows_sha256: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Make a config of ``text_config`` where it comes from JSON."""
        if isinstance(self.text_config, dict):
            values = dict(self.text_config)
            self.text_config = AutoConfig.for_model(values.pop("model_type"), **values)
        super().__post_init__(**kwargs)

    @property
    def boundaries(self) -> Tensor:
        """The group boundaries [G + 1]. Raises UserError where they are none."""
        pairs = self.group_sizes or []
        if not all(len(pair) == 2 and min(pair) >= 1 for pair in pairs):
            raise UserError("config.json does not say how the vocabulary is grouped: save the folded model again")
        sizes = torch.tensor([size for size, times in pairs for _ in range(times)], dtype=torch.int64, device="cpu")
        boundaries = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        if int(boundaries[-1]) != self.vocab_size:
            raise UserError(f"config.json groups {int(boundaries[-1])} of {self.vocab_size} tokens: save it again")
        return boundaries


class NoRows(UserError, AttributeError):
    """Of an AttributeError too: who asks whether there are rows is told no."""


class NoOutputRows(nn.Module):
    """What a folded model gives those who ask for its output layer: any use of it says that there is none.

    A module without parameters, so that those who leave the output layer out find one to leave out.
    """

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise NoRows(NO_ROWS)
        return super().__getattr__(name)

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UserError."""
        raise UserError(NO_ROWS)


class FoldedForCausalLM(PreTrainedModel, GenerationMixin):
    """``model``: the part below the output layer, as transformers has it. ``head``: a RescoredHead.

    The loss is the head's own, with no logits of [N, V]; ``logits`` are log-probabilities [B, T, V] of the positions
    that are kept, which softmax leaves as they are. ``backbone``: a module to use in place of a new one.
    """

    config_class = FoldedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    # The scorer has the same partition as the head.
    _keys_to_ignore_on_save = ["head.scorer.partition.order", "head.scorer.partition.boundaries"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"head\.scorer\.partition\."]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: FoldedConfig, backbone: Any = None, head: RescoredHead | None = None) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config.text_config) if backbone is None else backbone
        self.head = _new_head(config, self.model.get_input_embeddings()) if head is None else head
        self.no_output_rows = NoOutputRows()
        if config.tie_word_embeddings:
            table = self.model.get_input_embeddings().weight
            names = [name for name, parameter in self.model.named_parameters() if parameter is table]
            self._tied_weights_keys = {"head.scorer.weight": f"model.{names[0]}"}
        self.supports_gradient_checkpointing = self.model.supports_gradient_checkpointing
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # The head's own parameters begin in its constructor. Of a partition only what follows from its order and
        # boundaries, which a checkpoint does not hold, is made here: loading the order again does that.
        if isinstance(module, Partition):
            if not torch.equal(module.boundaries.cpu(), self.config.boundaries):
                raise UserError("config.json and the weights group the vocabulary in different ways: save it again")
            Partition(module.order, module.boundaries)  # which refuses what is no order of the vocabulary
            module.load_state_dict(module.state_dict())
        elif not any(module is each for each in self.head.modules()):
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' own causal language models, ``labels`` [B, T] being shifted here, ``shift_labels`` (a name
        among ``kwargs``, or Trainer would ask for it in every batch) not.

        The loss is a mean over labels other than -100, or their sum divided by ``num_items_in_batch``; 0, not NaN,
        where there are none. With labels there are no logits, unless ``logits_to_keep`` asks for some.
        Raises UserError for another ``ignore_index``.
        """
        if kwargs.pop("ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
            raise UserError(f"a folded head leaves out labels of {IGNORE_INDEX}: use that in place of ignore_index")
        if self.config.tie_word_embeddings and not isinstance(self.get_input_embeddings(), nn.Embedding):
            raise UserError(TIED)
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None or shift_labels is not None:
            loss = self._loss(hidden, labels, shift_labels, num_items_in_batch)
        if loss is None or not isinstance(logits_to_keep, int) or logits_to_keep > 0:
            kept = hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
            logits = self.head.log_prob(kept.flatten(0, 1)).view(*kept.shape[:2], -1)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(
        self, hidden: Tensor, labels: Tensor | None, shift_labels: Tensor | None, num_items: Tensor | int | None
    ) -> Tensor:
        if shift_labels is None:
            assert labels is not None
            shift_labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
        result = self.head(hidden.flatten(0, 1), shift_labels.flatten().to(hidden.device))
        loss: Tensor = result.loss
        if num_items is not None:
            divisor = num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items
            loss = loss * result.num_targets / divisor
        return loss

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the model below."""
        table: nn.Module = self.model.get_input_embeddings()
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Raises UserError where the head shares the rows that would go."""
        if self.config.tie_word_embeddings:
            raise UserError("the folded head shares the embedding's rows: unfold the model before changing them")
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> NoOutputRows:
        """A stand-in whose use raises UserError: losses of other libraries read its rows, which would be wrong ones."""
        return self.no_output_rows

    @property
    def lm_head(self) -> NoOutputRows:
        """See get_output_embeddings."""
        return self.no_output_rows

    def set_output_embeddings(self, new_embeddings: Any) -> NoReturn:
        """Raises UserError."""
        raise UserError(NO_ROWS)

    def resize_token_embeddings(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UserError: a partition has a fixed vocabulary."""
        raise UserError("a folded model's vocabulary cannot be resized: unfold it, resize, and fold it again")

    @property  # type: ignore[misc]
    def loss_function(self) -> NoReturn:
        """Raises UserError: those who ask for it would apply it to logits that training does not make."""
        raise UserError("a folded model computes its own loss: call it with labels=..., or read logits without labels")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("loss_function", "lm_head"):  # where a module is set, a property would not be asked
            raise UserError(f"a folded model computes its own loss, which another {name} cannot change")
        if name == "forward" and str(getattr(value, "__module__", "")).startswith("liger_kernel."):
            raise UserError("Liger's fused loss multiplies with rows of lm_head: fused_linear_cross_entropy=False")
        if name == "peft_config" and any("lm_head" in _named_by(adapter) for adapter in value.values()):
            raise UserError("a folded model has no lm_head for PEFT, which would leave it out: name head, or neither")
        super().__setattr__(name, value)

    def tie_weights(self, *arguments: Any, **options: Any) -> None:
        """See PreTrainedModel.tie_weights."""
        bias = self.head.scorer.bias
        values = bias.data
        super().tie_weights(*arguments, **options)
        # transformers lengthens a bias beside tied rows to one number a row: here it is of grouped tokens alone.
        bias.data = values


def _named_by(adapter: Any) -> list[str]:
    """The last names of the modules that an adapter's config asks for, but for those of a pattern."""
    asked = [getattr(adapter, each, None) for each in ("target_modules", "modules_to_save")]
    return [name.rpartition(".")[2] for names in asked if names and not isinstance(names, str) for name in names]


def _new_head(config: FoldedConfig, embedding: nn.Module) -> RescoredHead:
    with torch.device("cpu"):  # also where weights are on the meta device, to be loaded next: sizes have to be known
        partition = Partition(torch.arange(config.vocab_size), config.boundaries)
    tied = embedding.weight if config.tie_word_embeddings else None
    return make_head(config.hidden_size, partition, tied, config.group_width, config.visited, config.condition_width)


def make_head(
    hidden_size: int,
    partition: Partition,
    tied: Any = None,
    width: int = 0,
    visited: int = 0,
    condition_width: int | None = None,
) -> RescoredHead:
    """A RescoredHead with a scorer of its own: ``tied`` [V, D] lends it the embedding's rows. Raises UserError for
    visited groups of a conditioned scorer, whose sums would need a hidden state for each group."""
    if condition_width is None:
        return RescoredHead(hidden_size, partition, SortedLinearScorer(hidden_size, partition, tied), width, visited)
    if visited:
        raise UserError("visited groups are scored by their tokens' rows alone: leave condition_width out")
    scorer = ConditionedLinearScorer(hidden_size, partition, condition_width, tied)
    return RescoredHead(hidden_size, partition, scorer, width)


AutoConfig.register(FoldedConfig.model_type, FoldedConfig, exist_ok=True)
AutoModelForCausalLM.register(FoldedConfig, FoldedForCausalLM, exist_ok=True)
