"""What a rank tells the others before it ends by an error of its own."""

from types import SimpleNamespace

import pytest

from dattn_mcore.errors import ConfigError, OutOfMemoryError, RankError
from dattn_mcore.training.last_words import speaking


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RankError("the GPU fails while it resizes an image"), ["RankError: the GPU fails"]),
        (OutOfMemoryError("rank 3 is out of memory"), ["out of memory"]),
        (ConfigError("all ranks know it"), []),
    ],
)
def test_what_is_this_ranks_alone_is_told_to_the_others(error, told):
    said: list[str] = []
    watchdog = SimpleNamespace(ended=said.append)
    with pytest.raises(type(error)), speaking(watchdog):
        raise error
    assert len(said) == len(told)
    assert all(line.startswith(start) for line, start in zip(said, told, strict=True))
