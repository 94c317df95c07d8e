"""The Hugging Face model and processor: plain PyTorch and transformers, no Megatron.

`register()` makes the Auto classes know model type `dattn`; exported folders need it not, they
carry these files as remote code.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .configuration_dattn import AUTO_MAP, IMAGE_PROCESSOR_AUTO_MAP, DattnConfig
from .image_processing_dattn import DattnImageProcessor
from .layout_dattn import DattnCache
from .modeling_dattn import DattnForConditionalGeneration, DattnModel
from .processing_dattn import DattnProcessor

REMOTE_CODE_FILES = (
    "configuration_dattn.py",
    "layout_dattn.py",
    "attention_dattn.py",
    "visual_dattn.py",
    "modeling_dattn.py",
    "image_processing_dattn.py",
    "processing_dattn.py",
)


def register() -> None:
    """Registers model type `dattn` with the Auto classes; harmless when called again."""
    AutoConfig.register("dattn", DattnConfig, exist_ok=True)
    AutoImageProcessor.register(
        DattnConfig, image_processor_classes={"pil": DattnImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(DattnConfig, DattnProcessor, exist_ok=True)
    AutoModelForImageTextToText.register(DattnConfig, DattnForConditionalGeneration, exist_ok=True)
    AutoModelForCausalLM.register(DattnConfig, DattnForConditionalGeneration, exist_ok=True)


__all__ = [
    "AUTO_MAP",
    "IMAGE_PROCESSOR_AUTO_MAP",
    "REMOTE_CODE_FILES",
    "DattnCache",
    "DattnConfig",
    "DattnForConditionalGeneration",
    "DattnImageProcessor",
    "DattnModel",
    "DattnProcessor",
    "register",
]
