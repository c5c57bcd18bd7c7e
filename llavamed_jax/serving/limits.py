"""What a server accepts from its clients; each value is a flag of `serve.py`."""

from __future__ import annotations

import dataclasses

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits with defaults that are safe for one machine.

    Attributes:
      max_body_bytes: of a request's body, counted while it is read.
      max_image_bytes: of one image, decoded from base64 or fetched.
      max_image_pixels: of one image, read from its header before it is decoded.
      max_images: of one request.
      max_request_pixels: of all images of one request together, before they are decoded.
      max_prompt_tokens: positions of a prompt, images included; None is what the model takes.
      max_new_tokens: of one answer; None is what fits behind the prompt.
      max_requests: requests that are read, prepared, queued or answered at once.
      max_queue: prepared requests that wait for a row.
      max_connections: open connections.
      key_share: the part of the rows and of the queue that one API key may hold while another one waits.
      timeout: seconds from the arrival of a request to the end of its answer.
      header_timeout: seconds in which the headers of a request must arrive, the first or the next of a connection.
      body_timeout: seconds in which a body must arrive.
      send_timeout: seconds that a client may leave a piece of its answer unread.
      fetch_timeout: seconds in which a remote image must arrive.
      drain_timeout: seconds that running requests get after SIGTERM.
    """

    max_body_bytes: int = 32 * MIB
    max_image_bytes: int = 16 * MIB
    max_image_pixels: int = 50_000_000
    max_images: int = 8
    max_request_pixels: int = 100_000_000
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_requests: int = 256
    max_queue: int = 128
    max_connections: int = 1024
    key_share: float = 0.5
    timeout: float = 600.0
    header_timeout: float = 20.0
    body_timeout: float = 60.0
    send_timeout: float = 60.0
    fetch_timeout: float = 10.0
    drain_timeout: float = 30.0


DEFAULTS = Limits()
