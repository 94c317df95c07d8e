"""An export loads and generates in a process that has neither this package nor Megatron."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dattn_mcore.architectures.tables import model_table
from dattn_mcore.hf import REMOTE_CODE_FILES
from tests.unit.convert.convert_helpers import make_tokenizer, plan, random_tensors, small_config
from tools.checkpoint_convert import mcore_to_hf
from tools.checkpoint_convert.dist_checkpoint import write_checkpoint
from tools.checkpoint_convert.mcore_to_hf import EMBEDDING, ExportOptions


@pytest.mark.parametrize(
    ("family", "policy"),
    [("mistral", "stretch"), ("gemma2", "anyres_letterbox")],
)
def test_export_stands_alone(tmp_path, family, policy):
    """Auto classes, generation with and without cache, batched and alone, text-only too."""
    tokenizer = make_tokenizer(tmp_path)
    config = small_config(tokenizer, family)
    config = replace(config, data=replace(config.data, image_policy=policy))
    table = model_table(config.model)
    tensors = random_tensors(table)
    if config.model.llm.tie_embeddings:  # else its head answers with the word that it has just read
        for (key, layer), tensor in tensors.items():
            if key == EMBEDDING:
                tensor.mul_(0.1)
            elif "linear" in key and (layer is not None or "projector" in key):
                tensor.mul_(2.0)
    write_checkpoint(tmp_path / "a", plan(table, tensors), config)
    mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf", ExportOptions(max_shard_bytes=100_000))
    script = Path(__file__).with_name("load_alone.py")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "hf"), str(tmp_path / "again")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["foreign"] == []
    assert result["model_type"] == "dattn"
    assert result["class"].startswith("transformers_modules.")
    # Else a model that says one word whatever it is asked would pass.
    assert all(len(set(answer)) > 2 for answer in result["alone"]), result["alone"]
    assert len(set(map(tuple, result["alone"]))) == 3
    assert result["cached"] == result["uncached"] == result["alone"] == result["causal_lm"]
    assert result["kept"] == [result["cached"]] * 2
    assert result["held"] == [3, 3]
    assert result["in_parts"] == result["alone"][:1]
    assert result["again"] == result["cached"]
    code = set(REMOTE_CODE_FILES) - {"image_processing_dattn.py"}  # that comes where it is used
    assert code <= set(result["again_files"])
    assert result["image_processor"].startswith("transformers_modules.")
    if policy.startswith("anyres"):
        assert result["grids"] == [[1, 2], [3, 1], [1, 3]] and result["tiles"] == 3 + 4 + 4
    else:
        assert result["grids"] is None and result["tiles"] == 3
    assert result["stop"] == ([2] if family == "mistral" else [2, 7])
