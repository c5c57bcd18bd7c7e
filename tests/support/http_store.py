"""A store over HTTP, in this process: as much of both vendors' protocols as gcsfs and s3fs need for small objects, with faults."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from benchmarks import emulators

LISTING, UPLOAD, OBJECT = f"/storage/v1/b/{emulators.BUCKET}/o", f"/upload/storage/v1/b/{emulators.BUCKET}/o", f"/{emulators.BUCKET}/"
NAMED = "<Condition>If-None-Match</Condition>"  # which Amazon's store says when it refuses to create an object


class Store:
    """The objects, by name.

    Attributes:
      objects: name -> content and number of the write.
      condition: what S3's refusal to create an object has beside its code; "" as other stores than Amazon's.
      faults: what happens to the next creations in turn: a status, which refuses, or `lost`, which writes and does not answer.
    """

    def __init__(self):
        self.objects, self.condition, self.faults = {}, NAMED, []
        self.lock, self.writes = threading.Lock(), 0

    def create(self, name, content, must_be_new):
        """Writes an object; returns the status, and whether the answer arrives."""
        with self.lock:
            fault = self.faults.pop(0) if must_be_new and self.faults else None
            if isinstance(fault, int):
                return fault, True
            if must_be_new and name in self.objects:
                return 412, True
            self.writes += 1
            self.objects[name] = content, self.writes
            return 200, fault != "lost"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def refuse(self, status):
        code = {404: "NoSuchKey", 409: "ConditionalRequestConflict", 412: "PreconditionFailed", 503: "SlowDown"}[status]
        condition = self.server.store.condition if status == 412 else ""
        body = f"<Error><Code>{code}</Code><Message>refused</Message>{condition}</Error>"
        self.answer(status, body.encode() if self.path.startswith(OBJECT) else b"{}")

    def write(self, name, content, must_be_new):
        status, arrives = self.server.store.create(name, content, must_be_new)
        if not arrives:
            self.close_connection = True
            self.connection.close()
        elif status != 200:
            self.refuse(status)
        else:
            self.answer(200, json.dumps({"name": name, "size": str(len(content)), "generation": "1"}).encode() if not self.path.startswith(OBJECT) else b"", ETag='"e"')

    def do_PUT(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.write(unquote(urlsplit(self.path).path).removeprefix(OBJECT), content, self.headers.get("If-None-Match") == "*")

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        about, _, rest = content.partition(b"\n\n")[2].partition(b"\n--==0==\n")
        self.write(json.loads(about)["name"], rest.partition(b"\n\n")[2].removesuffix(b"\n--==0==--"), "ifGenerationMatch=0" in self.path)

    def do_GET(self):
        url, objects = urlsplit(self.path), self.server.store.objects
        query = parse_qs(url.query)
        prefix = query.get("prefix", [""])[0]
        found = {name: value for name, value in sorted(objects.items()) if name.startswith(prefix)}
        if "list-type" in query:
            rows = "".join(f'<Contents><Key>{escape(name)}</Key><Size>{len(content)}</Size><ETag>"{number}"</ETag>'
                           "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>" for name, (content, number) in found.items())
            return self.answer(200, f"<ListBucketResult><Name>{emulators.BUCKET}</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode())
        if url.path == LISTING:
            items = [{"name": name, "size": str(len(content)), "generation": str(number)} for name, (content, number) in found.items()]
            return self.answer(200, json.dumps({"items": items}).encode())
        name = unquote(url.path.removeprefix("/download").removeprefix(LISTING + "/")) if LISTING in url.path else unquote(url.path).removeprefix(OBJECT)
        if name not in objects:
            return self.refuse(404)
        content, number = objects[name]
        if LISTING in url.path and "alt" not in query:
            return self.answer(200, json.dumps({"name": name, "size": str(len(content)), "generation": str(number)}).encode())
        return self.answer(200, content, ETag=f'"{number}"')

    do_HEAD = do_GET

    def do_DELETE(self):
        path = unquote(urlsplit(self.path).path)
        self.server.store.objects.pop(path.removeprefix(LISTING + "/").removeprefix(OBJECT), None)
        self.answer(204)


@contextlib.contextmanager
def running():
    """Yields a store; `Bucket` of both schemes leads to it inside the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.store, server.daemon_threads = Store(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        with emulators.environment({"STORAGE_EMULATOR_HOST": url, "AWS_ENDPOINT_URL": url, "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", **emulators.KEYS}):
            yield server.store
    finally:
        server.shutdown()
        server.server_close()
