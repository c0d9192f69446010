"""URLs of documents, and the 64-bit key by which documents with the same URL are recognized."""

from typing import Any
from urllib.parse import urlsplit

from data_pipeline.core.hashing import stable_hash

URL_KEY = "url_key"  # metadata: key of the original address, if the published one has personal data replaced


def url_of(metadata: dict[str, Any]) -> str:
    """Returns the URL that a document came from, or "" if it is not known."""
    inner = metadata.get("record")
    url = metadata.get("url") or (inner.get("url") if isinstance(inner, dict) else None)
    return url if isinstance(url, str) else ""


def url_key(url: str) -> int:
    """Returns a 64-bit hash of a normalized URL, or 0 if the URL is empty.

    Normalizing puts the host in lower case and drops the scheme, "www.", default ports, the fragment, trailing slashes.
    """
    try:
        parts = urlsplit(url.strip())
        port = f":{parts.port}" if parts.port not in (None, 80, 443) else ""
    except ValueError:  # not a URL: hashed as it is
        return stable_hash(url.strip()) or 1
    host = (parts.hostname or "").removeprefix("www.")
    query = f"?{parts.query}" if parts.query else ""
    address = f"{host}{port}{parts.path.rstrip('/')}{query}"
    return (stable_hash(address) or 1) if address else 0
