"""Parameters of the projector between tower and language model.

Its Hugging Face form is this project's own.
"""

from __future__ import annotations

from dattn_mcore.architectures.parameters import PROJECTOR, Entry, linear, norm
from dattn_mcore.architectures.sizes import ModelConfig

TIME_POSITION = "projector.time_position."  # how the names of its parameters begin


def projector_table(model: ModelConfig) -> list[Entry]:
    """MLP, norms, and the row, column and time positions if there are any."""
    hidden, ffn = model.llm.hidden_size, model.projector.ffn_hidden_size
    entries = [
        *linear(
            "projector.mlp.linear_fc1",
            f"{PROJECTOR}linear_1",
            (ffn, model.vision.hidden_size),
            tp_axis=0,
            start="fan_in",
        ),
        *linear(
            "projector.mlp.linear_fc2",
            f"{PROJECTOR}linear_2",
            (hidden, ffn),
            tp_axis=1,
            start="fan_in",
        ),
        *norm("projector.norm", f"{PROJECTOR}norm", hidden),
    ]
    if model.visual_positions:
        axes = ("row_position", "column_position", "time_position")
        for axis in axes if model.time_positions else axes[:2]:
            for layer in ("fc1", "fc2"):
                entries += linear(
                    f"projector.{axis}.{layer}",
                    f"{PROJECTOR}{axis}.{layer}",
                    (hidden, hidden),
                    dtype="float32",
                    start="fan_in",
                )
    entries.append(
        Entry(
            "projector.output_norm.weight",
            {f"{PROJECTOR}output_norm.weight": (hidden,)},
            start="constant",
            constant=model.projector.output_norm_init,
        )
    )
    return entries
