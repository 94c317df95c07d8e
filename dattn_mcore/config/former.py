"""Settings of before that have another form now; a file that has them still means what it said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dattn_mcore.architectures import language_models
from dattn_mcore.architectures.features import SANDWICH_NORMS, TextFeatures
from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.errors import ConfigError


def translated(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of settings in today's form.

    What a family's models have in common was once set one by one; it must be what they have. Who
    makes linears and norms was once a setting of the model.

    Raises:
        ConfigError: a setting of before says what no model of the family has, or another thing than
            the setting that took its place.
    """
    tree = _implementation_of_the_run(tree)
    model = tree.get("model")
    llm = model.get("llm") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(llm, Mapping):
        return tree
    family = model.get("family", ModelConfig.family)
    llm = dict(llm)
    if isinstance(family, str) and family in language_models():
        _check_features(llm, family, language_models()[family].features)
    _to_pattern(llm)
    return {**tree, "model": {**model, "llm": llm}}


def _implementation_of_the_run(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`model.transformer_impl` as `train.transformer_impl`."""
    model, train = tree.get("model"), tree.get("train", {})
    if not isinstance(model, Mapping) or not isinstance(train, Mapping):
        return dict(tree)
    if "transformer_impl" not in model:
        return dict(tree)
    others = {name: value for name, value in model.items() if name != "transformer_impl"}
    former = model["transformer_impl"]
    if train.get("transformer_impl", former) != former:
        raise ConfigError(
            f"model.transformer_impl={former} is the former name of train.transformer_impl, which "
            f"is {train['transformer_impl']} here; leave the former out"
        )
    return {**tree, "model": others, "train": {**train, "transformer_impl": former}}


def _check_features(llm: dict[str, Any], family: str, features: TextFeatures) -> None:
    """Takes the settings of before that say what the family has away."""
    of_family = {
        "activation": features.activation,
        "zero_centered_gamma": features.zero_centered_gamma,
        "post_norms": features.norms == SANDWICH_NORMS,
        "scale_embeddings": features.scale_embeddings,
    }
    wrong = []
    for name, value in of_family.items():
        if name in llm and llm.pop(name) != value:
            shown = str(value).lower()
            wrong.append(
                f"model.llm.{name} is no setting any more: model.family={family} has "
                f"{name}={shown}; leave it out, or use another model.family"
            )
    if wrong:
        raise ConfigError(*wrong)


def _to_pattern(llm: dict[str, Any]) -> None:
    """Windows on layers 0, n, 2n, ... (`sliding_window_every`) as a pattern."""
    every = llm.pop("sliding_window_every", 1)
    if type(every) is not int or every < 1:
        raise ConfigError(
            f"model.llm.sliding_window_every={every!r} is no setting any more; write "
            "model.llm.layer_pattern, for example [sliding, full]"
        )
    if every > 1 and llm.get("sliding_window") is not None:
        llm.setdefault("layer_pattern", ["sliding", *["full"] * (every - 1)])
