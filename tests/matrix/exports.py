"""Small exports of every model architecture, with what the trainer says to some conversations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

from dattn_mcore.architectures.tables import model_table
from dattn_mcore.config.schema import Config
from dattn_mcore.data.tokenizer import load_tokenizer
from tests.matrix.trainer_answers import save_answers
from tests.unit.convert.convert_helpers import plan, random_tensors, small_config
from tools.checkpoint_convert import mcore_to_hf
from tools.checkpoint_convert.dist_checkpoint import write_checkpoint
from tools.checkpoint_convert.mcore_to_hf import EMBEDDING, ExportOptions
from tools.checkpoint_convert.streaming import Planned
from tools.checkpoint_convert.tokenizers_out import from_sentencepiece


@dataclass(frozen=True)
class Architecture:
    """One model of the matrix.

    Attributes:
        family: of the language model.
        tower: kind of the vision tower.
        policy: how an image becomes tiles.
        vocab_size: 320 are the tokenizer's, so that the image token is `vocab_size` itself; with
            more it is one of the vocabulary.
        attention: settings of the attention that differ from the defaults.
        model: settings of the model that differ from the defaults.
        window: sliding window of every layer (Mistral; Gemma 2 has one on every second).
        template: chat template; None: the family's own, whose tokens the tokenizer must have.
        adds_bos: whether the tokenizer is one of Hugging Face that puts the first token in front
            by itself, as Mistral's and Gemma's do; the chat template writes one, too.
        seed: of the weights, chosen so that answers differ from one another and hold several words.
    """

    family: str
    tower: str
    policy: str
    vocab_size: int = 320
    attention: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    window: int | None = None
    template: str | None = None
    adds_bos: bool = False
    seed: int = 0


# Of the first two families every pair with tower, and square tile or AnyRes; of each further one
# what it adds to the layers, and so of each further tower. The rest is spread over them.
ARCHITECTURES = {
    "mistral_siglip_square": Architecture(
        "mistral", "siglip", "stretch", vocab_size=330, adds_bos=True, seed=8
    ),
    "mistral_clip_anyres": Architecture(
        "mistral",
        "clip",
        "anyres_letterbox",
        attention={"v2v": "causal", "t2v_position": "rope"},
        window=6,
        seed=1,
    ),
    "gemma2_siglip_anyres": Architecture("gemma2", "siglip", "anyres_stretch", seed=1),
    "gemma2_clip_square": Architecture(
        "gemma2",
        "clip",
        "pad",
        vocab_size=330,
        attention={"merge": "sum"},
        model={"visual_positions": False},
        seed=1,
    ),
    "gemma3_siglip_square": Architecture("gemma3", "siglip", "stretch", seed=0),
    "llama_siglip_square": Architecture("llama", "siglip", "stretch", template="mistral", seed=1),
    "ministral3_siglip_square": Architecture(
        "ministral3", "siglip", "stretch", template="mistral", seed=0
    ),
    "olmo2_siglip_square": Architecture("olmo2", "siglip", "stretch", template="mistral", seed=0),
    "qwen2_clip_anyres": Architecture(
        "qwen2", "clip", "anyres_letterbox", template="mistral", seed=0
    ),
    "qwen3_clip_square": Architecture("qwen3", "clip", "crop", template="mistral", seed=0),
    "qwen3_aimv2_anyres": Architecture(
        "qwen3", "aimv2", "anyres_stretch", template="mistral", seed=4
    ),
    "smollm3_siglip_anyres": Architecture(
        "smollm3", "siglip", "anyres_stretch", template="mistral", seed=1
    ),
}


def make_export(folder: Path, name: str, tokenizer: Path) -> Path:
    """Writes an export and, beside it in `NAME.trainer`, what the trainer says.

    Args:
        folder: gets both.
        name: one of `ARCHITECTURES`.
        tokenizer: SentencePiece file of the run.

    Returns:
        The export.
    """
    architecture = ARCHITECTURES[name]
    if architecture.adds_bos:
        tokenizer = _adding_bos(tokenizer, folder / f"{name}.tokenizer")
    config = trainer_config(architecture, tokenizer)
    checkpoint, export = folder / f"{name}.mcore", folder / name
    write_checkpoint(checkpoint, _lively_weights(config, architecture.seed), config)
    mcore_to_hf.convert(checkpoint, export, ExportOptions(max_shard_bytes=100_000))
    save_answers(folder / f"{name}.trainer", checkpoint, config, load_tokenizer(tokenizer), export)
    return export


def _adding_bos(model: Path, folder: Path) -> Path:
    """A SentencePiece model as a Hugging Face tokenizer that adds the first token by itself."""
    tokenizer = from_sentencepiece(model)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    assert tokenizer("a")["input_ids"][0] == bos[1]
    tokenizer.save_pretrained(folder)
    return folder


def trainer_config(architecture: Architecture, tokenizer: Path) -> Config:
    """The run that would have trained an architecture, in float32."""
    config = small_config(
        tokenizer,
        architecture.family,
        architecture.tower,
        template=architecture.template,
        vocab_size=architecture.vocab_size,
        **architecture.model,
    )
    llm = config.model.llm
    if architecture.window is not None:
        llm = replace(llm, sliding_window=architecture.window)
    return replace(
        config,
        model=replace(config.model, llm=llm),
        attention=replace(config.attention, **architecture.attention),
        data=replace(config.data, image_policy=architecture.policy),
        train=replace(config.train, precision="fp32", recompute="none"),
    )


def _lively_weights(config: Config, seed: int) -> list[Planned]:
    """Weights of a model that says other things about other prompts, not one word for ever."""
    table = model_table(config.model)
    tensors = random_tensors(table, seed=seed)
    for (key, layer), tensor in tensors.items():
        if key == EMBEDDING and config.model.llm.tie_embeddings:
            tensor.mul_(0.1)  # else its head answers with the word that it has just read
        elif "linear" in key and (layer is not None or "projector" in key):
            tensor.mul_(2.0)
    return plan(table, tensors)
