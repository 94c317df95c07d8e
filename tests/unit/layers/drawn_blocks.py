"""Blocks in which visual rows belong to nobody: drawn by hypothesis, or written down."""

from hypothesis import strategies as st

from dattn_mcore.layers.blocks import Block

# Runs of text: rows that see nothing, rows that see, and the ends of the visual rows they see.
run = st.tuples(
    st.integers(0, 3),
    st.integers(0, 9),
    st.lists(st.integers(0, 40), max_size=6, unique=True).map(sorted),
)
runs = st.lists(run, min_size=1, max_size=8)
few_runs = st.lists(run, min_size=1, max_size=3)


def blocks_of(drawn):
    """Blocks and the number of text rows; each run sees every other stretch between its ends."""
    blocks, text = [], 0
    for gap, rows, ends in drawn:
        start = text + gap
        text = start + rows
        blocks += [
            Block(start, text, low, high)
            for low, high in zip(ends[::2], ends[1::2], strict=False)
            if rows
        ]
    return tuple(blocks), text
