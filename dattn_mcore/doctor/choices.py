"""A child that decides what a run decides, with the trainer's own functions, and tells it.

It reads a resolved configuration (JSON) from standard input. What a step tells is a list of rows,
or why it could not be done; the words are those that a run logs or ends with.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dattn_mcore.config.load import from_dict
from dattn_mcore.config.schema import Config
from dattn_mcore.doctor.children import teller
from dattn_mcore.errors import DattnError, FaultError, first_line

Rows = list[tuple[str, str, str]]  # name, value, note


@dataclass
class _Start:
    """What the steps hand on.

    Attributes:
        config: of the run.
        device: cpu or gpu, once that is known.
        said: what the trainer's functions logged or warned of in the step at hand.
    """

    config: Config
    device: str = "cpu"
    said: list[str] = field(default_factory=list)


def main() -> int:
    """Takes all steps in the trainer's order."""
    tell = teller()
    start = _Start(from_dict(json.load(sys.stdin)))
    without_device = False
    for name, step in STEPS:
        if without_device and name != "megatron-core":
            continue  # a run would have ended: nothing that depends on the device can be decided
        tell({"name": name})
        with _listening(start):
            given = _taken(step, start)
        tell({"name": name, "gave": given})
        without_device |= name == "device" and "error" in given
    return 0


def _taken(step: Callable[[_Start], Rows], start: _Start) -> dict[str, Any]:
    try:
        return {"rows": step(start), "said": start.said}
    except DattnError as error:
        kind = "fault" if isinstance(error, FaultError) else "error"
        return {"error": str(error), "kind": kind, "said": start.said}
    except BaseException as error:  # noqa: BLE001 (a broken package raises anything, SystemExit too)
        text = f"{type(error).__name__}: {first_line(error)}"
        return {"error": text, "kind": "error", "unforeseen": True, "said": start.said}


@contextlib.contextmanager
def _listening(start: _Start) -> Iterator[None]:
    """Keeps what is logged and warned of: the reasons of a choice are said there."""
    start.said = []
    handler = logging.Handler()
    handler.emit = lambda record: start.said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dattn_mcore")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            logger.removeHandler(handler)
    ours = [str(one.message).splitlines()[0] for one in caught if one.category is UserWarning]
    start.said += [text for text in ours if text]


def _torch(start: _Start) -> Rows:
    from dattn_mcore.parallel.gpu_machine import torch_build

    return [(name, value, "") for name, value in torch_build().items()]


def _device(start: _Start) -> Rows:
    from dattn_mcore.parallel import entry, gpus, platform

    wanted = start.config.train.device
    entry.prepare_imports(wanted)
    if start.config.train.deterministic:
        platform.make_deterministic()  # kernels are chosen by it
    start.device = gpus.resolve_device(wanted)
    return [("device", start.device.upper(), f"train.device={wanted}")]


def _gpus(start: _Start) -> Rows:
    """Uses each GPU once."""
    from dattn_mcore.parallel import platform
    from dattn_mcore.parallel.gpu_machine import torch_gpus

    gpus = torch_gpus() if start.device == "gpu" else []
    for gpu in gpus:
        platform.check_device(start.device, gpu.index)
    return [
        (f"GPU {gpu.index}", f"{gpu.name}, {gpu.memory / 1024:.0f} GiB", gpu.capability)
        for gpu in gpus
    ]


def _site(start: _Start) -> Rows:
    from dattn_mcore.training.site import check_site

    check_site(start.config, start.device, 0)
    return []


def _megatron(start: _Start) -> Rows:
    importlib.import_module("megatron.core")
    return []


def _linears(start: _Start) -> Rows:
    from dattn_mcore.parallel import platform
    from dattn_mcore.training.implementation import transformer_engine_missing
    from dattn_mcore.training.runtime import decide_runtime

    platform.install(start.device)
    runtime = decide_runtime(start.config)
    fused = runtime.gradient_accumulation_fusion
    asked = f"train.transformer_impl={start.config.train.transformer_impl}"
    why = "; ".join(start.said) or asked
    missing = transformer_engine_missing()
    if missing is not None and missing not in why:
        why += f"; Transformer Engine: {missing}"
    return [
        ("linears and norms", runtime.implementation, why.removeprefix("linears and norms: ")),
        ("products", start.config.train.fp8.replace("none", start.config.train.precision), ""),
        ("weight gradients", "added in the product" if fused else "added after it", ""),
    ]


def _attention(start: _Start) -> Rows:
    from dattn_mcore.layers.attention import BACKENDS
    from dattn_mcore.layers.spec import attention_options
    from dattn_mcore.training.dry_run import attention_backends
    from dattn_mcore.training.runtime import params_dtype

    config, llm = start.config, start.config.model.llm
    chosen = attention_backends(config, start.device)
    rows = [(f"attention, {layers}", choice.name, choice.reason) for layers, choice in chosen]
    options, dtype = attention_options(llm, config.attention), params_dtype(config)
    for name, backend in BACKENDS.items():
        if name in {choice.name for _, choice in chosen}:
            continue
        refusal = backend.refuses(options, start.device, dtype, llm.head_dim)
        rows.append((f"  {name}", "cannot" if refusal else "could", refusal or ""))
    return rows


def _optimizer(start: _Start) -> Rows:
    from dattn_mcore.parallel.torch_adam import adam_in_use

    name, why = adam_in_use()
    return [("optimizer", name, why)]


def _decoder(start: _Start) -> Rows:
    from dattn_mcore.data.images import make_decoder

    data = start.config.data
    decoder = make_decoder(
        data.image_backend, 1, start.device, 0 if start.device == "gpu" else None
    )
    decoder.close()
    where = f" on the {start.device.upper()}" if decoder.name != "pillow" else ""
    asked = f"data.image_backend={data.image_backend}"
    return [("image decoder", decoder.name + where, "; ".join(start.said) or asked)]


def _trackers(start: _Start) -> Rows:
    from dattn_mcore.training.sinks.build import check_trackers, trackers_of

    check_trackers(start.config)
    return [("trackers", ", ".join(trackers_of(start.config)) or "none", "beside metrics.jsonl")]


STEPS: Sequence[tuple[str, Callable[[_Start], Rows]]] = (
    ("PyTorch", _torch),
    ("device", _device),
    ("GPUs", _gpus),
    ("environment", _site),
    ("megatron-core", _megatron),
    ("linears and norms", _linears),
    ("attention", _attention),
    ("optimizer", _optimizer),
    ("image decoder", _decoder),
    ("trackers", _trackers),
)

if __name__ == "__main__":
    sys.exit(main())
