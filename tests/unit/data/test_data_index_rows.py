"""Rows of the index have names, and what a worker raises reaches the process that waits for it."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from dattn_mcore.config.schema import Config
from dattn_mcore.data.index import build
from dattn_mcore.data.index.layout import IMAGE, SAMPLE, ImageRow, SampleRow
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.sources.record import RecordError
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import ConfigError, DataError, DattnError, FaultError, RankError


def test_rows_have_the_fields_of_their_tables() -> None:
    assert SampleRow._fields == SAMPLE.names and ImageRow._fields == IMAGE.names


def test_tiles_of_a_sample_are_those_of_its_images(
    make_config: object, toy_tokenizer: SentencePieceTokenizer
) -> None:
    config = make_config(image_policy="anyres_stretch", visual_budget=512)  # type: ignore[operator]
    assert isinstance(config, Config)
    index = open_index(config, toy_tokenizer)
    tiles = [
        int(index.images["num_tiles"][row["first_image"] :][: row["num_images"]].sum())
        for row in index.samples
    ]
    assert index.samples["num_tiles"].tolist() == tiles
    assert np.unique(tiles).size > 2  # none, one image, two


class Failing:
    """Stands in for the maker of rows."""

    def __init__(self, error: DattnError) -> None:
        self.error = error

    def rows_of(self, *_: object) -> None:
        raise self.error


class Odd(ConfigError):
    """An error that needs more than a message."""

    def __init__(self, field: str, value: int) -> None:
        super().__init__(f"{field}={value} is wrong")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RecordError("bad", 7), DataError),
        (FaultError("lost"), FaultError),
        (RankError("alone"), FaultError),
        (Odd("x", 3), ConfigError),
        (DattnError("some"), DattnError),
    ],
)
def test_an_error_of_a_worker_arrives_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: DattnError, kind: type[DattnError]
) -> None:
    monkeypatch.setattr(build, "_maker", Failing(error))
    with pytest.raises(DattnError) as raised:
        build._work(tmp_path / "part.npz", 0, [])
    arrived = pickle.loads(pickle.dumps(raised.value))
    assert type(arrived) is kind and str(arrived) == str(error)


def test_a_record_error_keeps_its_id_in_another_process() -> None:
    arrived = pickle.loads(pickle.dumps(RecordError("bad", 7)))
    assert (str(arrived), arrived.id) == ("bad", "7")
