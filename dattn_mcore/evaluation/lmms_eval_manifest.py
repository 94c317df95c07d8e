"""What lmms-eval's entry point group `lmms_eval.models` finds: the name of our model class."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The model `dattn_mcore` of `lmms_eval --model dattn_mcore`."""
    return ModelManifest(
        model_id="dattn_mcore",
        simple_class_path="dattn_mcore.evaluation.lmms_eval_model.DattnMcore",
    )
