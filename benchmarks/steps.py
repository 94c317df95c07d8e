"""One training step of D-Attn, of the baseline in this code, and of Hugging Face's LLaVA.

All have the same tower (frozen), projector and language model, weights drawn at random, one pack
of `visual` rows (images of one tile each) before `text` rows, half of which are supervised, and
AdamW. Hugging Face's runs PyTorch's SDPA and computes logits for the supervised rows only, as this
code does, so that neither is slowed by logits that nobody reads. It is called past what makes
Megatron-Core run on a CPU, which costs each call of PyTorch some microseconds. Its AdamW is
PyTorch's fused one, as in Hugging Face's Trainer, and on a GPU keeps bf16 states and weights only,
where Megatron-Core's keeps float32: that is in the peer's favour.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks.results import ROOT
from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import from_dict, merge, read_yaml
from dattn_mcore.config.schema import Config
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.models.dattn import DattnModel, ModelInputs
from dattn_mcore.parallel import on_cpu
from dattn_mcore.training.model import build_from_config
from dattn_mcore.training.optimizer import build_optimizer, wrap_ddp
from dattn_mcore.training.runtime import decide_runtime, params_dtype
from dattn_mcore.training.schedule import build_scheduler
from dattn_mcore.training.step import train_step
from dattn_mcore.types import IGNORED_LABEL

Step = Callable[[], object]
BASELINE = {"attention": {"v2v": "causal", "t2v_position": "rope"}}
# Mistral's proportions: 4 query heads a group, MLP 3.5 times as wide.
SMALL = {
    "llm": dict(
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=896,
        num_attention_heads=8,
        num_query_groups=2,
        head_dim=32,
        vocab_size=2048,
    ),
    "vision": dict(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4),
    "projector": dict(ffn_hidden_size=256),
}
TINY = {
    "llm": dict(
        num_layers=16,
        hidden_size=128,
        ffn_hidden_size=448,
        num_attention_heads=8,
        num_query_groups=2,
        head_dim=16,
        vocab_size=2048,
    ),
    "vision": dict(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=2),
    "projector": dict(ffn_hidden_size=128),
}
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("mistral_7b_v03", TINY),
    "small": ("mistral_7b_v03", SMALL),
    "mistral": ("mistral_7b_v03", {}),
    "gemma": ("gemma2_9b", {}),
}


def sized_config(size: str, device: str, layers: int | None, **sections: Any) -> Config:
    """The configuration of a size, with CLIP's tower, which is frozen.

    Args:
        size: a key of SIZES.
        device: cpu (fp32) or gpu (bf16).
        layers: of the language model; None: all.
        **sections: settings on top.
    """
    name, changes = SIZES[size]
    models = ROOT / "configs" / "models"
    tree = merge(read_yaml(models / f"{name}.yaml"), read_yaml(models / "clip_l_336.yaml"))
    precision = "bf16" if device == "gpu" else "fp32"
    tree = merge(tree, {"model": changes, "data": {"visual_budget": 1_000_000}})
    tree = merge(tree, {"train": {"trains": ["projector", "llm"], "precision": precision}})
    if layers is not None:
        tree = merge(tree, {"model": {"llm": {"num_layers": layers}}})
    config = from_dict(merge(tree, sections))
    check_config(config)
    return config


def _tiles(config: Config, visual: int, device: torch.device) -> torch.Tensor:
    tiles, rest = divmod(visual, config.model.vision.rows_per_tile)
    if rest:
        each = config.model.vision.rows_per_tile
        raise ValueError(f"{visual} visual rows are no multiple of an image's {each}")
    size = config.model.vision.image_size
    return torch.randint(0, 256, (tiles, 3, size, size), dtype=torch.uint8, device=device)


def _text(config: Config, text: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and labels of the second half of the rows."""
    ids = torch.randint(1000, config.model.llm.vocab_size, (text + 1,), device=device)
    labels = ids[1:].clone()
    labels[: text // 2] = IGNORED_LABEL
    return ids[:-1], labels


def trained_by(
    config: Config,
    groups: ProcessGroupCollection,
    device: torch.device,
    watch: Callable[[DattnModel], None] = lambda model: None,
) -> Callable[[ModelInputs], Step]:
    """What makes a training step of a micro-batch; all steps share one model and optimizer.

    Args:
        config: of the run.
        groups: process groups.
        device: where the model is.
        watch: gets the model before it is wrapped.
    """
    runtime = decide_runtime(config)
    (model,) = build_from_config(config, groups, device, runtime=runtime)
    watch(model)
    wrapped = wrap_ddp([model], config, groups)
    optimizer = build_optimizer(config, wrapped)
    scheduler = build_scheduler(config, optimizer, 10_000)

    def step_of(inputs: ModelInputs) -> Step:
        return lambda: train_step(wrapped, optimizer, scheduler, [inputs], groups)

    return step_of


def our_step(
    config: Config,
    groups: ProcessGroupCollection,
    device: torch.device,
    visual: list[int],
    text: int,
) -> dict[int, Step]:
    """A step of this code for each number of visual rows; they share one model."""
    step_over = trained_by(config, groups, device)

    def step_of(rows: int) -> Step:
        ids, labels = _text(config, text, device)
        params = build_seq_params(
            (((True, rows), (False, text)),),
            t2v_position=config.attention.t2v_position,
            multiple=config.data.pad_multiple,
            device=device,
        )
        return step_over(ModelInputs(params, ids, labels, _tiles(config, rows, device)))

    return {rows: step_of(rows) for rows in visual}


def llava_step(
    config: Config, device: torch.device, visual: list[int], text: int
) -> dict[int, Step]:
    """The same of Hugging Face's LLaVA with SDPA (which leaves out Gemma 2's soft-cap)."""
    with device:
        model = llava_model(config).to(params_dtype(config))
    model.model.vision_tower.requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    vision, image_token = config.model.vision, model.config.image_token_id

    def step_of(rows: int) -> Step:
        pixels = _tiles(config, rows, device).to(params_dtype(config)) / 255 - 0.5
        ids, labels = _text(config, text, device)
        supervised = (labels != IGNORED_LABEL).nonzero()[:, 0]
        images = ids.new_full((rows,), image_token)
        assert rows // vision.rows_per_tile == pixels.shape[0]

        def step() -> None:
            optimizer.zero_grad()
            logits = model(
                input_ids=torch.cat([images, ids])[None],
                pixel_values=pixels,
                logits_to_keep=supervised + rows,
                use_cache=False,
            ).logits[0]
            F.cross_entropy(logits.float(), labels[supervised]).backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()

        return on_cpu.natively(step)

    return {rows: step_of(rows) for rows in visual}


def llava_model(config: Config) -> Any:
    """A `LlavaForConditionalGeneration` of the configuration's sizes, weights at random."""
    import transformers

    llm, vision = config.model.llm, config.model.vision
    common = dict(
        vocab_size=llm.vocab_size,
        hidden_size=llm.hidden_size,
        intermediate_size=llm.ffn_hidden_size,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_attention_heads,
        num_key_value_heads=llm.num_query_groups,
        head_dim=llm.head_dim,
        max_position_embeddings=200_000,
        sliding_window=llm.sliding_window,
    )
    text: Any = transformers.MistralConfig(**common)
    if config.model.family == "gemma2":
        text = transformers.Gemma2Config(**common)
    tower = transformers.CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )
    llava = transformers.LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=7,
        vision_feature_layer=vision.select_layer,
        image_seq_length=vision.rows_per_tile,
        attn_implementation="sdpa",
    )
    return transformers.LlavaForConditionalGeneration(llava).train()
