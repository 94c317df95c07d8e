"""Every shipped configuration rehearsed on 1, 4 and 64 nodes, beside the planner (`make rehearse`).

    python -m benchmarks.rehearse_shipped [configs/gemma_pt.yaml ...]

The first and the last stage's first rank of each. Exit status 1: weights, gradients or optimizer
states are not the planner's to the byte, or kept activations are more than 5 % apart.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

from dattn_mcore.parallel import entry, platform

entry.prepare_imports("cpu")
warnings.filterwarnings("ignore")  # packages for GPUs that are not here

from dattn_mcore.config.load import load_config
from dattn_mcore.training.rehearsal_report import compared, rehearse_full
from dattn_mcore.training.rehearse import as_rehearsed, last_stage_rank

ROOT = Path(__file__).resolve().parents[1]
NODES, GPUS_PER_NODE = (1, 4, 64), 8
BOUND = 0.05
GIB = 2**30
HEADER = (
    f"{'configuration':<20}{'ranks':>6}{'rank':>6}{'stage':>6}  {'states':<8}"
    f"{'GiB of activations':>20}{'planned':>9}{'most at once':>14}{'planned':>9}"
)


def main(arguments: list[str] | None = None) -> int:
    """Prints a line a rank; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", nargs="*", type=Path, help="default: all of configs/")
    chosen = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    platform.install("cpu")
    paths = chosen.configs or sorted((ROOT / "configs").glob("*.yaml"))
    sys.stdout.write(HEADER + "\n")
    good = True
    for path in paths:
        config, _ = as_rehearsed(load_config(path))
        for nodes in NODES:
            world_size = nodes * GPUS_PER_NODE
            for rank in sorted({0, last_stage_rank(config, world_size)}):
                rehearsed = rehearse_full(config, world_size, rank)
                memory, _ = compared(config, rehearsed)
                equal = all(row.apart == 0 for row in memory if row.exact)
                kept, most = (
                    next(row for row in memory if row.name == name)
                    for name in ("activations kept", "most beside states")
                )
                good = good and equal and abs(kept.apart) <= BOUND
                sys.stdout.write(
                    f"{path.stem:<20}{world_size:>6}{rank:>6}{rehearsed.stage:>6}  "
                    f"{'equal' if equal else 'apart':<8}{kept.rehearsed / GIB:>20.2f}"
                    f"{kept.apart:>+9.1%}{most.rehearsed / GIB:>14.2f}{most.apart:>+9.1%}\n"
                )
                sys.stdout.flush()
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
