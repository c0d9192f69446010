"""Where documents came from: their addresses, and the key under which equal addresses meet."""

from typing import Any
from urllib.parse import urlsplit

from data_pipeline.core.hashing import stable_hash


def url_of(metadata: dict[str, Any]) -> str:
    """The URL that a document came from, "" where it is not known."""
    inner = metadata.get("record")
    url = metadata.get("url") or (inner.get("url") if isinstance(inner, dict) else None)
    return url if isinstance(url, str) else ""


def url_key(url: str) -> int:
    """64 bits of an address; 0 for none. Host in lower case, no "www.", no default port, no fragment, no last slash."""
    try:
        parts = urlsplit(url.strip())
        port = f":{parts.port}" if parts.port not in (None, 80, 443) else ""
    except ValueError:  # not an address: taken as it is
        return stable_hash(url.strip()) or 1
    host = (parts.hostname or "").removeprefix("www.")
    query = f"?{parts.query}" if parts.query else ""
    address = f"{host}{port}{parts.path.rstrip('/')}{query}"
    return (stable_hash(address) or 1) if address else 0
