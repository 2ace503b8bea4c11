"""Seeded faults for mutations.py: plausible slips, each of which some quick test must notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """In ``file`` (below src or experiments) the text ``old``, which stands there once, becomes ``new``; ``tests``
    are the files, few and quick, that should notice. Short texts, so that they survive renamings."""

    file: str
    old: str
    new: str
    tests: str


def sources_of(tree: Path) -> dict[Path, str]:
    """The text of each file of code below ``tree``."""
    paths = [path for room in ("src", "experiments") for path in (tree / room).rglob("*.py")]
    return {path: path.read_text(encoding="utf-8") for path in paths}


def place_of(fault: Fault, sources: dict[Path, str]) -> Path | None:
    """The file that holds the text once: one of that name, else, where it was renamed, the only one that has it."""
    having = [path for path, text in sources.items() if text.count(fault.old) == 1]
    named = [path for path in having if path.as_posix().endswith("/" + fault.file)]
    same_name = [path for path in having if path.name == Path(fault.file).name]
    for found in (named, same_name, having):
        if len(found) == 1:
            return found[0]
    return None


EVERY_CODER = "test_coder_edges.py test_coding_damage.py test_coding.py"
FAULTS = [
    # groups of the vocabulary
    Fault("heads/partition.py", "math.ceil(math.sqrt(rest))", "math.floor(math.sqrt(rest))", "test_partition.py"),
    Fault("heads/partition.py", "fewest = rest // group_size", "fewest = 1 + rest // group_size", "test_partition.py"),
    Fault("heads/partition.py", "    partition._derive()", "    pass", "test_heads.py"),
    Fault(
        "heads/partition.py",
        "self.multi_starts.take(index + 1)",
        "self.multi_starts.take(index + 1) + 1",
        "test_heads.py",
    ),
    Fault(
        "heads/partition.py",
        "(self.multi_tokens.diff() == 1)",
        "(self.multi_tokens.diff() >= 1)",
        "test_fast_heads.py",
    ),
    # heads
    Fault("heads/full.py", 'IGNORE_INDEX, reduction="sum"', '0, reduction="sum"', "test_heads.py"),
    Fault("heads/chunked.py", "ignore_index=IGNORE_INDEX", "ignore_index=0", "test_heads.py"),
    Fault("heads/chunked.py", "dtype = sum_dtype(hidden.dtype)", "dtype = hidden.dtype", "test_heads.py"),
    Fault("heads/adaptive.py", "masked_fill(~counted, -1)", "masked_fill(~counted, 0)", "test_heads.py"),
    Fault(
        "heads/adaptive.py",
        "hits = (counted & (self.partition.sizes[groups] == 1)).sum()",
        "hits = counted.sum() * 0",
        "test_heads.py",
    ),
    Fault(
        "heads/folded.py",
        "return by_position[:, self.partition.position_of]",
        "return by_position[:, self.partition.order]",
        "test_heads.py",
    ),
    Fault("heads/scorers.py", "certain[:1].zero_()", "certain.zero_()", "test_heads.py"),
    Fault("heads/scorers.py", "index.remainder(self.num_groups + 1)", "index.clamp(min=0)", "test_fixed_shapes.py"),
    Fault("heads/low_rank.py", " * own.unsqueeze(-1)", "", "test_fixed_shapes.py"),
    Fault("heads/linear_blocks.py", " - starts[groups]", "", "test_fast_heads.py"),
    Fault("heads/linear_blocks.py", "[places].masked_fill(~exists, -torch.inf)", "[places]", "test_fast_heads.py"),
    Fault("heads/linear_blocks.py", "(ends - blocks)[groups] * BLOCK_ROWS", "ends[groups]", "test_fast_heads.py"),
    Fault("heads/kernels.py", "values.masked_fill(~counted, 0)", "values", "test_fixed_shapes.py"),
    Fault("heads/nested.py", "== groups) & counted).sum()", "== groups)).sum()", "test_nested.py"),
    Fault("heads/nested.py", "places, counted)[0]", "places, counted)[0] * 0", "test_nested.py"),
    Fault(
        "heads/triton_programs.py", "total *= tl.load(factor)", "total *= 2 * tl.load(factor)", "test_triton_kernels.py"
    ),
    Fault(
        "heads/triton_programs.py",
        "slope *= tl.load(weights + place",
        "slope *= tl.load(weights + row",
        "test_triton_kernels.py",
    ),
    Fault("heads/triton_programs.py", "hit = counts & (", "hit = exists & (", "test_triton_kernels.py"),
    Fault(
        "heads/linear_triton.py",
        "partition.multi_tokens if self.tied else None",
        "None",
        "test_triton_kernels.py",
    ),
    Fault(
        "heads/linear_triton.py",
        "(slopes, hidden, weight, factor)",
        "(slopes, hidden, weight, factor / factor)",
        "test_triton_kernels.py",
    ),
    Fault("heads/scorers.py", ".masked_fill(~counted, -1)", "", "test_heads.py"),
    Fault("heads/scorers.py", ".masked_fill(~self.slot_exists, -torch.inf)", "", "test_heads.py"),
    Fault(
        "heads/scorers.py", "gradients[2].index_add_(0, groups", "gradients[2].index_copy_(0, groups", "test_heads.py"
    ),
    Fault("heads/scorers.py", "else hits + (counted &", "else hits + 0 * (counted &", "test_heads.py"),
    Fault("heads/views.py", "total += grad", "total.copy_(grad)", "test_views.py"),
    Fault("heads/conditioned.py", "index[rows], *of_groups", "index[: len(rows)], *of_groups", "test_views.py"),
    Fault("heads/linear_kernel.py", "read[part] = some", "read[part] = 0", "test_views.py"),
    Fault("heads/low_rank.py", "add_product(grad_rows, grad_low, down[group])", "pass", "test_heads.py"),
    Fault("heads/low_rank.py", "self.up[index, slots], low", "self.up[index, 0 * slots], low", "test_loss_options.py"),
    Fault(
        "heads/linear_kernel.py",
        "grad_bias.index_add_(0, groups",
        "grad_bias.index_copy_(0, groups",
        "test_fast_heads.py",
    ),
    Fault(
        "heads/linear.py", "order // max(1, index.shape[1])", "order // max(1, index.shape[0])", "test_fast_heads.py"
    ),
    Fault(
        "heads/linear.py",
        "F.embedding(self.partition.multi_tokens[places] if self.tied else places",
        "F.embedding(places",
        "test_loss_options.py",
    ),
    Fault(
        "heads/linear_kernel.py",
        "torch.mul(product, factor, out=",
        "torch.mul(product, 1, out=",
        "test_late_gradient.py",
    ),
    Fault("heads/kernels.py", "chosen += slope.amax(", "chosen -= slope.amax(", "test_heads.py"),
    Fault(
        "heads/kernels.py",
        "for start in range(0, num_rows, size):",
        "for start in range(0, max(1, num_rows - size), size):",
        "test_fast_heads.py",
    ),
    Fault("heads/softmax_kernel.py", "part if len(kept) == len(hidden) else kept[part]", "part", "test_heads.py"),
    Fault(
        "heads/kernels.py",
        "gradient.float().mul_(factor).to(gradient.dtype)",
        "gradient * factor.to(gradient.dtype)",
        "test_fast_heads.py",
    ),
    Fault(
        "heads/kernels.py",
        "not torch._C._autograd._get_current_graph_task_keep_graph()",
        "True",
        "test_fast_heads.py",
    ),
    Fault("heads/base.py", "+ share * terms[", "+ terms[", "test_loss_options.py"),
    Fault("heads/loss_options.py", "torch.tanh(logits / softcap)", "torch.tanh(logits)", "test_loss_options.py"),
    Fault("heads/orders.py", "len(known_tokens) + len(others))", "len(known_tokens))", "test_orders.py"),
    # sampling
    Fault(
        "heads/sampling.py",
        "mass_before = probability.cumsum(dim=-1) - probability",
        "mass_before = probability.cumsum(dim=-1)",
        "test_head_sampling.py",
    ),
    Fault("heads/sampling.py", "& (ids < own)", "", "test_head_sampling.py"),
    Fault("heads/sampling.py", "tokens[outside] = drawn", "tokens[outside] = drawn - 1", "test_visiting.py"),
    Fault("heads/visiting.py", "left = (~is_surely", "left = (is_surely", "test_visiting.py"),
    Fault("heads/linear.py", "(row < edges[1:, None])", "(row <= edges[1:, None])", "test_heads.py"),
    Fault(
        "heads/visiting.py",
        "ranked_log_prob[rows, start:] > best[rows, -1:]",
        "ranked_log_prob[rows, start:] > best[rows, :1]",
        "test_head_sampling.py",
    ),
    Fault(
        "heads/visiting.py",
        "return spread, torch.minimum(torch.minimum(",
        "return together, torch.minimum(torch.minimum(",
        "test_visiting.py",
    ),
    Fault("heads/visiting.py", "device=device) < chance", "device=device) < 2 * chance", "test_visiting.py"),
    # coding
    Fault("coding/huffman.py", "taken = 2 * (taken - num_leaves)", "taken = 2 * taken - num_leaves", "test_coding.py"),
    Fault(
        "coding/huffman.py",
        "if ((ends - at) >> 5).any()",
        "if False",
        EVERY_CODER,
    ),
    Fault("coding/huffman.py", "num_words = -(-ends[:, -1] // 32)", "num_words = ends[:, -1] // 32", "test_coding.py"),
    Fault("coding/rans.py", "place += rows << self.bits", "place += rows", "test_coding.py"),
    Fault("coding/rans.py", "quantised(row[exists], ", "quantised(np.ones(int(exists.sum())), ", "test_coding.py"),
    Fault(
        "coding/lanes.py",
        " or (self._next != self._end).any()",
        "",
        EVERY_CODER,
    ),
    Fault("coding/lanes.py", "self._next[rows] = places + 1", "self._next[rows] = places", "test_coding.py"),
    Fault(
        "coding/adaptive.py",
        "probability * ((1 << BITS) - 2)",
        "probability * (1 << BITS)",
        EVERY_CODER,
    ),
    Fault(
        "coding/adaptive.py",
        "prior * probability) / (",
        "probability) / (",
        EVERY_CODER,
    ),
    Fault("coding/frequencies.py", "np.maximum(1, np.rint", "np.maximum(0, np.rint", "test_coding.py"),
    Fault("coding/container.py", "!= self._checks[block]", "== -1", "test_coding_damage.py test_token_store.py"),
    Fault("coding/container.py", "wanted[-1] == self.num_segments - 1", "False", "test_coding.py test_token_store.py"),
    # spread over processes
    Fault("heads/sharded.py", "largest + total.log()", "largest", "test_sharded.py"),
    Fault("heads/sharded.py", "exp() * gradient[part, 1:]", "exp() * gradient[part, :1]", "test_sharded.py"),
    Fault("heads/sharded_folded.py", "kept & (self.partition", "(self.partition", "test_sharded.py"),
    Fault("heads/sharded_folded.py", "seen = local.condition(hidden, groups)", "seen = hidden", "test_sharded.py"),
    Fault("heads/sharded_folded.py", "len(hidden) == 0:", "len(hidden) < 0:", "test_sharded.py"),
    Fault(
        "heads/linear.py",
        "self.weight[self.partition.multi_tokens], requires",
        "self.weight[:], requires",
        "test_heads.py",
    ),
    Fault("heads/collectives.py", "own[: ctx.number], None", "gradient[: ctx.number], None", "test_sharded.py"),
    Fault("heads/traffic.py", "3 * 2 * others", "3 * others", "test_sharded.py"),
    Fault("runs/sharding.py", '!= state.pop("checksums")', '== state.pop("checksums")', "test_parallel.py"),
    # files, checkpoints, batches
    Fault("files.py", "yield beside", "yield path", "test_records.py"),
    Fault(
        "runs/checkpoint.py",
        'optimizer.load_state_dict(state.pop("optimizer"))',
        "state.pop('optimizer')",
        "test_records.py",
    ),
    Fault(
        "runs/checkpoint.py",
        'torch.set_rng_state(state.pop("cpu_random_state").cpu())',
        "state.pop('cpu_random_state')",
        "test_records.py",
    ),
    Fault("runs/checkpoint.py", "archive.testzip()) is not None", "None) is not None", "test_records.py"),
    Fault("runs/checkpoint.py", "expected != checksum(model)", "expected is None", "test_records.py"),
    Fault("data/batches.py", "[first : last : self.world_size]", "[first:last]", "test_batches.py"),
    Fault("data/batches.py", "self._num_training_rows -= 1", "pass", "test_batches.py"),
    Fault("data/batches.py", "SeedSequence([self.seed, epoch])", "SeedSequence([self.seed])", "test_batches.py"),
    Fault("data/batches.py", "window, IGNORE_INDEX)[:, 1:]", "window, self._padding)[:, 1:]", "test_batches.py"),
    Fault(
        "data/batches.py",
        "targets if len(own) else torch.full_like(targets, IGNORE_INDEX)",
        "targets",
        "test_batches.py",
    ),
    Fault("data/composing.py", "(rounded + (rounded >> 8)) >> 8", "rounded >> 8", "test_shapes.py"),
    Fault(
        "data/composing.py",
        "shifts[:, axis, None] for axis in (0, 1)",
        "shifts[:, axis, None] for axis in (1, 0)",
        "test_shapes.py",
    ),
    # training
    Fault("runs/capture.py", "held.copy_(given, non_blocking=True)", "pass", "test_capture.py"),
    Fault("runs/capture.py", "self.calls[variant] += 1", "self.calls[False] += 1", "test_capture.py"),
    Fault("runs/token_order.py", '"tokens_sha256": _stream_sha256(tokens)', '"tokens_sha256": ""', "test_orders.py"),
    Fault(
        "runs/token_order.py",
        "if torch.equal(order.sort(",
        "if order.numel() or torch.equal(order.sort(",
        "test_orders.py",
    ),
    Fault("runs/optimizer.py", "min(1.0, (step + 1) /", "min(1.0, step /", "test_training_parts.py test_train.py"),
    Fault(
        "runs/optimizer.py",
        '"params": vectors, "weight_decay": 0.0',
        '"params": vectors',
        "test_training_parts.py test_train.py",
    ),
    Fault("runs/distributed.py", "value.double() * count", "value.double()", "test_training_parts.py test_train.py"),
    Fault("runs/distributed.py", "dist.all_reduce(values)", "pass", "test_train.py"),
    # embeddings
    Fault("embeddings/tt_svd.py", "eigenvectors[..., -rank:].flip(-1)", "eigenvectors[..., :rank]", "test_tt_svd.py"),
    Fault(
        "embeddings/tt_svd.py",
        "min(rank, most) for most in largest",
        "rank for most in largest",
        "test_tt_svd.py test_embeddings.py",
    ),
    Fault("embeddings/quantized.py", "low | high << 4", "high | low << 4", "test_embeddings.py"),
    Fault("embeddings/quantized.py", "torch.where(steps > 0, steps, 1.0)", "steps", "test_embeddings.py"),
    Fault("embeddings/quantized.py", "+ (rows - rows.detach())", "", "test_embeddings.py"),
    Fault("embeddings/low_rank.py", "self.widen.shape[0] ** -0.5", "1.0", "test_embeddings.py"),
    Fault(
        "embeddings/tt_matrix.py",
        "digits[:, 2] * len(second) + digits[:, 1]",
        "digits[:, 1] * len(second) + digits[:, 2]",
        "test_embeddings.py",
    ),
    Fault("embeddings/tensor_train.py", "std / math.sqrt(math.prod(self.ranks))", "std", "test_embeddings.py"),
    # decoding
    Fault("inference/beam_search.py", "num_beams -= int(has_ended.sum())", "pass", "test_beam_search.py"),
    Fault("inference/beam_search.py", "cache.select(rows[going_on])", "cache.select(going_on)", "test_beam_search.py"),
    Fault("inference/prefixes.py", "matched < len(child.tokens)", "False", "test_inference.py"),
    Fault("inference/quantised.py", "(codes[..., 1::2] << 4)", "(codes[..., 0::2] << 4)", "test_inference.py"),
    # finished models of others
    Fault(
        "hugging_face/screened_head.py",
        "return tokens.gather(-1, choice.unsqueeze(-1)).squeeze(-1)",
        "return choice",
        "test_hugging_face_screen.py",
    ),
    Fault(
        "hugging_face/screened_head.py",
        "self.weight._version != self._rows_version",
        "self.weight._version < 0",
        "test_hugging_face_screen.py",
    ),
    Fault("hugging_face/metrics.py", " | (attention_mask[:, :-1] == 0)", "", "test_hugging_face_metrics.py"),
    Fault("hugging_face/embedding.py", "else vectors * self.scale", "else vectors", "test_hugging_face_embedding.py"),
    # measuring
    Fault(
        "study/statistics.py", "stats.t.ppf(1 - LEVEL, len(", "stats.t.ppf(1 - LEVEL / 2, len(", "test_statistics.py"
    ),
    Fault(
        "study/statistics.py",
        "max(above.pvalue, below.pvalue)",
        "min(above.pvalue, below.pvalue)",
        "test_statistics.py",
    ),
    Fault(
        "study/statistics.py", "sums.sum(axis) / counts.sum(axis)", "(sums / counts).mean(axis)", "test_statistics.py"
    ),
    Fault("measure/memory.py", "made_by_step.pop(address, 0)", "-size", "test_measure.py"),
]
