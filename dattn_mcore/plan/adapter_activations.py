"""Bytes that adapters keep between forward and backward, beside what their layers do."""

from __future__ import annotations

from dattn_mcore.architectures.adapters import AdaptedLinear, Adapters, adapted_linears
from dattn_mcore.config.checks import shards_of
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.schema import Config
from dattn_mcore.plan.flops import folds
from dattn_mcore.plan.rows import Rows

# With dropout nothing reads what enters these. The folded projection's input is the attention's
# output, which that keeps; without the fold it is a copy. The input of `linear_q` is `linear_kv`'s.
_NOT_READ = ("linear_kv", "linear_fc1", "linear_fc2")
_NOT_READ_UNFOLDED = (*_NOT_READ, "linear_proj")


def adapter_bytes(config: Config, pack: Rows, mask_bytes: int = 1) -> float:
    """Bytes that the adapters of a layer keep for one micro-batch, on average over the layers.

    Kept are what A gives, with dropout the inputs that are left and which these are, with DoRA the
    sum that the magnitudes multiply. Inputs without dropout are counted with the adapted linear.

    Args:
        config: a checked configuration.
        pack: rows of the micro-batch.
        mask_bytes: of a value's place in dropout's mask: one on a GPU, a whole float on a CPU.
    """
    adapters = adapters_of(config)
    if adapters is None:
        return 0.0
    linears = adapted_linears(config.model, adapters)
    kept = sum(
        _linear_bytes(config, adapters, linear, pack, mask_bytes) * len(linear.layers)
        for linear in linears
    )
    return kept / config.model.llm.num_layers


def _linear_bytes(
    config: Config, adapters: Adapters, linear: AdaptedLinear, pack: Rows, mask_bytes: int
) -> float:
    train, tp = config.train, config.parallel.tp
    if (
        train.recompute == "selective"
        and "mlp" in train.recompute_modules
        and "mlp" in linear.place
    ):
        return 0.0
    e = 2 if train.precision == "bf16" else 4
    shards = shards_of(config).tensor
    asks = linear.place.endswith(("linear_q", "linear_proj"))
    whole = not asks or config.attention.v2v == "causal"
    rows = pack.text + (pack.visual if whole else 0)
    inputs = linear.shapes()[0][1]
    outputs = sum(size for size, _ in linear.shapes())
    ranks = adapters.rank * (1 if linear.is_row_parallel else len(linear.parts))
    entered = rows * inputs / (tp if linear.is_row_parallel else shards)
    left = rows * outputs / (shards if linear.is_row_parallel else tp)
    inside = rows * ranks / (shards if linear.is_row_parallel else 1)
    if linear.place.endswith("linear_proj") and not whole:
        # Visual rows come as values, or, without the fold, spread over the heads that share them.
        llm = config.model.llm
        values = llm.groups_per_rank(tp) * llm.head_dim if folds(config) else inputs / tp
        entered += pack.visual * values
        inside += pack.visual * ranks / shards
        left += pack.visual * outputs / shards
    kept = e * inside
    if len(linear.parts) > 1:
        kept += e * ranks * outputs / tp  # B of all parts, side by side
    if adapters.dropout:
        kept += (e + mask_bytes) * entered
        if linear.place.endswith(_NOT_READ if folds(config) else _NOT_READ_UNFOLDED):
            kept -= e * entered
    if adapters.dora:
        kept += e * left
    return kept
