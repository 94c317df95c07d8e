"""Whether samples that show the same images can share their visual rows (`data.share_images`)."""

from __future__ import annotations

from dattn_mcore.config.schema import Config


def why_apart(config: Config) -> str | None:
    """Why the samples of a run share no visual rows; None where they can.

    Args:
        config: The run.
    """
    attention = config.attention
    if not config.data.share_images:
        return "data.share_images=false"
    if attention.v2v != "diagonal":
        return f"attention.v2v={attention.v2v}: visual rows attend to others of their sample"
    if attention.t2v_position != "none":
        return f"attention.t2v_position={attention.t2v_position}: a row has a place in its sample"
    if config.lora.targets and config.lora.dropout:
        return f"lora.dropout={config.lora.dropout:g}: each sample draws its own"
    return None
