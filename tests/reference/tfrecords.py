"""TFRecord files written by hand, byte by byte, so that tests can damage any part of them."""

import struct

from imagen_jax.data.sources import tfrecord


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a message."""
    size, packed = len(content), b""
    while size > 127:
        packed, size = packed + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + packed + bytes([size]) + content


def example(image: bytes, caption: bytes) -> bytes:
    """A serialised tf.train.Example with the features image and caption."""

    def feature(name: bytes, value: bytes) -> bytes:
        return field(1, field(1, name) + field(2, field(1, field(1, value))))

    return field(1, feature(b"image", image) + feature(b"caption", caption))


def record(payload: bytes) -> bytes:
    """A record with its two checksums."""
    length = struct.pack("<Q", len(payload))
    checksums = [struct.pack("<I", tfrecord.masked_crc(part)) for part in (length, payload)]
    return length + checksums[0] + payload + checksums[1]
