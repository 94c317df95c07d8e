"""A bf16 export as its users load it: dtypes, logits near float32's, generation, local classes."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from dattn_mcore.hf import DattnImageProcessor, register
from tests.unit.convert.convert_helpers import make_checkpoint, make_tokenizer, small_config
from tools.checkpoint_convert import mcore_to_hf

LOCAL = {"trust_remote_code": False, "local_files_only": True}
NEW = 6


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_bf16_export_generates(tmp_path, family):
    config = small_config(make_tokenizer(tmp_path), family)
    config = replace(config, data=replace(config.data, image_policy="anyres_stretch"))
    make_checkpoint(tmp_path / "a", config, torch.bfloat16)
    mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf")
    register()
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", **LOCAL)
    assert type(processor.image_processor) is DattnImageProcessor
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", dtype="auto", **LOCAL)
    wide = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, **LOCAL
    )
    for name, parameter in model.named_parameters():  # positions keep their bits
        expected = torch.float32 if "_position." in name else torch.bfloat16
        assert parameter.dtype == expected, name
    images = [Image.new("RGB", size, (90, i * 99, 7)) for i, size in enumerate([(90, 30), (9, 9)])]
    texts = ["<s>[INST] <image> top <image>?[/INST]", "<s>[INST] cell?[/INST]"]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    tokens = model.eval().generate(**inputs, **settings)
    assert tokens.shape == (2, inputs["input_ids"].shape[1] + NEW)
    with torch.no_grad():
        narrow, full = (m(**inputs).logits[:, -1].float() for m in (model, wide.eval()))
    # Three layers in bf16 (8 bits) drift by some percent of the logits.
    assert (narrow - full).abs().max() < 0.2 * full.abs().max()
    assert full.std() > 0.1
