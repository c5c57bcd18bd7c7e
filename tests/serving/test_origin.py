"""Who asks, by the headers of a request: other sites' pages are refused, and every reply has the request's id and names."""

import io
import json

import pytest
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from llavamed_jax.serving import app
from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.http_io import check_origin, check_type
from llavamed_jax.serving.log import Log
from llavamed_jax.serving.service import Service


@pytest.fixture
def asked():
    """A client of a server whose model is not loaded, and its log."""
    pytest.importorskip("httpx", reason="httpx, which Starlette's client needs, is not installed")
    lines = io.StringIO()
    service = Service(["one", "two"], keys={"ward": "right"}, log=Log(file=lines), aliases=["/secret/path"])
    client = TestClient(app.create(service), raise_server_exceptions=False, headers={"Authorization": "Bearer right"})
    return client, lambda: json.loads(lines.getvalue().splitlines()[-1])


@pytest.mark.parametrize("origin, host", [("http://evil.example", "x"), ("null", "x"), ("http://x:1", "x"), ("http://x.evil", "x"), ("", "x"),
                                          ("http://[", "x"), ("http://x@evil", "x"), ("x", "x")])
def test_a_page_of_another_origin_is_refused(origin, host):
    with pytest.raises(ApiError) as error:
        check_origin(Headers({"origin": origin, "host": host}))
    assert (error.value.status, error.value.code) == (403, "wrong_origin")


def test_programs_and_the_servers_own_page_are_taken():
    for headers in ({}, {"host": "x"}, {"origin": "http://x:8000", "host": "x:8000"}, {"origin": "https://X", "host": "x"}):
        check_origin(Headers(headers))
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json", None):
        check_type(Headers({} if kind is None else {"content-type": kind}))


@pytest.mark.parametrize("kind", ["text/plain", "text/plain;application/json", "multipart/form-data; boundary=a", "application/x-www-form-urlencoded", ";", "json"])
def test_a_body_that_is_not_called_json_is_refused(kind):
    with pytest.raises(ApiError, match="application/json was expected") as error:
        check_type(Headers({"content-type": kind}))
    assert error.value.status == 415


def test_routes_refuse_another_site_and_errors_have_the_requests_id(asked):
    client, line = asked
    evil = {"Origin": "http://evil.example", "X-Request-Id": "7"}
    for method, path in (("POST", "/v1/chat/completions"), ("POST", "/responses"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/health")):
        reply = client.request(method, path, headers=evil)
        assert (reply.status_code, reply.headers["x-request-id"], reply.json()["error"]["code"]) == (403, "7", "wrong_origin")
        assert (line()["request"], line()["status"]) == ("7", 403)
    assert client.get("/health").status_code == 503
    for path, headers, status, key in (("/v1/chat/completions", {}, 503, "ward"), ("/v1/nothing", {}, 404, None),
                                       ("/v1/responses", {"Authorization": ""}, 401, None)):
        reply = client.post(path, json={}, headers={"X-Request-Id": "a" * 63 + " b", **headers})
        assert (reply.status_code, reply.headers["x-request-id"]) == (status, "a" * 63)  # a blank at the end would not be HTTP
        assert (line()["request"], line()["key"]) == ("a" * 63, key)
    assert len(client.post("/v1/chat/completions", json={}).headers["x-request-id"]) == 32


def test_each_served_name_is_listed_and_a_path_is_taken_and_not_told(asked):
    client, _ = asked
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["one", "two"]
    assert client.get("/v1/models//secret/path").status_code == 200
    reply = client.get("/v1/models/three")
    assert reply.status_code == 404 and "'one' or 'two' was expected" in reply.text and "secret" not in reply.text
