"""The pixels of all images of a request together."""

from types import SimpleNamespace

import numpy as np
import pytest

from llavamed_jax.serving import images
from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.limits import DEFAULTS, Limits
from llavamed_jax.serving.service import Service
from tests.support.server import data_url, picture


def service_of(**limits):
    service = Service(["one"], Limits(**limits))
    service.model = SimpleNamespace(processor=SimpleNamespace(images_uint8=lambda images: [np.asarray(image) for image in images]))
    return service


def test_images_below_the_limit_may_not_be_above_it_together(monkeypatch):
    data = picture(1)
    one = images.pixels_of(data, "it", DEFAULTS)
    decoded = []
    monkeypatch.setattr(images, "load_image", lambda data, right=images.load_image: decoded.append(1) or right(data))
    service = service_of(max_image_pixels=one, max_request_pixels=3 * one - 1)
    assert [each.shape for each in service._pixels([data, data_url(data)])] == [np.asarray(images.decode(data, "it", DEFAULTS)).shape] * 2
    decoded.clear()
    with pytest.raises(ApiError, match=f"the images of the request have {3 * one} pixels together up to image 3; at most {3 * one - 1} were") as error:
        service._pixels([data, data_url(data), data, data])
    assert (error.value.status, error.value.code, error.value.param, len(decoded)) == (400, "image_too_large", "messages", 2)
    assert len(service_of(max_image_pixels=one, max_request_pixels=3 * one)._pixels([data] * 3)) == 3


def test_the_default_is_less_than_the_largest_images_together():
    assert DEFAULTS.max_image_pixels <= DEFAULTS.max_request_pixels < DEFAULTS.max_images * DEFAULTS.max_image_pixels
