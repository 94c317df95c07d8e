"""Which samples are held out: a stable hash, no image and no record on both sides."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import from_dict
from dattn_mcore.config.schema import SourceConfig, ValidationConfig
from dattn_mcore.data.held_out import (
    check_apart,
    held_out_samples,
    named_as_validation,
    training_shares,
    validation_config,
)
from dattn_mcore.data.index.identity import difference, fingerprint_of, identity_of
from dattn_mcore.data.index.store import open_index
from dattn_mcore.errors import ConfigError, DataError


def record(name, images, text):
    turns = [{"from": "human", "value": "<image>\n" * len(images) + f"What is {text}?"}]
    turns.append({"from": "gpt", "value": f"It is {text}."})
    return {"id": name, "conversations": turns} | ({"image": images} if images else {})


@pytest.fixture
def opened(make_config, toy_tokenizer, tmp_path):
    """Opens an index of records about the fixture's images."""

    def open_records(records, name="records", **validation):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(records))
        config = make_config(annotations=str(path), index_dir=str(tmp_path / "index"))
        config = dataclasses.replace(config, validation=ValidationConfig(**validation))
        return open_index(config, toy_tokenizer), config

    return open_records


@pytest.fixture
def images(make_config):
    config = make_config()
    records = json.loads(Path(config.data.annotations).read_text(encoding="utf-8"))
    names = []
    for item in records:
        shown = item.get("image", [])
        names += [shown] if isinstance(shown, str) else shown
    return sorted(set(names))


def test_the_choice_is_by_image_and_text_not_by_place_or_id(opened, images):
    records = [record(f"a{n}", [images[n % len(images)]], f"thing {n}") for n in range(40)]
    records += [record(f"t{n}", [], f"word {n}") for n in range(40)]
    index, config = opened(records, share=0.3)
    first = held_out_samples(index, config)
    shuffled = [{**records[n], "id": f"x{n}"} for n in np.random.default_rng(0).permutation(80)]
    other, config = opened(shuffled, "shuffled", share=0.3)
    second = held_out_samples(other, config)
    place = {int(name[1:]): n for n, name in enumerate(other.ids(range(80)))}
    assert all(first.validated[n] == second.validated[place[n]] for n in range(80))
    assert not first.withheld.any()
    # Samples of one image go together, and about a third of the texts is held out.
    by_image = {}
    for n in range(40):
        by_image.setdefault(n % len(images), set()).add(bool(first.validated[n]))
    assert all(len(sides) == 1 for sides in by_image.values())
    assert 5 <= first.validated[40:].sum() <= 19
    salted, config = opened(records, share=0.3, salt="another")
    third = held_out_samples(salted, config)
    assert (third.validated != first.validated).any()
    bigger, config = opened(records, share=0.6)
    fourth = held_out_samples(bigger, config)
    assert (fourth.validated | ~first.validated).all()  # a larger share keeps the smaller one


def test_a_sample_that_shows_a_held_out_image_second_is_on_neither_side(opened, images):
    alone = [record(f"one{n}", [name], "it") for n, name in enumerate(images)]
    index, config = opened(alone, share=0.5)
    sides = held_out_samples(index, config).validated
    held, trained = images[int(np.argmax(sides))], images[int(np.argmin(sides))]
    both = [
        *alone,
        record("second", [trained, held], "the second"),
        record("first", [held, trained], "the first"),
    ]
    index, config = opened(both, "both", share=0.5)
    found = held_out_samples(index, config)
    second, first = len(alone), len(alone) + 1
    # `first` is held out and shows `trained` as well: what shows that alone is withheld then.
    withheld = {second, images.index(trained)}
    assert set(np.flatnonzero(found.withheld)) == withheld
    assert found.validated[first] and not found.validated[second]
    (share,) = training_shares(index, config)
    drawn = set(share.numbers)
    shown = {image.identity for n in drawn for image in index.sample(int(n)).images}
    kept = {
        image.identity
        for n in np.flatnonzero(found.validated)
        for image in index.sample(int(n)).images
    }
    assert kept and not shown & kept


