"""What every entry point does before Megatron-Core is imported; never at import."""

from __future__ import annotations

from dattn_mcore.parallel import gpus, packages, platform


def prepare_imports(device: str) -> None:
    """Makes Megatron-Core's import quick and safe from broken packages, and hides no warning.

    No warning of the device, that is: what PyTorch says of a GPU must be seen.

    Args:
        device: `train.device`; cpu where nothing is computed on a GPU.
    """
    gpus.show_warnings()
    platform.load_no_compiler(device)
    packages.hide_broken([*packages.TRIED_BY_MEGATRON, platform.ADDS_GRADIENTS])
