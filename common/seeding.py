"""Seeds of independent random streams, each derived from whatever identifies the stream."""

import hashlib


def derive_seed(*parts: object) -> int:
    """A 63-bit seed: the first bits of the SHA-256 of the parts, joined by slashes."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
