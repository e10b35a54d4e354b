"""Fingerprints: short hashes of everything that a result depends on."""

import hashlib
import json
from typing import Any


def fingerprint(**parts: Any) -> str:
    """128-bit hex hash of named JSON-able parts (input hash, settings, model revision, stage version).

    Independent of key order. Raises TypeError for anything that JSON cannot hold, so that no `repr` with an address
    in it can make a fingerprint that never matches again.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
