"""Lists of unwanted URLs: whole domains, single hosts, and paths with what lies below them.

Entries and URLs are brought to one form first: host in lower case and IDNA, no port, no trailing dot; path with its
percent escapes undone and its dots resolved (RFC 3986, section 6.2.2). Kept as sorted 8-byte hashes: five million
domains take 40 MB, and two URLs are taken for one another once in 10^12 lookups. Patterns and words in URLs are left
out.
"""

import gzip
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from configs.loader import ConfigError
from configs.sources import BlocklistConfig


class Blocklist:
    def __init__(self, domains: Iterable[str], hosts: Iterable[str], prefixes: Iterable[str]) -> None:
        """Entries as `normal_host` and `normal_url` give them."""
        self._domains, self._hosts, self._prefixes = _hashes(domains), _hashes(hosts), _hashes(prefixes)

    @classmethod
    def load(cls, config: BlocklistConfig) -> "Blocklist":
        """Errors: ConfigError for a file that is not there, or an entry that says something else than its list."""
        return cls(
            _entries(config.domains, "domains"), _entries(config.hosts, "hosts"), _entries(config.prefixes, "prefixes")
        )

    def blocks(self, url: str) -> bool:
        """Whether `url` is on one of the lists; one that cannot be parsed is not."""
        host, path = normal_url(url)
        if not host:
            return False
        labels = host.split(".")
        if len(self._domains) and any(_in(self._domains, ".".join(labels[n:])) for n in range(len(labels))):
            return True
        if _in(self._hosts, host):
            return True
        if not len(self._prefixes):
            return False
        parts = path.split("/")  # "/a/b" is below "/a", "/ab" is not
        return any(_in(self._prefixes, f"{host}{'/'.join(parts[: n + 1])}") for n in range(1, len(parts)))


def normal_host(host: str) -> str:
    """Errors: UnicodeError for a name that no host can have."""
    host = host.strip().rstrip(".").lower()
    return host if host.isascii() else host.encode("idna").decode("ascii")


def normal_url(url: str) -> tuple[str, str]:
    """(host, path without a trailing slash) of a URL with or without its scheme; ("", "") where it has no host."""
    try:
        parts = urlsplit(url.strip() if "://" in url else f"//{url.strip()}")
        host = normal_host(parts.hostname or "")
    except ValueError:  # UnicodeError is one
        return "", ""
    path = unquote(parts.path)
    path = posixpath.normpath(f"/{path.lstrip('/')}") if path.strip("/") else ""
    return host, path


def _entries(paths: Sequence[str], kind: str) -> Iterator[str]:
    for path in paths:
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if entry := line.split("#")[0].strip():
                        yield _entry(entry, kind, f"extract.blocklist.{kind}: {path}, line {number}")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ConfigError(f"extract.blocklist.{kind}: {path} cannot be read ({error}); correct the path") from None


def _entry(entry: str, kind: str, where: str) -> str:
    host, path = normal_url(entry)
    if not host or " " in entry:
        raise ConfigError(f"{where}: {entry!r} names no host; one a line, such as example.com, or remove the line")
    if kind == "prefixes":
        if not path:
            raise ConfigError(f"{where}: {entry!r} has no path; a whole host belongs into extract.blocklist.hosts")
        return f"{host}{path}"
    if path:
        raise ConfigError(f"{where}: {entry!r} has a path; it belongs into extract.blocklist.prefixes")
    return host


def _hash(entry: str) -> int:
    return int.from_bytes(blake2b(entry.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _hashes(entries: Iterable[str]) -> NDArray[np.uint64]:
    return np.unique(np.fromiter((_hash(entry) for entry in entries), dtype=np.uint64))


def _in(hashes: NDArray[np.uint64], entry: str) -> bool:
    wanted = np.uint64(_hash(entry))
    index = int(np.searchsorted(hashes, wanted))
    return index < len(hashes) and hashes[index] == wanted
