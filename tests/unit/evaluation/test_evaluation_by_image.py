"""Questions ordered and shared out by their images."""

import random

import pytest
from PIL import Image

from dattn_mcore.evaluation.by_image import content_key, order_by_image, share_of_rank


def test_questions_of_an_image_stand_together_the_largest_first():
    keys = [("a",), ("b",), (), ("a",), ("a", "b"), (), ("b",), ("a",)]
    lengths = [5, 9, 50, 7, 1, 60, 2, 7]
    order = order_by_image(keys, lengths)
    # Two images; then b's, whose longest is 9, and a's in the order of length and place; no image.
    assert order == [4, 1, 6, 3, 7, 0, 5, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_whole_images_and_about_equal(size):
    keys = [(random.Random(n).randrange(40),) for n in range(900)]
    shares = [share_of_rank(keys, rank, size) for rank in range(size)]
    assert sorted(number for share in shares for number in share) == list(range(900))
    images = [{keys[number] for number in share} for share in shares]
    assert sum(map(len, images)) == len(set(keys))
    largest = max(keys.count(key) for key in set(keys))
    assert all(abs(len(share) - 900 / size) <= largest for share in shares)
    assert all(share == sorted(share) for share in shares)


def test_questions_without_images_are_shared_out_too():
    shares = [share_of_rank([()] * 10, rank, 4) for rank in range(4)]
    assert [len(share) for share in shares] == [3, 2, 3, 2]


def test_more_processes_than_images():
    shares = [share_of_rank([("a",)] * 4 + [("b",)] * 4, rank, 8) for rank in range(8)]
    assert sorted(map(len, shares)) == [0] * 6 + [4, 4]


def test_an_image_is_known_by_its_colours():
    """Numbers in a palette are no colours, and transparency is laid over white."""
    red, blue = (Image.new("P", (4, 4)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    clear = red.copy()
    clear.info["transparency"] = 0
    turned = red.copy()
    turned.getexif()[0x0112] = 6
    keys = [content_key(image) for image in (red, red.copy(), blue, clear, turned)]
    assert keys[0] == keys[1] and len(set(keys)) == 4
