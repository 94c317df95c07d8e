"""What makes each tower itself: with any of it turned off, its features are not Hugging Face's."""

import functools
import re
from dataclasses import replace

import pytest
import torch

from dattn_mcore.architectures import vision_towers
from dattn_mcore.config import optim_groups
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.training.model import build_from_config
from tests.unit.convert.raw_models import hugging_face_features, make_llm, make_tower, raw_config
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.hf_to_mcore import convert_parts

# A size, or a feature, that another tower has.
OFF = {
    "siglip": {
        "layer norms": {"normalization": "RMSNorm"},
        "bias of the patches": {"patch_bias": False},
        "biases of the layers": {"linear_bias": False},
        "last norm": {"final_norm": False},
        "last layer": {"select_layer": -2},
        "activation": {"activation": "quick_gelu"},
    },
    "clip": {
        "class row": {"class_row": False},
        "norm before the layers": {"pre_norm": False},
        "no last norm": {"final_norm": True},
        "activation": {"activation": "gelu_tanh"},
    },
    "aimv2": {
        "norms of the root mean square": {"normalization": "LayerNorm"},
        "norm of the patches": {"patch_norm": False},
        "norm before positions": {"patch_norm": False, "pre_norm": True},
        "gates": {"gated_mlp": False},
        "last norm": {"final_norm": False},
        "last layer": {"select_layer": -2},
        "activation": {"activation": "gelu_tanh"},
    },
}
CASES = [(kind, off) for kind, traits in OFF.items() for off in (None, *traits)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Gives a tower's checkpoint, its configuration, pixels, and Hugging Face's features."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        config = raw_config("mistral", kind, -1)
        make_llm(folder / "llm", config)
        tower = make_tower(folder / "vision", config)
        convert_parts(folder / "llm", folder / "vision", config, folder / "out")
        pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(4))
        return folder / "out", config, pixels, hugging_face_features(tower, config, pixels)

    return make


def fill(tower, path):
    """Loads what the checkpoint has under each name; rows that it lacks stay as constructed."""
    checkpoint = DistCheckpoint(path)
    filled = 0
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            layer = re.search(r"layers\.(\d+)\.", name)
            key = "vision." + re.sub(r"layers\.\d+\.", "layers.", name)
            if key in checkpoint.shapes:
                value = checkpoint.read(key, None if layer is None else int(layer[1]))
                rows = min(len(value), len(parameter))
                parameter[:rows] = value[:rows]
                filled += 1
    assert filled > 15


@pytest.fixture(autouse=True)
def no_table_is_kept():
    """What is known of a model's tensors goes by its sizes; here a record changes under them."""
    optim_groups._resolve.cache_clear()
    yield
    optim_groups._resolve.cache_clear()


def test_every_tower_is_held_to_its_traits():
    assert OFF.keys() == vision_towers().keys()


@pytest.mark.parametrize(("kind", "off"), CASES)
def test_features_show_every_trait(converted, kind, off, monkeypatch):
    path, config, pixels, expected = converted(kind)
    changes = OFF[kind].get(off, {})
    sizes = {name: value for name, value in changes.items() if hasattr(config.model.vision, name)}
    others = {name: value for name, value in changes.items() if name not in sizes}
    record = vision_towers()[kind]
    features = replace(record.features, **others)
    monkeypatch.setitem(vision_towers(), kind, replace(record, features=features))
    vision = replace(config.model.vision, **sizes)
    config = replace(config, model=replace(config.model, vision=vision))
    with single_process() as groups:
        (model,) = build_from_config(config, groups, CPU)
        tower = model.eval().vision
        fill(tower, path)
        with torch.no_grad():
            difference = (tower(pixels) - expected).abs().max()
    assert expected.std() > 0.1  # all alike would prove nothing
    # Far from the bound on both sides, so that no luck decides.
    assert difference < 1e-4 if off is None else difference > 1e-2
