"""Damaged copies of image files, and what may come of one."""

from llavamed_jax.errors import UserError
from llavamed_jax.images.load import load_image


def changed(whole, places, values):
    """A copy of a file's bytes, with the bytes at some places changed."""
    data = bytearray(whole)
    for place, value in zip(places, values, strict=True):
        data[place] = value
    return bytes(data)


def sentences(files):
    """Reads each file: it is an RGB image or one sentence, and no other error comes out. Returns how many were sentences."""
    count = 0
    for data in files:
        try:
            assert load_image(data).mode == "RGB"
        except UserError as error:
            count += 1
            assert "\n" not in str(error)
    return count
