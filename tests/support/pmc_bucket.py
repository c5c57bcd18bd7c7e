"""A bucket of PubMed Central on loopback: 200 articles with 500 figures, a fifth of the articles faulty.

`expected` says what becomes of each row of `rows`: None where the file can be had, else the reason. `served` counts the objects
that were sent whole, by key.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import threading
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape

from PIL import Image

FAULTS = ("no prefix", "renamed", "cut", "wrong md5", "throttled", "versions", "retracted", "suffix", "tdm", "html", "not an image",
          "odd name", "two retracted", "500 at first", "damaged metadata", "deep")
HTML = b"<!DOCTYPE html><html><body>Please log in.</body></html>"


def picture(number: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8 + number % 5, 8), (number % 256, number // 256, 77)).save(file, kind)
    return file.getvalue()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


class Bucket:
    """Objects by key, and what goes wrong with them: `once` fails a key's first requests, with a status or `cut`."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.once: dict[str, list] = {}
        self.served, self.asked = Counter(), Counter()
        self.rows: list[dict] = []
        self.expected: dict[str, str | None] = {}
        self.lock = threading.Lock()
        self.park_after: int | None = None  # objects after which requests wait in vain
        self.num_parked, self.released = 0, threading.Event()

    def article(self, pmcid: str, version: int, media: dict[str, bytes], licence="CC BY", retracted=False, wrong_md5=False, xml: bytes | None = None):
        """Adds a version of an article with its metadata in both places."""
        prefix = f"{pmcid}.{version}/"
        urls = []
        for name, data in media.items():
            self.objects[prefix + name] = data
            urls.append(f"s3://pmc-oa-opendata/{prefix}{name}?md5={md5(data + b'!' if wrong_md5 else data)}")
        xml = xml or f"<article><body><p>{pmcid}</p></body></article>".encode()
        self.objects[f"{prefix}{pmcid}.{version}.xml"] = xml
        found = {"pmcid": pmcid, "version": version, "pmid": int(pmcid[3:]) + 7, "doi": f"10.1/{pmcid}", "title": f"About {pmcid}",
                 "is_retracted": retracted, "license_code": licence, "text_url": "",
                 "xml_url": f"s3://pmc-oa-opendata/{prefix}{pmcid}.{version}.xml?md5={md5(xml)}"} | ({"media_urls": urls} if urls else {})
        for key in (f"metadata/{pmcid}.{version}.json", f"{prefix}{pmcid}.{version}.json"):
            self.objects[key] = json.dumps(found).encode()

    def fill(self, articles: int = 200) -> Bucket:
        number = 0
        for i in range(articles):
            pmcid, fault = f"PMC{1000 + i}", FAULTS[i // 5 % len(FAULTS)] if i % 5 == 0 else ""
            names = [f"jm-{i}-g00{j}" for j in range(2 + i % 2)]
            media, why = {}, None
            for name in names:
                number += 1
                media[f"{name}.jpg"] = picture(number)
            wanted = [f"{name}.jpg" for name in names]
            options, version = {}, 1
            if fault == "renamed":
                media, why = {f"other-{name}": data for name, data in media.items()}, "name gone"
            elif fault == "wrong md5":
                options, why = {"wrong_md5": True}, "damaged"
            elif fault == "html":
                why = "web page in its place"
            elif fault == "not an image":
                media, why = {name: b"\xff\xd8 no image " + data for name, data in media.items()}, "damaged"
            elif fault == "versions":
                self.article(pmcid, 1, {}, "TDM")
                version = 2
            elif fault == "two retracted":
                self.article(pmcid, 1, media, retracted=True)
                version = 2
            elif fault == "retracted":
                options, why = {"retracted": True}, "retracted"
            elif fault == "suffix":
                media = {name.replace(".jpg", (".JPG", ".png")[j % 2]): data for j, (name, data) in enumerate(media.items())}
            elif fault == "tdm":
                media, options, why = {}, {"licence": "TDM"}, "licence without media"
            elif fault == "odd name":
                media = {f"a b+c é%41 {name}": data for name, data in media.items()}
                wanted = list(media)
            elif fault == "deep":
                media = {f"figures/{name}": data for name, data in media.items()}
            if fault == "no prefix":
                why = "no prefix in the bucket"
            else:
                self.article(pmcid, version, media, **options)
            for name in media:
                key = f"{pmcid}.{version}/{name}"
                if fault == "cut":
                    self.once[key] = ["cut"]
                elif fault == "throttled":
                    self.once[key] = [429, 503]
                elif fault == "500 at first":
                    self.once[key] = [500, "drop"]
                elif fault == "html":
                    self.objects[key] = HTML
            if fault == "damaged metadata":
                self.objects[f"metadata/{pmcid}.1.json"] = HTML
            for j, name in enumerate(wanted):
                pair = f"{2000 + i}_F{j}"
                self.rows.append({"pair_id": pair, "pmc_tar_url": f"https://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/0a/{i % 100:02d}/{pmcid}.tar.gz",
                                  "image_file_path": f"{pmcid}/{name}"})
                self.expected[pair] = why
        return self

    def inventory(self, day: str, changed: dict[str, str]) -> None:
        """Adds a report: key of metadata -> time of its last change."""
        prefix = "inventory-reports/pmc-oa-opendata/metadata/"
        text = "".join(f'"pmc-oa-opendata","{key}","{moment}","{"0" * 32}"\n' for key, moment in changed.items())
        data = gzip.compress(text.encode())
        self.objects[f"{prefix}data/{day}.csv.gz"] = data
        self.objects[f"{prefix}{day}T01-00Z/manifest.json"] = json.dumps(
            {"files": [{"key": f"{prefix}data/{day}.csv.gz", "size": len(data), "MD5checksum": md5(data)}]}).encode()

    def __enter__(self):
        bucket = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_):
                pass

            def do_GET(self):
                bucket.answer(self)

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 256

            def handle_error(self, *_):  # a client that was killed
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request) -> None:
        path, _, query = request.path.partition("?")
        key = urllib.parse.unquote(path[1:])
        if not key and "list-type=2" in query:
            return self.send(request, 200, self.listing(dict(urllib.parse.parse_qsl(query))))
        with self.lock:
            self.asked[key] += 1
            faults = self.once.get(key, [])
            fault = faults.pop(0) if faults else None
            is_parked = self.park_after is not None and sum(self.served.values()) >= self.park_after
            if not is_parked and fault is None and key in self.objects:
                self.served[key] += 1
        if is_parked:
            with self.lock:
                self.num_parked += 1
            self.released.wait(60)
            request.close_connection = True
            return None
        if fault == "drop":
            request.close_connection = True
            return None
        data = self.objects.get(key)
        if isinstance(fault, int) or data is None:
            headers = {"Retry-After": "0"} if fault == 429 else {}
            return self.send(request, fault or 404, b"<Error><Code>NoSuchKey</Code></Error>", headers)
        return self.send(request, 200, data, {"ETag": f'"{md5(data)}"'}, cut=fault == "cut")

    def send(self, request, status: int, data: bytes, headers=None, cut=False) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data[:len(data) // 2] if cut else data)
        request.close_connection = request.close_connection or cut

    def listing(self, query: dict[str, str]) -> bytes:
        """One page has two entries, so that every listing of three is continued."""
        prefix = query["prefix"]
        below = sorted({prefix + key[len(prefix):].partition("/")[0] + "/" * ("/" in key[len(prefix):])
                        for key in self.objects if key.startswith(prefix)})
        start = int(query.get("continuation-token", "0"))
        items = "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" if each.endswith("/")
                        else f"<Contents><Key>{escape(each)}</Key></Contents>" for each in below[start:start + 2])
        more = f"<NextContinuationToken>{start + 2}</NextContinuationToken>" if start + 2 < len(below) else ""
        return f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{items}{more}</ListBucketResult>'.encode()
