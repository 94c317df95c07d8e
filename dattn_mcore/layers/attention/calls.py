"""Decomposed attention from calls of a kernel that knows one set of keys.

The queries of a softmax attend to each of its sets of keys in calls of their own, merged into one
exact softmax (`merge`). Visual keys are read in passes that copy no row twice (`rows`), so that
memory is linear in the rows of a pack, however its images and text are interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dattn_mcore.layers.attention.inputs import AttentionInputs, RowKind
from dattn_mcore.layers.attention.merge import Merged, Passes, gradients
from dattn_mcore.layers.attention.modes import KeySet, Softmax, attend
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.layout import DecomposedSeqParams

# Makes the calls of a pack over a set of keys; index tensors are kept in `params.cache`.
MakePasses = Callable[[KeySet, DecomposedSeqParams, AttentionOptions, torch.device], Passes]


def attend_by_calls(
    inputs: AttentionInputs, options: AttentionOptions, make_passes: MakePasses
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A whole backend; see `Backend.attend`."""
    rotated: dict[tuple[str, RowKind], torch.Tensor] = {}

    def queries(kind: RowKind, at_positions: bool) -> torch.Tensor:
        if not at_positions:
            return inputs.queries(kind)
        if ("q", kind) not in rotated:
            rotated["q", kind] = inputs.rotated_queries(kind)
        return rotated["q", kind]

    def keys(kind: RowKind, at_positions: bool) -> torch.Tensor:
        if not at_positions:
            return inputs.keys(kind)
        if ("k", kind) not in rotated:
            rotated["k", kind] = inputs.rotated_keys(kind)
        return rotated["k", kind]

    def compute(softmax: Softmax) -> torch.Tensor:
        tensors: list[torch.Tensor] = []
        for key_set in softmax.key_sets:
            tensors.append(queries(softmax.queries, key_set.rotated))
            tensors.append(keys(key_set.rows, key_set.rotated))
            tensors.append(inputs.values(key_set.rows))
        passes = [
            make_passes(key_set, inputs.params, options, inputs.q.device)
            for key_set in softmax.key_sets
        ]
        return _MergedSoftmax.apply(passes, *tensors)

    return attend(inputs, options, compute)


class _MergedSoftmax(torch.autograd.Function):
    """Rows over the union of some sets of keys: tensors are q, k and v of each set in turn."""

    @staticmethod
    def forward(ctx, passes, *tensors):
        sets = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
        merged = Merged(tensors[0], sum(map(len, passes)))
        # The last set first: text keys, of which every text row sees one.
        states = [
            merged.add(of_set, q=q, k=k, v=v)
            for of_set, (q, k, v) in zip(reversed(passes), reversed(sets), strict=True)
        ]
        out, lse = merged.result()
        ctx.passes, ctx.states = passes, states[::-1]
        ctx.save_for_backward(*tensors, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        *tensors, out, lse = ctx.saved_tensors
        found: list[torch.Tensor] = []
        for index, (passes, states) in enumerate(zip(ctx.passes, ctx.states, strict=True)):
            q, k, v = tensors[3 * index : 3 * index + 3]
            found += gradients(passes, states, grad, q=q, k=k, v=v, out=out, lse=lse)
        return None, *found


@dataclass(frozen=True)
class PartByCalls:
    """A `Part` from calls of a kernel.

    Attributes:
        passes: that together are what the rows see of the keys.
    """

    passes: Passes

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
        """See `Part`."""
        merged = Merged(q, len(self.passes))
        states = merged.add(self.passes, q=q, k=k, v=v)
        return *merged.result(), states

    def backward(
        self,
        grad: torch.Tensor,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: list[Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Part`."""
        return gradients(self.passes, state, grad, q=q, k=k, v=v, out=out, lse=lse)
