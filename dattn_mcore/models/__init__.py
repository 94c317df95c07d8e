"""The model, assembled by pipeline stage: vision tower, projector, language model.

It knows no run: a trainer gives `build_model` what the model is, how its attention is decomposed,
how it is computed, and process groups (examples/python/own_loop.py).
"""

from dattn_mcore.models.build import build_model
from dattn_mcore.models.dattn import DattnModel, ModelInputs, freeze_all_but

__all__ = ["DattnModel", "ModelInputs", "build_model", "freeze_all_but"]
