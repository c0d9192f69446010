"""URLs of documents, and the 64-bit key by which documents with the same URL are recognized."""

import re
import string
from typing import Any
from urllib.parse import quote, urlsplit

from data_pipeline.core.hashing import stable_hash

URL_KEY = "url_key"  # metadata: key of the original address, if the published one has personal data replaced


_ESCAPE = re.compile("%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset(string.ascii_letters + string.digits + "-._~")
_KEPT = string.printable.replace(" ", "")


def url_of(metadata: dict[str, Any]) -> str:
    """Returns the URL that a document came from, or "" if it is not known."""
    inner = metadata.get("record")
    url = metadata.get("url") or (inner.get("url") if isinstance(inner, dict) else None)
    return url if isinstance(url, str) else ""


def url_key(url: str) -> int:
    """Returns a 64-bit hash of a normalized URL, or 0 if the URL is empty.

    Normalizing puts the host in lower case and drops the scheme, "www.", default ports, the fragment, trailing slashes.
    Letters beyond ASCII count as their escapes ("%C3%A9"), and as punycode in a host, since browsers show the letters.
    """
    try:
        parts = urlsplit(url.strip())
        port = f":{parts.port}" if parts.port not in (None, 80, 443) else ""
    except ValueError:  # not a URL: hashed as it is
        return stable_hash(url.strip()) or 1
    host = _plain_host((parts.hostname or "").rstrip(".")).removeprefix("www.")
    query = f"?{parts.query}" if parts.query else ""
    address = f"{host}{port}{_plain_escapes(parts.path.rstrip('/') + query)}"
    return (stable_hash(address) or 1) if address else 0


def _plain_host(host: str) -> str:
    """Returns a host in punycode, or as it is if it has no such form."""
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return host


def _plain_escapes(part: str) -> str:
    """Writes path and query in one way (RFC 3986, section 6.2.2): escapes in capitals, none that need not be."""
    if "%" in part:
        part = _ESCAPE.sub(lambda found: _character_or_escape(found[1]), part)
    return part if part.isascii() and " " not in part else quote(part, safe=_KEPT, errors="replace")


def _character_or_escape(digits: str) -> str:
    character = chr(int(digits, 16))
    return character if character in _UNRESERVED else f"%{digits.upper()}"
