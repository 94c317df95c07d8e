"""The Hugging Face model and processor: plain PyTorch and transformers, no Megatron.

`register()` makes the Auto classes know model type `dattn`; exported folders need it not, they
carry these files as remote code. Names are imported when they are used: the configuration alone
costs a fraction of what the model does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache_dattn import DattnCache
    from .configuration_dattn import (
        AUTO_MAP,
        IMAGE_PROCESSOR_AUTO_MAP,
        TESTED_TRANSFORMERS,
        DattnConfig,
    )
    from .image_cache_dattn import DattnImageCache
    from .image_processing_dattn import DattnImageProcessor
    from .modeling_dattn import DattnForConditionalGeneration, DattnModel
    from .processing_dattn import DattnProcessor

_MODULES = {
    "AUTO_MAP": "configuration_dattn",
    "IMAGE_PROCESSOR_AUTO_MAP": "configuration_dattn",
    "TESTED_TRANSFORMERS": "configuration_dattn",
    "DattnConfig": "configuration_dattn",
    "DattnCache": "cache_dattn",
    "DattnImageCache": "image_cache_dattn",
    "DattnImageProcessor": "image_processing_dattn",
    "DattnForConditionalGeneration": "modeling_dattn",
    "DattnModel": "modeling_dattn",
    "DattnProcessor": "processing_dattn",
}
REMOTE_CODE_FILES = (
    "configuration_dattn.py",
    "layers_dattn.py",
    "layout_dattn.py",
    "shared_images_dattn.py",
    "shared_attention_dattn.py",
    "cache_dattn.py",
    "arguments_dattn.py",
    "samples_dattn.py",
    "attention_dattn.py",
    "text_dattn.py",
    "visual_dattn.py",
    "fingerprint_dattn.py",
    "image_cache_dattn.py",
    "generation_dattn.py",
    "modeling_dattn.py",
    "image_rules_dattn.py",
    "image_processing_dattn.py",
    "processing_dattn.py",
)
# Left open, transformers asks on the terminal whether it may run a folder's own code.
NO_FOREIGN_CODE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def register() -> None:
    """Registers model type `dattn` with the Auto classes; harmless when called again."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    # Where it lies: at the top level, some releases have it only beside torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from . import (
        DattnConfig,
        DattnForConditionalGeneration,
        DattnImageProcessor,
        DattnModel,
        DattnProcessor,
    )

    AutoConfig.register("dattn", DattnConfig, exist_ok=True)
    AutoImageProcessor.register(
        DattnConfig, image_processor_classes={"pil": DattnImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(DattnConfig, DattnProcessor, exist_ok=True)
    AutoModel.register(DattnConfig, DattnModel, exist_ok=True)
    AutoModelForImageTextToText.register(DattnConfig, DattnForConditionalGeneration, exist_ok=True)
    AutoModelForCausalLM.register(DattnConfig, DattnForConditionalGeneration, exist_ok=True)


__all__ = [
    "AUTO_MAP",
    "IMAGE_PROCESSOR_AUTO_MAP",
    "REMOTE_CODE_FILES",
    "TESTED_TRANSFORMERS",
    "DattnCache",
    "DattnConfig",
    "DattnForConditionalGeneration",
    "DattnImageCache",
    "DattnImageProcessor",
    "DattnModel",
    "DattnProcessor",
    "register",
]
