"""The command line of `pretrain_dattn.py` and `dattn train`: settings, processes, errors."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dattn_mcore.config.checks import (
    check_config,
    check_rehearsed,
    data_parallel_size,
    processes_per_replica,
)
from dattn_mcore.config.hints import SHORT_FLAGS, unknown_flag
from dattn_mcore.config.load import load_config
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError, DattnError, FaultError, error_lines
from dattn_mcore.log import log_to_stdout
from dattn_mcore.orphans import signal_when_parent_ends
from dattn_mcore.training.launch import restart_under_torchrun

PROGRAM = "pretrain_dattn.py"
FAULT_STATUS = 4  # of a rank that a machine or the network ended; a user's mistake is 2
SPEAKER_SECONDS = 20.0  # how long other ranks wait for rank 0 to report a mistake and end
_SHOWN = 100  # characters of what was typed
logger = logging.getLogger("dattn_mcore")


@dataclass(frozen=True)
class Instead:
    """What the command does instead of training, if anything.

    Attributes:
        dry_run: print configuration, layout and sizes.
        processes: of the job that is rehearsed; None: none is.
        rank: of the job, to be rehearsed; None: the first of the first and of the last stage.
    """

    dry_run: bool
    processes: int | None
    rank: int | None


def parse_arguments(
    arguments: Sequence[str] | None = None, prog: str = PROGRAM
) -> tuple[Config, Instead]:
    """Reads the command line into a checked configuration, and what to do instead of training."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train a D-Attn vision-language model with Megatron-Core.",
        epilog="Any setting can follow as section.key=value, for example optim.lr=1e-4. Alone "
        "it starts as many processes as one model needs; for data parallel replicas, start "
        f"torchrun --nproc-per-node 8 {_under_torchrun(prog)} ...",
    )
    add_settings(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print configuration, layout and sizes, and stop"
    )
    parser.add_argument(
        "--rehearse",
        metavar="N",
        help="build ranks of a job of N processes at its true size without memory, print what they "
        "hold and exchange, and stop",
    )
    parser.add_argument(
        "--rehearse-rank",
        metavar="R",
        help="which rank (default: the first of the first and of the last stage)",
    )
    config, chosen = read_settings(parser, arguments)
    processes = _whole_number("--rehearse", chosen.rehearse)
    rank = _whole_number("--rehearse-rank", chosen.rehearse_rank)
    if rank is not None and processes is None:
        raise ConfigError(f"--rehearse-rank {rank} needs --rehearse N, the processes of the job")
    if processes is not None:
        check_rehearsed(config, processes, rank)
    return config, Instead(dry_run=chosen.dry_run, processes=processes, rank=rank)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that make up a run's configuration."""
    parser.add_argument("--config", help="YAML file (default: the embedded digits task)")
    parser.add_argument("--tp", help="tensor parallel size")
    parser.add_argument("--pp", help="pipeline parallel size")
    parser.add_argument("--cp", help="context parallel size")
    parser.add_argument("--device", help="auto, cpu or gpu")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def read_settings(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[Config, argparse.Namespace]:
    """Reads a command line with the arguments of `add_settings`.

    Returns:
        The checked configuration, and everything that was given.

    Raises:
        ConfigError: an unknown flag, or a configuration that cannot run.
    """
    chosen, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise ConfigError(unknown_flag(unknown[0]))
    flags = [
        f"{name}={getattr(chosen, flag)}"
        for flag, name in SHORT_FLAGS.items()
        if getattr(chosen, flag) is not None
    ]
    config = load_config(chosen.config, [*chosen.overrides, *flags])
    check_config(config)
    return config, chosen


def _whole_number(flag: str, given: str | None) -> int | None:
    if given is None:
        return None
    if not given.isascii() or not given.isdigit():
        raise ConfigError(f"{flag} {given[:_SHOWN]} must be a whole number, 0 or more")
    return int(given)


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Runs the command; returns the exit status (2 for a user's mistake, 4 for a fault)."""
    rank = int(os.environ.get("RANK", "0"))
    _set_up_logging(rank)
    try:
        config, instead = parse_arguments(arguments, prog)
        if instead.processes is not None:
            if rank == 0:
                sys.stdout.write(_rehearsal(config, instead.processes, instead.rank))
            return 0
        if instead.dry_run:
            from dattn_mcore.parallel import entry, platform

            entry.prepare_imports(config.train.device)
            from dattn_mcore.training.dry_run import describe

            if config.train.deterministic:
                platform.make_deterministic()  # kernels are chosen by it
            if rank == 0:
                sys.stdout.write(describe(config, int(os.environ.get("WORLD_SIZE", "1"))))
            return 0
        return _run(config, sys.argv[1:] if arguments is None else arguments, prog)
    except DattnError as error:
        fault = isinstance(error, FaultError)
        if rank == 0 if error.shared else error.speaks:
            # Most mistakes are the same on all ranks, and one says so.
            sys.stderr.write(error_lines(error, "fault" if fault else "error"))
        else:
            # torchrun ends all ranks when the first one ends: let that be the one that speaks.
            time.sleep(SPEAKER_SECONDS)
        return FAULT_STATUS if fault else 2
    except KeyboardInterrupt:
        if rank == 0:
            sys.stderr.write("ended by Ctrl-C; start again to go on from the newest checkpoint\n")
        return 130


def _rehearsal(config: Config, world_size: int, rank: int | None) -> str:
    """The text of `--rehearse`; a GPU that is here is not used."""
    from dattn_mcore.parallel import entry, platform

    entry.prepare_imports("cpu")
    platform.install("cpu")
    from dattn_mcore.training.rehearsal_report import rehearsal_text

    return rehearsal_text(config, world_size, rank)


def _under_torchrun(prog: str) -> str:
    return prog if prog == PROGRAM else f"--no-python {prog}"


def _run(config: Config, arguments: Sequence[str], prog: str) -> int:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    needed = processes_per_replica(config)
    if world_size == 1 and needed > 1:
        # The module, since the console command need not be on PATH.
        program = () if prog == PROGRAM else ("-m", "dattn_mcore.cli", "train")
        return restart_under_torchrun(needed, config.train.device, arguments, program)
    data_parallel_size(config, world_size, _under_torchrun(prog))
    # Importing PyTorch and Megatron-Core takes seconds; mistakes above are reported at once.
    import torch.distributed as dist

    from dattn_mcore.parallel import entry, gpus, platform

    entry.prepare_imports(config.train.device)
    from dattn_mcore.parallel import groups
    from dattn_mcore.training.choices import decide
    from dattn_mcore.training.last_words import speaking
    from dattn_mcore.training.loop import train
    from dattn_mcore.training.site import check_site
    from dattn_mcore.training.start_checks import check_all_reduce
    from dattn_mcore.training.watchdog import Watchdog

    if config.train.deterministic:
        platform.make_deterministic()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Without torchrun nobody would end the ranks: they save, and end by themselves.
        signal_when_parent_ends(signal.SIGTERM)
    if "WORLD_SIZE" in os.environ:
        device_kind, device, watchdog = _join(config)
    else:
        device_kind = gpus.resolve_device(config.train.device)
        check_site(config, device_kind, 0)
        device = platform.install(device_kind)
        groups.initialize_alone(device_kind)
        watchdog = Watchdog(0, 1)
    together = True
    try:
        with speaking(watchdog):
            limit = config.health.start_timeout_seconds
            watchdog.phase("the first all-reduce", limit, "health.start_timeout_seconds")
            check_all_reduce(device)
            # What cannot run is reported before anything is built.
            watchdog.phase("choosing what computes", limit, "health.start_timeout_seconds")
            runtime = decide(config, device)
            watchdog.phase("making process groups", limit, "health.start_timeout_seconds")
            pg_collection = groups.initialize_model_parallel(
                seed=config.train.seed,
                tp=config.parallel.tp,
                pp=config.parallel.pp,
                vpp=config.parallel.vpp,
                cp=config.parallel.cp,
            )
            logger.info(
                "%s: %s on %d %s process%s, tp %d x pp %d x dp %d%s",
                Path(config.log.run_dir).name,
                config.train.stage,
                dist.get_world_size(),
                device_kind.upper(),
                "" if dist.get_world_size() == 1 else "es",
                config.parallel.tp,
                config.parallel.pp,
                pg_collection.dp.size(),
                ", sequence parallel" if config.parallel.sp else "",
            )
            watchdog.phase("preparing data", 0, "")
            _prepare_data(config, device)
            train(config, pg_collection, device, runtime=runtime, watchdog=watchdog)
        groups.destroy_model_parallel()
        return 0
    except DattnError as error:
        together = error.shared
        raise
    finally:
        watchdog.close()
        if together:  # alone, this rank would wait for the others in it
            dist.destroy_process_group()


def _join(config: Config):
    """Joins the other ranks, once all see their device and run the same code and configuration."""
    from dattn_mcore.parallel import gpus, groups, platform
    from dattn_mcore.training.site import check_site
    from dattn_mcore.training.start_checks import check_ranks, describe_rank
    from dattn_mcore.training.watchdog import Watchdog

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    limit = config.health.start_timeout_seconds
    store, rank, world_size = groups.join_store(limit)
    problem: DattnError | None = None
    device_kind: str = config.train.device
    try:
        device_kind = gpus.resolve_device(config.train.device)
        check_site(config, device_kind, local_rank)
    except DattnError as error:
        problem = error
    check_ranks(store, rank, world_size, describe_rank(config, device_kind), problem, limit)
    watchdog = Watchdog(rank, world_size, store)
    watchdog.phase("making the process group", limit, "health.start_timeout_seconds")
    device = platform.install(device_kind, local_rank)
    groups.initialize_distributed(
        device_kind, store, rank, world_size, config.parallel.timeout_minutes
    )
    return device_kind, device, watchdog


def _prepare_data(config: Config, device) -> None:
    """Makes the embedded data set where it is absent; rank 0 does, the others wait."""
    import torch.distributed as dist

    from dattn_mcore.training.agreement import agree

    problem = None
    if dist.get_rank() == 0:
        from dattn_mcore.data.digits import prepare_configured

        try:
            prepare_configured(config)
        except DattnError as error:
            problem = error
    agree(problem, device)


def _set_up_logging(rank: int) -> None:
    # What Megatron-Core says about packages that a CPU-only machine cannot have.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    warnings.filterwarnings("ignore", message="Please use DTensor")  # said of Megatron-Core's
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor")
    log_to_stdout(logging.INFO if rank == 0 else logging.ERROR)
