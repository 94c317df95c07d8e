"""Small random language models and towers, as transformers itself writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    Ministral3ForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    SmolLM3ForCausalLM,
)

from dattn_mcore.config.schema import Config
from tests.unit.convert.convert_helpers import small_config
from tools.checkpoint_convert.configs import TokenIds, text_to_hf, vision_to_hf

LLMS = {
    "mistral": MistralForCausalLM,
    "gemma2": Gemma2ForCausalLM,
    "gemma3": Gemma3ForCausalLM,
    "llama": LlamaForCausalLM,
    "ministral3": Ministral3ForCausalLM,
    "olmo2": Olmo2ForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "smollm3": SmolLM3ForCausalLM,
}
TOWERS = {"siglip": SiglipVisionModel, "clip": CLIPVisionModel, "aimv2": Aimv2VisionModel}
WHOLE = {
    "siglip": (SiglipConfig, SiglipModel),
    "clip": (CLIPConfig, CLIPModel),
    "aimv2": (Aimv2Config, Aimv2Model),
}
# Switches of a head that pools rows, which published folders may have.
HEADS = {"siglip": "vision_use_head", "aimv2": "use_head"}
IDS = TokenIds(bos=1, eos=2, pad=0, image=3, stop=(2,))


def raw_config(family: str, kind: str, select_layer: int = -2, **changes: Any) -> Config:
    """A small run whose caps, window and query scale all matter."""
    config = small_config(Path("none"), family, kind)
    llm = config.model.llm
    if family != "gemma3":
        llm = replace(llm, rotary_base=100.0)
    if family == "gemma2":
        llm = replace(llm, attention_softcap=2.0, final_softcap=3.0, query_scale=24.0)
    llm = replace(llm, **changes)
    vision = replace(config.model.vision, select_layer=select_layer)
    return replace(config, model=replace(config.model, llm=llm, vision=vision))


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Large random weights everywhere, so that every term matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(noise * 0.3)
            else:
                parameter.copy_(noise * (0.4 if "q_proj" in name or "k_proj" in name else 0.2))


def make_llm(folder: Path, config: Config, dtype=torch.float32, shard: str = "5GB") -> Any:
    """Writes a language model's folder and returns the model."""
    family = config.model.family
    hf = text_to_hf(config.model, IDS, dtype)
    hf._attn_implementation = "eager"
    model = LLMS[family](hf).eval()
    randomize(model)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def make_tower(folder: Path, config: Config, whole: bool = False, dtype=torch.float32) -> Any:
    """Writes a tower's folder, or that of the whole model that has it; returns the tower."""
    vision = config.model.vision
    hf = vision_to_hf(vision, dtype)
    if vision.kind in HEADS:
        setattr(hf, HEADS[vision.kind], True)
    if whole:
        configuration, model_class = WHOLE[vision.kind]
        text = dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=20,
            projection_size=24,
        )
        both = configuration(text_config=text, vision_config=hf.to_dict())
        model: Any = model_class(both).eval()
        tower = model.vision_model
    else:
        model = tower = TOWERS[vision.kind](hf).eval()
    randomize(model)
    model.to(dtype).save_pretrained(folder)
    return tower


def rename(folder: Path, change: Any) -> None:
    """Rewrites a folder's single file with other names (None: left out)."""
    file = folder / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(file).items()}
    tensors.pop(None, None)
    save_file(tensors, file, metadata={"format": "pt"})


def older_names(folder: Path) -> None:
    """The tower's names as transformers 4 wrote them."""
    rename(folder, lambda n: n if n.startswith("vision_model.") else "vision_model." + n)


def newer_names(folder: Path) -> None:
    """The tower's names as the modules of transformers 5 are called."""
    rename(folder, lambda n: n.removeprefix("vision_model."))


def hugging_face_features(tower, config, pixel_values):
    """Patch features of the selected layer, by transformers alone."""
    select = config.model.vision.select_layer
    with torch.no_grad():
        out = tower(pixel_values, output_hidden_states=True)
    clip = config.model.vision.kind == "clip"
    last = out.last_hidden_state if select == -1 and not clip else out.hidden_states[select]
    return last[:, 1:] if clip else last
