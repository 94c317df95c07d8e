"""Compares what a model generates with and without its cache, before anybody relies on it.

A release of transformers that hands the cache over in another way can make every step of
generation see one token and no image, and no error says so: answers are merely wrong. Three ways
to the same logits must agree: generation with the cache, generation without it, and one forward
pass over prompt and new tokens; and a prompt must say in a padded batch what it says alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

import dattn_mcore
from dattn_mcore.errors import CheckpointError, DattnError
from dattn_mcore.hf.configuration_dattn import TESTED_TRANSFORMERS

NEW_TOKENS = 4  # the first comes from the prompt, the others through the cache
# How far logits of one model may lie apart in float32, as a share of their spread: two orders of
# summation are 1e-7 to 1e-5 apart, by how sharp attention is; a lost cache moves them by about 1.
BOUND = 1e-3


class SelfCheckError(CheckpointError):
    """A model that contradicts itself here: nothing that it says can be relied on."""


@contextmanager
def saying_versions(who: str, way_out: str) -> Iterator[None]:
    """Completes the message of a failed check: whose model, which versions, what to do.

    Args:
        who: how messages name the model.
        way_out: what else the user can do than install a tested release.

    Raises:
        SelfCheckError: a check failed, or the model could not even be run.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except SelfCheckError as error:
        reason = str(error)
    except DattnError:
        raise
    except Exception as error:  # whatever a release of transformers stumbles over
        reason = f"it cannot be run ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    else:
        return
    raise SelfCheckError(
        f"{who} fails its self-check: {reason}; {versions()}: install a tested release{way_out}"
    )


@dataclass(frozen=True)
class Agreement:
    """What was compared and agreed.

    Attributes:
        sequence: int64 [columns], prompt and new tokens.
        logits: float32 [columns, vocabulary], of one forward pass over them.
        steps: float32 [new tokens, vocabulary], of generation with the cache.
        difference: largest difference found, as a share of the logits' spread.
    """

    sequence: Tensor
    logits: Tensor
    steps: Tensor
    difference: float


def versions() -> str:
    """Both versions and the tested range, for the message of a mismatch."""
    oldest, newest = TESTED_TRANSFORMERS
    return (
        f"this is dattn_mcore {dattn_mcore.__version__} with transformers "
        f"{transformers.__version__}, tested with transformers {oldest} to {newest}"
    )


@contextmanager
def in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Lets a model of another dtype compute in float32, with the memory of one module more.

    A module's own parameters widen while it runs, which is exact, and are put back behind it.
    """
    narrow: dict[torch.nn.Module, list[tuple[torch.nn.Parameter, Tensor]]] = {}

    def widen(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        narrow[module] = [(parameter, parameter.data) for parameter in own]
        for parameter in own:
            parameter.data = parameter.data.float()
        return tuple(_float(argument) for argument in args)

    def put_back(module: torch.nn.Module, *_: object) -> None:
        for parameter, data in narrow.pop(module, []):
            parameter.data = data

    handles = []
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(widen))
                handles.append(module.register_forward_hook(put_back, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _float(argument: Any) -> Any:
    wide = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.float() if wide else argument


def spread_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a row of logits, as a share of the row's spread.

    Args:
        found: [rows, vocabulary].
        expected: likewise.

    Returns:
        Over all rows the largest ratio of root mean squares; infinite where one is not finite.
    """
    found, expected = found.double(), expected.double()
    if not (found.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    apart = (found - expected).square().mean(-1).sqrt()
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    ratio = torch.where(apart == 0, apart, apart / spread)  # rows may be all equal
    return float(ratio.max())


@torch.no_grad()
def compare_generation(model: Any, inputs: Mapping[str, Tensor]) -> Agreement:
    """Generates a few tokens with and without the cache, and computes them in one pass.

    All of it in float32, whatever the model's dtype: roundings of bf16 can move logits by a third
    of their spread where attention is sharp, so that a bound for them would see nothing.

    Args:
        model: a model of transformers that generates.
        inputs: of one prompt, on the model's device, as its processor makes them.

    Raises:
        SelfCheckError: two of the three ways differ; the message does not name the model.
    """
    first = inputs["input_ids"].shape[1]
    sequence, steps = _generate(model, inputs, use_cache=True)
    grown = torch.ones_like(sequence)
    grown[:, :first] = inputs.get("attention_mask", grown[:, :first])
    whole = {**inputs, "input_ids": sequence, "attention_mask": grown}
    with in_float32(model):
        logits = model(**whole, use_cache=False).logits[0]
    one_pass = _Steps(sequence[0, first:], logits[first - 1 : -1])
    cached = _Steps(sequence[0, first:], steps[0])
    largest = _compare("with the cache", cached, one_pass)
    sequence, steps = _generate(model, inputs, use_cache=False)
    plain = _Steps(sequence[0, first:], steps[0])
    largest = max(largest, _compare("without the cache", plain, one_pass))
    return Agreement(whole["input_ids"][0], logits, cached.logits, largest)


@torch.no_grad()
def compare_batched(
    model: Any,
    batch: Mapping[str, Tensor],
    alone: Agreement,
    more: Mapping[str, Any] | None = None,
) -> float:
    """Generates in a batch what was generated alone; returns the largest difference.

    Args:
        model: a model of transformers that generates.
        batch: prompts of different lengths, of which the first one is `alone`'s.
        alone: that prompt by itself.
        more: further arguments of `generate`, that must change nothing.

    Raises:
        SelfCheckError: it differs.
    """
    first = batch["input_ids"].shape[1]
    sequences, steps = _generate(model, {**batch, **(more or {})}, use_cache=True)
    found = _Steps(sequences[0, first:], steps[0])
    expected = _Steps(alone.sequence[-NEW_TOKENS:], alone.steps)
    how = " and ".join(["in a batch", *(f"with {name}" for name in more or {})])
    return _compare(how, found, expected)


@dataclass(frozen=True)
class _Steps:
    """Steps of generation: int64 tokens [steps], and the logits [steps, vocabulary] behind them."""

    tokens: Tensor
    logits: Tensor


def _generate(model: Any, inputs: Mapping[str, Any], use_cache: bool) -> tuple[Tensor, Tensor]:
    """Prompts with their new tokens, and float32 logits [batch, new tokens, vocabulary]."""
    with in_float32(model):
        out = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            num_beams=1,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences, torch.stack(out.logits, dim=1)


def _compare(how: str, found: _Steps, expected: _Steps) -> float:
    """Compares steps until two equally likely tokens let them part; returns the largest difference.

    Args:
        how: the found ones were generated, for the message.
        found: logits and tokens.
        expected: likewise.

    Raises:
        SelfCheckError: logits differ by more, or tokens that are not equally likely.
    """
    largest = 0.0
    for step in range(NEW_TOKENS):
        left, right = found.logits[step], expected.logits[step]
        difference = spread_difference(left[None], right[None])
        largest = max(largest, difference)
        token, other = int(found.tokens[step]), int(expected.tokens[step])
        problem = ""
        if difference == float("inf"):
            problem = "its logits are not finite"
        elif not difference <= BOUND:
            problem = f"its logits are off by {difference:.2g} of their spread (bound {BOUND:.0e})"
        elif token != other:
            # Logits that are off by d at most can swap tokens that are 2 d apart.
            if right[other] - right[token] > 2 * (left - right).abs().max():
                problem = f"it chooses token {token} instead of {other}"
            else:
                break
        if problem:
            raise SelfCheckError(
                f"generation {how} goes wrong: at new token {step + 1} of {NEW_TOKENS} {problem}"
            )
    return largest
