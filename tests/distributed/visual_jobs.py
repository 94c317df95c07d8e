"""What the pool's workers run for the visual path and the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import peak_bytes
from dattn_mcore.config.checks import row_multiple
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.layers.vocabulary import chunked_cross_entropy
from dattn_mcore.models.dattn import DattnModel, ModelInputs
from dattn_mcore.parallel.collectives import Tracer, group_names
from dattn_mcore.training.model import build_from_config
from dattn_mcore.training.optimizer import build_optimizer, wrap_ddp
from dattn_mcore.training.schedule import build_scheduler
from dattn_mcore.training.step import run_schedule, train_step
from tests.distributed.jobs import start
from tests.distributed.model_jobs import randomize_norms


def random_inputs(config, layouts, supervised: float = 0.5) -> ModelInputs:
    """A micro-batch of random text, labels and tiles."""
    generator = torch.Generator().manual_seed(7)
    params = build_seq_params(
        layouts, t2v_position=config.attention.t2v_position, multiple=row_multiple(config)
    )
    visual = sum(rows for layout in layouts for is_visual, rows in layout if is_visual)
    size, vocab = config.model.vision.image_size, config.model.llm.vocab_size
    ids, labels = torch.randint(0, vocab, (2, params.num_text), generator=generator)
    labels[torch.rand(params.num_text, generator=generator) >= supervised] = -100
    labels[sum(params.text_lengths) :] = -100
    tiles = torch.randint(
        0,
        256,
        (visual // config.model.vision.rows_per_tile, 3, size, size),
        generator=generator,
        dtype=torch.uint8,
    )
    return ModelInputs(params, ids, labels, tiles if visual else None)


def _model(tree: dict[str, Any]) -> tuple[Any, Any, DattnModel]:
    config, groups = start(tree)
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    randomize_norms(model)
    return config, groups, model


def oracle_gradients(tree: dict[str, Any], layouts: Any) -> dict[str, torch.Tensor]:
    """Gradients by PyTorch's autograd and cross entropy alone, without Megatron-Core's DDP."""
    config, _, model = _model(tree)
    inputs = random_inputs(config, layouts)
    logits = model(inputs, return_logits=True)[:, : config.model.llm.vocab_size]
    F.cross_entropy(logits, inputs.labels, reduction="sum").backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def trained_gradients(tree: dict[str, Any], layouts: Any) -> dict[str, torch.Tensor]:
    """Gradients of two equal micro-batches as a training step has them (float32 buffers), halved.

    Two, so that a gradient that is overwritten or counted twice shows.
    """
    config, groups, model = _model(tree)
    inputs = random_inputs(config, layouts)
    wrapped = wrap_ddp([model], config, groups)
    build_optimizer(config, wrapped)
    model.config.finalize_model_grads_func = None
    run_schedule(wrapped, [inputs, inputs], groups, forward_only=False)
    return {name: p.main_grad / 2 for name, p in model.named_parameters() if p.requires_grad}


def attention_gradients(
    tree: dict[str, Any], layouts: Any
) -> tuple[list[Any], float, float | None]:
    """This rank's shards of the attention's gradients after a schedule, gradient norm and loss.

    Each shard: key, global shape, offset, gradient; summed over ranks as a training step does. The
    loss is a sum over tokens, and None but on the first rank.
    """
    config, groups, model = _model(tree)
    inputs = random_inputs(config, layouts)
    wrapped = wrap_ddp([model], config, groups)
    optimizer = build_optimizer(config, wrapped)
    reports = run_schedule(wrapped, [inputs, inputs], groups, forward_only=False)
    loss = float(sum(report[0, 0] for report in reports)) if reports else None
    entries = model.sharded_state_dict()
    shards = []
    for name, parameter in model.named_parameters():
        if ".self_attention." in name and name.startswith("decoder."):
            entry = entries[name]
            gradient = parameter.main_grad.detach().float().clone()
            shards.append((entry.key, entry.global_shape, entry.global_offset, gradient))
    optimizer.prepare_grads()
    return shards, float(optimizer.get_grad_norm()), loss


def step_memory(tree: dict[str, Any], layouts: Any) -> int:
    """Peak bytes of a whole training step, the optimizer's new state included."""
    config, groups, model = _model(tree)
    inputs = random_inputs(config, layouts)
    wrapped = wrap_ddp([model], config, groups)
    optimizer = build_optimizer(config, wrapped)
    scheduler = build_scheduler(config, optimizer, 10)

    def step() -> None:
        train_step(wrapped, optimizer, scheduler, [inputs], groups)

    return peak_bytes(step, torch.device("cpu"))


