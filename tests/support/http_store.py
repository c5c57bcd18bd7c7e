"""A store over HTTP, in this process: as much of both vendors' protocols as gcsfs and s3fs need, with faults."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
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
      faults_of_reads: what happens to the next reads of objects in turn: a status, or `cut`, which answers with half of the content.
      parts: number of parts by which the large objects came.
    """

    def __init__(self):
        self.objects, self.condition, self.faults, self.faults_of_reads = {}, NAMED, [], []
        self.parts, self.uploads = 0, {}  # the parts of an upload in progress, by number
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

    def take(self, upload, number, content):
        self.server.store.uploads.setdefault(upload, {})[number] = content
        self.server.store.parts += 1

    def do_PUT(self):
        content, query = self.rfile.read(int(self.headers.get("Content-Length", 0))), parse_qs(urlsplit(self.path).query)
        if "uploadId" in query:
            self.take(query["uploadId"][0], int(query["partNumber"][0]), content)
            return self.answer(200, ETag='"part"')
        return self.write(unquote(urlsplit(self.path).path).removeprefix(OBJECT), content, self.headers.get("If-None-Match") == "*")

    def do_POST(self):
        content, query = self.rfile.read(int(self.headers.get("Content-Length", 0))), parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        name = unquote(urlsplit(self.path).path).removeprefix(OBJECT)
        if "uploads" in query:
            return self.answer(200, f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>".encode())
        if "uploadId" in query:
            parts = self.server.store.uploads.pop(query["uploadId"][0])
            self.server.store.create(name, b"".join(parts[number] for number in sorted(parts)), False)
            return self.answer(200, b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>")
        if "upload_id" in query:
            self.server.store.parts += 1
            return self.write(query["upload_id"][0], content, False)
        if query["uploadType"] == ["resumable"]:
            return self.answer(200, Location=f"http://{self.headers['Host']}{UPLOAD}?upload_id={quote(json.loads(content)['name'], safe='')}")
        about, _, rest = content.partition(b"\n\n")[2].partition(b"\n--==0==\n")
        return self.write(json.loads(about)["name"], rest.partition(b"\n\n")[2].removesuffix(b"\n--==0==--"), "ifGenerationMatch=0" in self.path)

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
        fault = self.server.store.faults_of_reads.pop(0) if self.server.store.faults_of_reads and self.command == "GET" else None
        if isinstance(fault, int):
            return self.refuse(fault)
        content = content[int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0]):]
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
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
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        with emulators.environment({"STORAGE_EMULATOR_HOST": url, "AWS_ENDPOINT_URL": url, "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", **emulators.KEYS}):
            yield server.store
    finally:
        server.shutdown()
        server.server_close()