def test_it_is_kept_beside_the_index_and_read_again(opened, images, monkeypatch):
    records = [record(f"t{n}", [], f"word {n}") for n in range(30)]
    index, config = opened(records, share=0.3)
    first = held_out_samples(index, config)
    (path,) = index.folder.glob("held_out-*.npy")
    monkeypatch.setattr("dattn_mcore.data.held_out._divide", None)  # nobody divides again
    assert (held_out_samples(index, config).validated == first.validated).all()
    monkeypatch.undo()
    path.write_bytes(b"broken")
    assert (held_out_samples(index, config).validated == first.validated).all()


def test_share_and_salt_are_in_the_fingerprint(opened, images):
    records = [record(f"t{n}", [], f"word {n}") for n in range(30)]
    found = {}
    for share, salt in ((0.0, ""), (0.3, ""), (0.3, "x"), (0.4, "")):
        index, config = opened(records, share=share, salt=salt)
        found[share, salt] = identity_of(index, config.data, config.validation)
    assert len({fingerprint_of(identity) for identity in found.values()}) == 4
    index, config = opened(records)
    assert found[0.0, ""] == identity_of(index, config.data)  # as before there was any
    assert difference(found[0.3, ""], found[0.3, "x"]) == (
        "what is held out (validation.share, validation.salt)"
    )


def test_a_share_that_leaves_one_side_empty(opened):
    records = [record(f"t{n}", [], f"word {n}") for n in range(3)]
    for share, side in ((1e-9, "held out"), (1 - 1e-9, "trained on")):
        index, config = opened(records, share=share)
        with pytest.raises(DataError) as raised:
            held_out_samples(index, config)
        assert f"of 3 usable samples leaves none that is {side}" in str(raised.value)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_sources_that_share_samples_are_refused(opened, images, kind):
    shared = record("mine", [images[0]] if kind == "image" else [], "shared")
    training = [shared, record("t1", [], "one"), record("t2", [], "two")]
    theirs = [
        record("t3", [], "three"),
        {**shared, "id": "theirs"},
        record("i", [images[1]], "other"),
    ]
    (train, _), (held, _) = opened(training), opened(theirs, "held")
    every, other = np.ones(3, bool), np.array([True, False, True])
    check_apart(train, every, held, other)
    check_apart(train, np.array([False, True, True]), held, every)
    with pytest.raises(DataError) as raised:
        check_apart(train, every, held, every)
    assert str(raised.value) == (
        "validation.sources: 1 of 3 samples show images or have texts that are trained on too "
        "('theirs'); give samples that training does not have, or use validation.share"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.0}, "validation.share=1 must be at least 0 (nothing is held out) and less"),
        ({"share": -0.1}, "validation.share=-0.1 must be at least 0"),
        ({"interval": 5}, "validation.interval=5 has no effect without held-out samples; give"),
        ({"share": 0.1, "interval": 0}, "validation.interval=0 must be greater than 0, or null"),
        ({"share": 0.1, "samples": 0}, "validation.samples=0 must be greater than 0, or null"),
        (
            {"share": 0.1, "sources": [{"annotations": "x.json"}]},
            "validation.share=0.1 cannot go with validation.sources; use one of the two",
        ),
        ({"sources": [{"image_folder": "x"}]}, "validation.sources[0].annotations is empty"),
        (
            {"sources": [{"annotations": "x.json", "weight": 2.0}]},
            "validation.sources[0].weight=2 has no effect: every held-out sample counts once",
        ),
        (
            {"sources": [{"annotations": "data/digits/pretrain.json"}]},
            "validation.sources[0].annotations=data/digits/pretrain.json is trained on too",
        ),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError) as raised:
        check_config(from_dict({"validation": settings}))
    assert message in str(raised.value)


def test_a_missing_file_is_called_by_the_setting_that_names_it(
    make_config, toy_tokenizer, tmp_path
):
    sources = (SourceConfig(annotations=str(tmp_path / "none.json")),)
    config = dataclasses.replace(make_config(), validation=ValidationConfig(sources=sources))
    with (
        pytest.raises(DataError, match=r"^validation\.sources\[0\]\.annotations: file '.*none"),
        named_as_validation(),
    ):
        open_index(validation_config(config), toy_tokenizer)
