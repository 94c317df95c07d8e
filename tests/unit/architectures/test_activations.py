"""The table of activations; `test_convert_exportable.py` compares them with transformers' own."""

import typing

import pytest
import torch.nn.functional as F

from dattn_mcore.architectures.activations import ACTIVATIONS
from dattn_mcore.architectures.features import TextFeatures
from dattn_mcore.models.transformer_configs import activation_function


def test_language_models_have_activations_of_the_table():
    words = typing.get_args(typing.get_type_hints(TextFeatures)["activation"])
    assert words and set(words) <= set(ACTIVATIONS)


@pytest.mark.parametrize(("name", "function"), [("silu", F.silu), ("gelu", F.gelu)])
def test_megatron_core_finds_the_functions_that_it_fuses(name, function):
    """It compares them by identity."""
    assert activation_function(name) is function