def tower_graph(tree: dict[str, Any], layouts: Any) -> tuple[bool, int]:
    """Whether the tower's features ask for a gradient, and the bytes its autograd keeps."""
    config, _, model = _model(tree)
    inputs = random_inputs(config, layouts)
    kept: list[int] = []
    asked: list[bool] = []
    model.vision.register_forward_hook(lambda *call: asked.append(call[2].requires_grad))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept.append(tensor.nbytes)
        return tensor

    rows = inputs.params.num_visual
    model.projector.forward = lambda features, grids, tiles: features.new_zeros(rows, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model._visual_rows(inputs.tiles, torch.float32)
    return asked[0], sum(kept)


def kept_by_layers(tree: dict[str, Any], layouts: Any) -> int:
    """Bytes that autograd keeps of the language model's layers, each storage once."""
    config, _, model = _model(tree)
    inputs = random_inputs(config, layouts)
    hidden = model._embed(inputs).detach().requires_grad_()
    positions = torch.cat([inputs.params.visual_positions, inputs.params.text_positions])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.decoder(
            hidden_states=hidden * 1.0,
            attention_mask=None,
            rotary_pos_emb=model.angles(positions),
            packed_seq_params=inputs.params,
        )
    return sum(storage.nbytes() for storage in kept.values())


def reductions(tree: dict[str, Any], layouts: Any) -> int:
    """All-reduces and reduce-scatters of the language model's layers, forward and backward."""
    config, groups, model = _model(tree)
    inputs = random_inputs(config, layouts)
    hidden = model._embed(inputs).detach().requires_grad_()
    positions = torch.cat([inputs.params.visual_positions, inputs.params.text_positions])
    with Tracer(group_names(groups)) as tracer:
        out = model.decoder(
            hidden_states=hidden * 1.0,
            attention_mask=None,
            rotary_pos_emb=model.angles(positions),
            packed_seq_params=inputs.params,
        )
        out.sum().backward()
    return sum(one.operation in ("all_reduce", "reduce_scatter") for one in tracer.collectives)


class WidestRows(TorchDispatchMode):
    """Sees the most rows of any tensor as wide as the vocabulary that is not its weight."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.vocabulary, self.hidden, self.rows = vocabulary, hidden, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and self.vocabulary in tensor.shape:
                rows = tensor.numel() // self.vocabulary
                if rows != self.hidden:
                    self.rows = max(self.rows, rows)
        return out


def most_rows_of_logits(tree: dict[str, Any], layouts: Any) -> tuple[int, int]:
    """Most rows of logits alive in one tensor in forward and backward; supervised rows."""
    config, groups, model = _model(tree)
    inputs = random_inputs(config, layouts)
    llm = config.model.llm
    vocabulary = llm.padded_vocab_size // config.parallel.tp
    with WidestRows(vocabulary, llm.hidden_size) as mode:
        model(inputs).sum().backward()
    return mode.rows, int((inputs.labels != -100).sum())


def vocabulary_losses(
    tp: int, chunk: int, softcap: float | None, into_main_grad: bool
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Losses and gradients of the chunked loss beside float64 cross entropy of the whole logits."""
    config, groups = start({"parallel": {"tp": tp}})
    generator = torch.Generator().manual_seed(3)
    # Of 48 entries 34 carry meaning; with tp 4 the last rank holds nothing but padding.
    vocab, padded, hidden, count = 34, 48, 8, 10
    rows = torch.randn(count, hidden, generator=generator)
    whole = 2 * torch.randn(padded, hidden, generator=generator)
    labels = torch.randint(0, vocab, (count,), generator=generator)
    upstream = torch.rand(count, generator=generator)
    mine = whole.chunk(tp)[groups.tp.rank()].clone()
    mine.requires_grad_()
    own_rows = rows.clone().requires_grad_()
    if into_main_grad:
        mine.main_grad = torch.zeros_like(mine)
    losses = chunked_cross_entropy(
        own_rows,
        mine,
        labels,
        chunk=chunk,
        softcap=softcap,
        vocab_size=vocab,
        tp_group=groups.tp,
    )
    losses.backward(upstream)
    d_weight = mine.main_grad if into_main_grad else mine.grad

    exact_rows, exact = rows.double().requires_grad_(), whole.double().requires_grad_()
    logits = exact_rows @ exact.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits[:, :vocab], labels, reduction="none")
    expected.backward(upstream.double())
    assert dist.get_world_size() == tp
    return {
        "losses": (losses.detach(), expected.detach()),
        "d_rows": (own_rows.grad, exact_rows.grad),
        "d_weight": (d_weight, exact.grad.chunk(tp)[groups.tp.rank()]),
    }
