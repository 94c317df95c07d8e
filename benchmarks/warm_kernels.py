"""Compiles the joint kernel ahead, side by side, for the attention of `gpu_check`'s short list.

    python -m benchmarks.warm_kernels

On a GPU. Triton compiles a variant at its first launch, one after the other, and keeps it in its
cache on disk. This program asks the backend for each size without launching anything, which says
what would be compiled, and compiles that in processes: Triton's compiler holds the interpreter, so
threads would take turns. Whatever runs meanwhile or afterwards finds the kernels in the cache.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.pool import Pool
from typing import Any, NamedTuple

from triton import knobs

from benchmarks.gpu_items import SHORT_TEXT, SHORT_VISUAL
from dattn_mcore.parallel import entry, platform


class Variant(NamedTuple):
    """A kernel by its place, and what Triton calls its specialization data."""

    module: str
    name: str
    data: str

    def kernel(self) -> Any:
        """Triton's function."""
        return getattr(importlib.import_module(self.module), self.name.rpartition(".")[2])


@contextmanager
def collecting() -> Iterator[dict[Variant, None]]:
    """Inside, a launch neither compiles nor runs; gives what would be compiled, in order."""
    found: dict[Variant, None] = {}

    def keep(*, fn: Any, compile: Any, **_: Any) -> bool:  # noqa: A002 (Triton's name)
        found[Variant(fn.module, fn.name, compile["specialization_data"])] = None
        return True  # done already, as far as Triton is concerned

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, keep
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before


def workers(count: int) -> Pool:
    """Processes for `compile_all`; to be started before this one uses the device."""
    return multiprocessing.get_context("fork").Pool(count)


def compile_all(pool: Pool, variants: Iterable[Variant]) -> None:
    """Compiles what was collected, into Triton's cache.

    A kernel's key in the cache depends on which kernels the process has met before, so each worker
    meets them in the order of their launches.
    """
    variants = list(variants)
    pool.starmap(_compile, [(variant, variants) for variant in variants], chunksize=1)


def _compile(variant: Variant, met_before: list[Variant]) -> None:
    for other in met_before:
        _ = other.kernel().cache_key
    variant.kernel().preload(variant.data)


def short_list() -> Iterator[Callable[[], object]]:
    """A forward and backward call of the Triton backend for each size of the list."""
    # After `prepare_imports`: Megatron-Core's import dies of a broken package.
    from benchmarks.attention_backends import LAYERS, Case
    from dattn_mcore.layers.attention import BACKENDS

    for layer in LAYERS["gpu"].values():
        for visual in SHORT_VISUAL:
            for text in SHORT_TEXT:
                case = Case(layer, visual, text, platform.current_device())
                yield case.backend(BACKENDS["triton"])[1]


def main(arguments: list[str] | None = None) -> int:
    """Compiles; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    half = max(1, (os.cpu_count() or 1) // 2)  # the others are for what is measured
    parser.add_argument("--processes", type=int, default=half)
    args = parser.parse_args(arguments)
    entry.prepare_imports("gpu")
    with workers(args.processes) as pool:
        platform.install("gpu")
        with collecting() as variants:
            for call in short_list():
                call()
        started = time.monotonic()
        compile_all(pool, variants)
    sys.stdout.write(
        f"{len(variants)} kernels compiled in {time.monotonic() - started:.0f} s "
        f"by {args.processes} processes\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
