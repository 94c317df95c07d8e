"""The exported processors refuse options that they do not honour."""

import numpy as np
import pytest
from PIL import Image

from dattn_mcore.hf import DattnImageProcessor, DattnProcessor

PICTURE = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))


FOUR = {"height": 4, "width": 4}


@pytest.mark.parametrize(
    "option",
    [
        {"do_resize": False},
        {"do_center_crop": True, "crop_size": FOUR},
        {"do_pad": True, "pad_size": FOUR},
    ],
)
def test_anyres_resizes_to_tiles_and_to_nothing_else(option):
    processor = DattnImageProcessor(size=FOUR)
    assert processor(PICTURE, return_tensors="pt")["pixel_values"].shape[1:] == (3, 4, 4)
    with pytest.raises(ValueError, match="cannot be given: tiles are of the size that"):
        processor(PICTURE, return_tensors="pt", **option)


def test_a_processor_names_what_it_does_not_know():
    with pytest.raises(TypeError, match="DattnProcessor does not know num_tokens, patch_size"):
        DattnProcessor(None, None, patch_size=14, num_tokens=3)
