"""The names by which a server may be asked: no site whose name gets this machine's address reaches a server on loopback."""

import io
import json

import pytest
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from llavamed_jax.cli import serve
from llavamed_jax.errors import UsageError
from llavamed_jax.serving import app
from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.hosts import Hosts
from llavamed_jax.serving.log import Log
from llavamed_jax.serving.page_door import Door
from llavamed_jax.serving.service import Service

OWN = ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:1", "localhost.", "[::1]", "[::1]:8000", "127.8.9.1:80"]
FOREIGN = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", "[::2]:80", "0.0.0.0:8000",
           "", "127.0.0.1@evil.example", "[::1", "ward"]


@pytest.mark.parametrize("named", [[], ["Ward.example.org", "fd00::7"]])
def test_loopback_and_named_hosts_are_taken_and_no_other(named):
    hosts = Hosts(named)
    taken = [*OWN, *(["ward.example.org", "WARD.EXAMPLE.ORG.:443", "[fd00::7]:8000"] if named else [])]
    for host in taken:
        hosts.check(Headers({"host": host}))
    hosts.check(Headers({}))
    for host in [*FOREIGN, *([] if named else ["ward.example.org"]), "x.ward.example.org"]:
        if host == "[::1":
            continue  # an address without its end: h11 refuses such a request
        with pytest.raises(ApiError) as error:
            hosts.check(Headers({"host": host}))
        assert (error.value.status, error.value.code) == (421, "wrong_host") and "--allowed_hosts" in str(error.value)


@pytest.mark.parametrize("name", ["https://x.org", "x.org:80", "x.org/", "*.x.org/y", "[::1]:80", "a@b", "x y", "[", ":"])
def test_what_is_no_name_is_one_sentence(name):
    with pytest.raises(UsageError, match="--allowed_hosts has .* without a scheme, a port or a path, were expected"):
        Hosts([name])


@pytest.mark.parametrize("flags, keys, is_checked", [
    ([], {}, True), (["--host", "::1"], {}, True), (["--host", "localhost"], {}, True), (["--host", "127.0.0.2"], {}, True),
    ([], {"a": "b"}, False), (["--host", "0.0.0.0"], {}, False), (["--host", "ward.example.org"], {}, False),
    (["--allowed_hosts", "ward"], {"a": "b"}, True), (["--host", "0.0.0.0", "--allowed_hosts", "ward, lab"], {}, True)])
def test_which_servers_check_names(flags, keys, is_checked):
    args = serve._parser().parse_args(["--checkpoint", "x", *flags])
    hosts = serve._hosts(args, keys)
    assert (hosts is not None) == is_checked
    if is_checked:
        hosts.check(Headers({"host": "ward" if "--allowed_hosts" in flags else "localhost:7"}))
        with pytest.raises(ApiError):
            hosts.check(Headers({"host": "evil.example"}))


def test_routes_refuse_a_foreign_host_before_anything_else():
    pytest.importorskip("httpx", reason="httpx, which Starlette's client needs, is not installed")
    lines = io.StringIO()
    service = Service(["one"], log=Log(file=lines), hosts=Hosts(["ward"]))
    client = TestClient(app.create(service), raise_server_exceptions=False)
    for method, path in (("POST", "/v1/chat/completions"), ("POST", "/responses"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/health")):
        # As a page whose name was given this machine's address: `Origin` and `Host` agree.
        reply = client.request(method, path, headers={"Host": "evil.example:8000", "Origin": "http://evil.example:8000", "X-Request-Id": "7"})
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["type"], reply.headers["x-request-id"]) == (421, "wrong_host", "invalid_request_error", "7")
        assert json.loads(lines.getvalue().splitlines()[-1])["status"] == 421
    for host in ("127.0.0.1:8000", "ward"):
        assert client.get("/v1/models", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200


def test_the_page_refuses_it_too(tmp_path):
    import asyncio
    service = Service(["one"], hosts=Hosts())
    door = Door(lambda *_: pytest.fail("passed"), service.limits, None, str(tmp_path), service.hosts)
    scope = {"type": "http", "path": "/", "method": "GET", "headers": [(b"host", b"evil.example")]}
    with pytest.raises(ApiError) as error:
        asyncio.run(door(scope, None, None))
    assert error.value.code == "wrong_host"
