"""Lists of unwanted URLs: whole domains, single hosts, and paths with everything below them.

Entries and URLs are normalized before they are compared: host in lower case and IDNA, no port, no trailing dot; path
with percent escapes decoded and dot segments resolved (RFC 3986, section 6.2.2). Entries are held as sorted 8-byte
hashes: five million domains take 40 MB, and about one lookup in 10^12 confuses two URLs. Patterns and words in URLs are
not supported.
"""

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from configs.loader import ConfigError
from configs.sources import BlocklistConfig, ExtractConfig
from data_pipeline.reading.whole_files import NotWhole, whole_lines

_LIMITS = ExtractConfig()


class Blocklist:
    """Sets of unwanted domains, hosts and path prefixes, held as sorted hashes."""

    def __init__(self, domains: Iterable[str], hosts: Iterable[str], prefixes: Iterable[str]) -> None:
        """Builds the sets from entries that `normal_host` and `normal_url` have normalized."""
        self._domains, self._hosts, self._prefixes = _hashes(domains), _hashes(hosts), _hashes(prefixes)

    @classmethod
    def load(cls, config: BlocklistConfig) -> "Blocklist":
        """Reads the lists that a config names; raises ConfigError for an unreadable file or an unsuitable entry."""
        return cls(
            _entries(config.domains, "domains"), _entries(config.hosts, "hosts"), _entries(config.prefixes, "prefixes")
        )

    def blocks(self, url: str) -> bool:
        """Returns whether a list covers `url`; False for a URL that cannot be parsed."""
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
    """Returns a host name in lower case and IDNA, without a trailing dot; raises UnicodeError if it is invalid."""
    host = host.strip().rstrip(".").lower()
    return host if host.isascii() else host.encode("idna").decode("ascii")


def normal_url(url: str) -> tuple[str, str]:
    """Returns (host, path without a trailing slash) of a URL with or without a scheme; ("", "") if it has no host."""
    try:
        parts = urlsplit(url.strip() if "://" in url else f"//{url.strip()}")
        host = normal_host(parts.hostname or "")
    except ValueError:  # includes UnicodeError
        return "", ""
    path = unquote(parts.path)
    path = posixpath.normpath(f"/{path.lstrip('/')}") if path.strip("/") else ""
    return host, path


def _entries(paths: Sequence[str], kind: str) -> Iterator[str]:
    for path in paths:
        try:
            with open(path, "rb") as file:
                for line in whole_lines(file, path, _LIMITS):
                    if entry := line.content.decode("utf-8-sig").split("#")[0].strip():
                        yield _entry(entry, kind, f"extract.blocklist.{kind}: {path}, line {line.number}")
        except (OSError, NotWhole, UnicodeDecodeError) as error:
            raise ConfigError(
                f"extract.blocklist.{kind}: {path} cannot be read ({error}); name a file of UTF-8 text, plain or "
                "compressed by gzip or Zstandard"
            ) from None


def _entry(entry: str, kind: str, where: str) -> str:
    """Normalizes an entry of the list `kind`; raises ConfigError, prefixed by `where`, if it does not fit that list."""
    host, path = normal_url(entry)
    if not host or " " in entry:
        raise ConfigError(
            f"{where}: {entry!r} names no host; write one entry per line, such as example.com, or remove the line"
        )
    if kind == "prefixes":
        if not path:
            raise ConfigError(f"{where}: {entry!r} has no path; a whole host belongs in extract.blocklist.hosts")
        return f"{host}{path}"
    if path:
        raise ConfigError(f"{where}: {entry!r} has a path; it belongs in extract.blocklist.prefixes")
    return host


def _hash(entry: str) -> int:
    return int.from_bytes(blake2b(entry.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _hashes(entries: Iterable[str]) -> NDArray[np.uint64]:
    return np.unique(np.fromiter((_hash(entry) for entry in entries), dtype=np.uint64))


def _in(hashes: NDArray[np.uint64], entry: str) -> bool:
    wanted = np.uint64(_hash(entry))
    index = int(np.searchsorted(hashes, wanted))
    return index < len(hashes) and hashes[index] == wanted
