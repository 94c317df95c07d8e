"""Whether a run takes Megatron-Core's own linears and norms, or Transformer Engine's."""

from __future__ import annotations

import functools
import logging

from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError
from dattn_mcore.parallel.packages import import_problem
from dattn_mcore.parallel.platform import current_device, fp8_problem
from dattn_mcore.types import Implementation

logger = logging.getLogger(__name__)


def transformer_engine_missing() -> str | None:
    """Why Transformer Engine cannot be used; None where it can."""
    problem = import_problem("transformer_engine.pytorch")
    return None if problem is None else f"it {problem}"


@functools.cache
def _say(text: str) -> None:
    logger.info("linears and norms: %s", text)


def choose_implementation(config: Config) -> Implementation:
    """`train.transformer_impl`, with `auto` resolved; says once what `auto` took, and why.

    Raises:
        ConfigError: Transformer Engine was asked for (by name, or by FP8) and cannot be used, or
            this GPU knows no FP8.
    """
    wanted, fp8 = config.train.transformer_impl, config.train.fp8 != "none"
    asked = f"train.fp8={config.train.fp8}" if fp8 else f"train.transformer_impl={wanted}"
    if wanted == "local":
        return "local"
    missing = transformer_engine_missing()
    if wanted == "transformer_engine" or fp8:
        if missing is not None:
            raise ConfigError(
                f"{asked} needs Transformer Engine, and {missing}; install it with "
                "pip install --no-build-isolation 'dattn-mcore[te]', or use "
                "train.transformer_impl=local and train.fp8=none"
            )
        problem = fp8_problem(config.train.fp8) if fp8 else None
        if problem is not None:
            raise ConfigError(f"{asked} {problem}; use train.fp8=none")
        return "transformer_engine"
    if current_device().type == "cpu":
        return "local"
    if config.train.precision != "bf16":
        _say(f"local (Transformer Engine is taken in bf16, not in {config.train.precision})")
        return "local"
    if missing is not None:
        _say(f"local (Transformer Engine: {missing})")
        return "local"
    _say("Transformer Engine")
    return "transformer_engine"
