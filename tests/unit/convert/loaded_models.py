"""A converted checkpoint as a run loads it: logits of text, features of random pixels."""

import torch

from dattn_mcore.checkpoint.load import load_weights
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.models.dattn import ModelInputs
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.training.model import build_from_config

CPU = torch.device("cpu")
LENGTH = 21  # text rows; longer than Gemma's small window of 6


def text_ids(config):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, config.model.llm.vocab_size, (LENGTH,), generator=generator)


def text_logits(model, config):
    """Logits of a text-only sample."""
    ids = text_ids(config)
    params = build_seq_params((((False, LENGTH),),), t2v_position="none", multiple=1)
    inputs = ModelInputs(params, ids, torch.full_like(ids, -100), None)
    with torch.no_grad():
        return model.eval()(inputs, return_logits=True)[:, : config.model.llm.vocab_size]


def pixels(config):
    side = config.model.vision.image_size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(4))


def load(path, config):
    """The checkpoint as a run gets it by checkpoint.init_from; logits and features."""
    with single_process() as groups:
        (model,) = build_from_config(config, groups, CPU)
        load_weights(path, config, [model], groups)
        with torch.no_grad():
            features = model.eval().vision(pixels(config))
        return text_logits(model, config), features
