"""Bytes that a context parallel rank sends for one layer's attention, in closed form.

n ranks share V visual and T text rows, each as many as the others; h query heads, g groups of keys
and values, head size d, w bytes a number. Log-sum-exps count 4 bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass

LSE_BYTES = 4  # float32


@dataclass(frozen=True)
class Shape:
    """One layer's attention over one pack.

    Attributes:
        visual, text: rows of the pack, padding included.
        heads, groups, head_dim: of a rank.
        number_bytes: of a number of an activation.
    """

    visual: int
    text: int
    heads: int
    groups: int
    head_dim: int
    number_bytes: int = 4

    @property
    def query_bytes(self) -> int:
        """A row's queries, or outputs."""
        return self.heads * self.head_dim * self.number_bytes

    @property
    def keys_values_bytes(self) -> int:
        """A row's keys and values."""
        return 2 * self.groups * self.head_dim * self.number_bytes

    @property
    def rows(self) -> int:
        """All of them."""
        return self.visual + self.text


def dattn_bytes(shape: Shape, ranks: int) -> tuple[int, int]:
    """D-Attn: what belongs to text rows, forward and backward.

    Forward: queries, keys and values are gathered, outputs and log-sum-exps go to their owners.
    Backward: gradients of outputs, outputs and log-sum-exps are gathered, gradients of queries,
    keys and values go to their owners. Nothing is sent for a visual row.
    """
    gathered = (ranks - 1) * shape.text // ranks
    lse = LSE_BYTES * shape.heads
    return (
        gathered * (2 * shape.query_bytes + shape.keys_values_bytes + lse),
        gathered * (3 * shape.query_bytes + shape.keys_values_bytes + lse),
    )


def ring_bytes(shape: Shape, ranks: int) -> tuple[int, int]:
    """Ring attention: keys and values of all rows, forward; they and their gradients, backward.

    n - 1 turns each way: the gradients of a rank's own share are added at home.
    """
    turned = (ranks - 1) * shape.rows // ranks * shape.keys_values_bytes
    return turned, 2 * turned


def ulysses_bytes(shape: Shape, ranks: int) -> tuple[int, int]:
    """Ulysses: all rows' queries, keys, values and outputs change from rows to heads and back.

    Where there are fewer groups than ranks, keys and values are repeated to one group a rank.

    Source: Jacobs et al., "DeepSpeed Ulysses" (arXiv 2309.14509).
    """
    groups = max(shape.groups, ranks)
    row = 2 * shape.query_bytes + shape.keys_values_bytes // shape.groups * groups
    # Of a rank's rows, all but its own share of heads.
    sent = shape.rows * (ranks - 1) * row // ranks**2
    return sent, sent
