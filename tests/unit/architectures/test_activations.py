"""The table of activations; `test_convert_exportable.py` compares them with transformers' own."""

import typing

from dattn_mcore.architectures.activations import ACTIVATIONS
from dattn_mcore.architectures.features import TextFeatures


def test_language_models_have_activations_of_the_table():
    words = typing.get_args(typing.get_type_hints(TextFeatures)["activation"])
    assert words and set(words) <= set(ACTIVATIONS)
