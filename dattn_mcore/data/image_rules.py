"""The image rules of a run, from its settings; the rules themselves stand beside the export."""

from __future__ import annotations

from dataclasses import replace

from dattn_mcore.config.schema import DataConfig
from dattn_mcore.hf.image_rules_dattn import ImageRules

DEFAULT_RULES = ImageRules()


def rules_of(data: DataConfig) -> ImageRules:
    """What a run does with its images; a rule that does not concern its policy is the old one."""
    rules = ImageRules(data.apply_orientation, data.transparency, data.anyres_ties)
    if data.image_policy != "anyres_stretch":
        rules = replace(rules, anyres_ties="first")
    return rules
