"""Activations of MLPs: their names in transformers, and the functions that compute them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dattn_mcore.architectures.sizes import TowerActivation


@dataclass(frozen=True)
class Activation:
    """One activation; nothing is imported for it before a model is built.

    Attributes:
        hugging_face: its name in configurations of transformers.
        function: that computes it, as `module:name`.
        arguments: by keyword, beside the tensor.
    """

    hugging_face: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


# A further word is one of `TowerActivation` and a line here.
ACTIVATIONS: dict[TowerActivation, Activation] = {
    "gelu_tanh": Activation(
        hugging_face="gelu_pytorch_tanh",
        function="torch.nn.functional:gelu",
        arguments={"approximate": "tanh"},
    ),
    "gelu": Activation(hugging_face="gelu", function="torch.nn.functional:gelu"),
    "quick_gelu": Activation(
        hugging_face="quick_gelu", function="megatron.core.activations:quick_gelu"
    ),
    "silu": Activation(hugging_face="silu", function="torch.nn.functional:silu"),
}
