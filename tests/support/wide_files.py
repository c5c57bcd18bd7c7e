"""TIFF, PNG and PGM of any bit depth, written here byte by byte: Pillow writes few of them."""

import struct
import zlib

import numpy as np

_FORMATS = {"u": 1, "i": 2, "f": 3}


def tiff(pages, photometric=1, order="<", compression=1, tile=None, planar=1, fill=1, bits=None, extra=None, is_big=False):
    """Pages as arrays [H,W] or [H,W,S]; `bits` packs whole numbers into so many a sample; `photometric` None leaves its
    tag out.

    `compression` is 1 (none) or 8 (deflate); `tile` an edge, for tiles in place of one strip; `fill` 2 turns the bits of
    a byte; `is_big` is BigTIFF.
    """
    number, offset, room = ("Q", "Q", 8) if is_big else ("H", "I", 4)
    head = struct.pack(order + "HHHQ", 43, 8, 0, 0) if is_big else struct.pack(order + "HI", 42, 0)
    out = (b"II" if order == "<" else b"MM") + head
    link = len(out) - room
    for values in [pages] if isinstance(pages, np.ndarray) else pages:
        values = values[..., None] if values.ndim == 2 else values
        height, width, samples = values.shape
        parts = [values[..., i:i + 1] for i in range(samples)] if planar == 2 else [values]
        chunks = [chunk for part in parts for chunk in (_tiles(part, tile) if tile else [part])]
        chunks = [_packed(chunk, bits, order, fill) for chunk in chunks]
        chunks = [zlib.compress(chunk) if compression == 8 else chunk for chunk in chunks]
        places = []
        for chunk in chunks:
            out += b"\0" * (len(out) % 2)
            places.append(len(out))
            out += chunk
        sizes = list(map(len, chunks))
        tags = {256: (4, [width]), 257: (4, [height]), 258: (3, [bits or 8 * values.itemsize] * samples),
                259: (3, [compression]),
                262: (3, [photometric]), 266: (3, [fill]), 277: (3, [samples]), 284: (3, [planar]),
                339: (3, [_FORMATS[values.dtype.kind]] * samples)}
        tags |= ({322: (4, [tile]), 323: (4, [tile]), 324: (4, places), 325: (4, sizes)} if tile else
                 {273: (4, places), 278: (4, [height]), 279: (4, sizes)})
        tags |= {} if extra is None else {338: (3, [extra])}
        tags = {tag: value for tag, value in tags.items() if value != (3, [None])}
        out += b"\0" * (len(out) % 2)
        start = len(out)
        out = out[:link] + struct.pack(order + offset, start) + out[link + room:]
        first = start + struct.calcsize("<" + number)
        beyond, rest, entries = first + (4 + 2 * room) * len(tags) + room, b"", b""
        for tag in sorted(tags):
            kind, numbers = tags[tag]
            value = struct.pack(order + {3: "H", 4: "I"}[kind] * len(numbers), *numbers)
            is_inside = len(value) <= room
            field = value.ljust(room, b"\0") if is_inside else struct.pack(order + offset, beyond + len(rest))
            rest += b"" if is_inside else value
            entries += struct.pack(order + "HH" + offset, tag, kind, len(numbers)) + field
        link = first + len(entries)
        out += struct.pack(order + number, len(tags)) + entries + bytes(room) + rest
    return out


def _tiles(values, edge):
    height, width = (-(-n // edge) * edge for n in values.shape[:2])
    padded = np.zeros((height, width, values.shape[2]), values.dtype)
    padded[:values.shape[0], :values.shape[1]] = values
    return [padded[y:y + edge, x:x + edge] for y in range(0, height, edge) for x in range(0, width, edge)]


def _packed(values, bits, order, fill):
    """Rows of samples; fewer bits than a byte, or twelve, from the highest bit on, each row beginning a byte."""
    if bits is None or bits == 8 * values.itemsize:
        content = values.astype(values.dtype.newbyteorder(order)).tobytes()
        return content if fill == 1 else np.packbits(np.unpackbits(np.frombuffer(content, np.uint8)),
                                                     bitorder="little").tobytes()
    rows = values.reshape(len(values), -1).astype(np.int64)
    each = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(each.reshape(len(rows), -1).astype(np.uint8), axis=1,
                       bitorder="big" if fill == 1 else "little").tobytes()


def png(values, color, bits, is_interlaced=False, chunks=()):
    """PNG of whole numbers [H,W] or [H,W,S] of colour type `color`; `chunks` are pairs of name and content before the pixels."""
    values = values[..., None] if values.ndim == 2 else values
    height, width = values.shape[:2]
    passes = [values]
    if is_interlaced:
        passes = [values[y::dy, x::dx] for x, y, dx,
                  dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4),
                                                            (1, 0, 2, 2), (0, 1, 1, 2))]
    raw = b"".join(b"\0" + _packed(row[None].astype(np.int64), bits, ">", 1) if bits < 16
                   else b"\0" + row.astype(">u2").tobytes()
                   for each in passes if each.size for row in each)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, int(is_interlaced))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunk(*each) for each in chunks)
            + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))


def pnm(values, highest, is_plain=False):
    """PGM or PPM of whole numbers [H,W] or [H,W,3] up to `highest`, as text or as bytes."""
    magic = {(2, False): "P5", (3, False): "P6", (2, True): "P2", (3, True): "P3"}[values.ndim, is_plain]
    header = f"{magic}\n# made here\n{values.shape[1]} {values.shape[0]}\n{highest}\n".encode()
    if is_plain:
        return header + "\n".join(map(str, values.ravel().tolist())).encode()
    return header + values.astype(">u2" if highest > 255 else "u1").tobytes()
