"""The projector between tower and language model; its Hugging Face form is this project's own."""

from __future__ import annotations

from dattn_mcore.config.schema import ModelConfig
from tools.checkpoint_convert.mapping import Entry, linear, norm

PREFIX = "model.multi_modal_projector."


def table(model: ModelConfig) -> list[Entry]:
    """MLP, norms, and the row and column positions if there are any."""
    hidden, ffn = model.llm.hidden_size, model.projector.ffn_hidden_size
    entries = [
        *linear("projector.mlp.linear_fc1", PREFIX + "linear_1", ffn, model.vision.hidden_size),
        *linear("projector.mlp.linear_fc2", PREFIX + "linear_2", hidden, ffn),
        *norm("projector.norm", PREFIX + "norm", hidden),
        *norm("projector.output_norm", PREFIX + "output_norm", hidden),
    ]
    if model.visual_positions:
        for axis in ("row_position", "column_position"):
            for layer in ("fc1", "fc2"):
                name = f"{axis}.{layer}"
                entries += linear(f"projector.{name}", PREFIX + name, hidden, hidden)
    return entries
