"""What the page may hold: a total for uploads, and a part of the connections."""

import asyncio
from types import SimpleNamespace

import pytest

from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.limits import Limits
from llavamed_jax.serving.page_door import Door, Uploads


def scope(path, method="GET", length=0):
    return {"type": "http", "path": path, "method": method, "headers": [(b"content-length", str(length).encode())]}


def test_uploads_have_a_total_with_those_on_their_way_and_empty_files(tmp_path):
    uploads = Uploads(str(tmp_path), 1_000_000)

    async def take(length, inside=None):
        async with uploads.room(length):
            return inside and await inside

    assert asyncio.run(take(600_000, take(400_000))) is None
    for length, inside in ((1_000_001, None), (600_000, take(400_001))):
        with pytest.raises(ApiError) as error:
            asyncio.run(take(length, inside))
        assert (error.value.status, error.value.code) == (507, "uploads_full")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "image").write_bytes(b"a" * 500_000)
    with pytest.raises(ApiError):
        asyncio.run(take(500_001))
    asyncio.run(take(500_000))
    for i in range(8):
        (tmp_path / "a" / str(i)).touch()
    with pytest.raises(ApiError):
        asyncio.run(take(1))


def test_the_door_refuses_an_upload_without_room_and_streams_beyond_half_of_the_connections(tmp_path):
    passed, go_on = [], None

    async def gradio(scope, receive, send):
        passed.append(scope["path"])
        await go_on.wait()

    async def run():
        nonlocal go_on
        go_on = asyncio.Event()
        door = Door(gradio, Limits(max_connections=4), SimpleNamespace(name=lambda headers: ""), str(tmp_path))
        beat = scope("/gradio_api/heartbeat/a")
        held = [asyncio.create_task(door(beat, None, None)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as error:
            await door(beat, None, None)
        assert (error.value.status, error.value.code) == (503, "too_many_connections")
        go_on.set()
        await asyncio.gather(*held)
        door._uploads._most = 99
        with pytest.raises(ApiError) as error:
            await door(scope("/gradio_api/upload", "POST", 100), None, None)
        assert error.value.status == 507
        await door(scope("/gradio_api/upload", "POST", 99), None, None)
        assert len(passed) == 3

    asyncio.run(run())
