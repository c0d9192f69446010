"""Decoder of web pages: finds a page's encoding from its declarations and its bytes, and turns the bytes into text.

Encodings are tried in the order of the HTML standard (13.2.3.1): a byte order mark, the charset in the HTTP header, the
page's own declaration (<meta charset>, <meta http-equiv>, an XML declaration), then a guess from the bytes. Three rules
go beyond the standard, since the declarations of many pages are wrong:

- A declaration counts if it is in the first 64 KiB, as in a browser that has begun to parse, and not only in the first
  1024 bytes.
- Bytes that are valid UTF-8 are decoded as UTF-8 even if another encoding is named: text in another encoding is
  practically never valid UTF-8. Only short texts for which a multi-byte encoding is named can be both; for these the
  declaration counts. Likewise, ASCII bytes with escape sequences of ISO-2022 are in no encoding without them.
- A named encoding that does not fit is skipped: one in which more than half of the characters beyond ASCII fail or,
  except for UTF-8, in which more than three fail and they are over 10% of those that do not. So a truncated or stray
  byte costs one character, and a wrong label costs nothing.

If nothing is declared, bytes are decoded as UTF-8 if 90% of their characters beyond ASCII allow it, else as resiliparse
guesses. If no encoding fits, the one in which the fewest characters fail is used.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from resiliparse.parse.encoding import detect_encoding

from configs.sources import ExtractConfig
from data_pipeline.reading.charsets import STATEFUL, WIDE, charset_of, decode, marked_charset, wide_charset
from data_pipeline.reading.input_records import SAMPLE_BYTES, Record

# How a page's encoding was found.
MARKED, HEADER, DECLARED = "byte order mark", "HTTP header", "the page's declaration"
BY_BYTES, BY_NULS, GUESSED = "being valid UTF-8", "the NULs of UTF-16 or UTF-32", "a guess"

_DECLARED_WITHIN = 1 << 16
_ESCAPES = (b"\x1b$", b"~{")  # escape sequences of ISO-2022 and HZ, which otherwise look like ASCII
_ISO2022 = re.compile(rb"\x1b\$[@B()]")
_WIDE_PROBE = 256
_MULTIBYTE = frozenset(
    {
        *("cp949", "gb18030", "big5hkscs", "euc_jp", "cp932", "johab"),
        *("shift_jis_2004", "shift_jisx0213", "euc_jis_2004", "euc_jisx0213"),
    }
)
_UTF8_SEQUENCE = re.compile(rb"[\xc2-\xf4][\x80-\xbf]+")
_ENOUGH_SEQUENCES = 4
_TOLERATED = 3
_TOLERATED_SHARE = 0.1
# C1 controls do not occur in text: a byte that decodes to one belongs to another encoding.
_NOWHERE = re.compile("[\x80-\x9f]")
# A Ukrainian letter in KOI8-U between Cyrillic ones; in KOI8-R it would be a piece of a frame in the middle of a word.
_UKRAINIAN = re.compile(rb"[\xc0-\xff][\xa4\xa6\xa7\xad\xb4\xb6\xb7\xbd][\xc0-\xff]")
_NO_TEXT = re.compile("[\ufffd\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f]")

_TAG = re.compile(rb"<([a-zA-Z][^\s/>]*)")
_ATTRIBUTE = re.compile(rb"[\s/]*([^\s/>=][^\s/>=]*)(?:\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s>\"'][^\s>]*)))?")
_RAW_TEXT = (b"script", b"style", b"title", b"textarea")
_XML_DECLARATION = re.compile(rb"\s*<\?xml\s[^>]*?\bencoding\s*=\s*[\"']([^\"']{1,100})[\"']")
_CHARSET = re.compile(r"charset\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s;\"']+))", re.IGNORECASE)


@dataclass(frozen=True)
class DecodedPage:
    """A page's text, Python's name of its codec, how it was found, and the share of characters that failed."""

    text: str
    charset: str
    known_by: str
    lost: float = 0.0


def decode_page(content: bytes, content_type: str = "", markup: bool = True) -> DecodedPage:
    """Decodes a page. `content_type` is the HTTP header; `markup` says whether to look for a declaration inside."""
    failed: list[tuple[float, DecodedPage]] = []
    for charset, known_by in _candidates(content, content_type, markup):
        if known_by in (HEADER, DECLARED):
            if charset != "utf-8" and _is_utf8_after_all(content, charset):
                continue  # UTF-8 is tried later in this loop
            if not charset.startswith(STATEFUL) and _is_iso2022(content):
                continue
        text = decode(content, charset)
        replaced = text.count("\ufffd")
        if charset == "utf-8":  # do not count U+FFFD characters that the page itself contains
            replaced -= content.count("\ufffd".encode())
        bad = replaced + (0 if charset.startswith("utf") else len(text) - len(_NOWHERE.sub("", text)))
        if not bad:
            return DecodedPage(text, charset, known_by)
        share = 1 - len(_NO_TEXT.sub("", text)) / len(text)
        if known_by != GUESSED and _is_believed(text, charset, known_by, bad):
            return DecodedPage(text, charset, known_by, replaced / len(text) if charset == "utf-8" else share)
        failed.append((share, DecodedPage(text, charset, known_by, share)))
    return min(failed, key=lambda found: found[0])[1]


def fill_page(
    record: Record, content: bytes, limits: ExtractConfig, content_type: str = "", markup: bool = True
) -> None:
    """Sets the text of a page's record, or the reason `undecodable` if too much of the page cannot be decoded."""
    page = decode_page(content, content_type, markup)
    record.html, record.text, record.charset_from = markup, page.text, page.known_by
    if page.lost > limits.max_undecoded_share:
        record.html, record.reason, record.text = False, "undecodable", page.text[:SAMPLE_BYTES]


def header_charset(content_type: str) -> str:
    """Returns the codec that a Content-Type header names, or "" if it names none or an unknown one."""
    found = _CHARSET.search(content_type)
    return charset_of(next(filter(None, found.groups()), "")) if found else ""


def declared_charset(content: bytes) -> str:
    """Returns the codec that a page declares in its beginning (HTML, 13.2.3.2: prescan a byte stream), or ""."""
    head = content[:_DECLARED_WITHIN]
    found = _meta_charset(head)
    if not found and (declaration := _XML_DECLARATION.match(head)):
        found = charset_of(declaration[1].decode("latin-1"))
    # A declaration in UTF-16 or UTF-32 could not be read byte by byte, so one that names them is wrong.
    return "utf-8" if found.startswith(WIDE) else found


def _candidates(content: bytes, content_type: str, markup: bool) -> Iterator[tuple[str, str]]:
    """Yields (codec, how it was found) in the order in which they are to be tried."""
    if marked := marked_charset(content):
        yield marked, MARKED
    if wide := _wide(content):
        yield wide, BY_NULS
    named = header_charset(content_type)
    if named and (b"\0" in content[:_WIDE_PROBE] or not named.startswith(WIDE)):
        yield named, HEADER
    if markup and (named := declared_charset(content)):
        yield named, DECLARED
    if not any(escape in content for escape in _ESCAPES):
        yield "utf-8", BY_BYTES
    # html5_compatible would replace encodings that have no WHATWG name in resiliparse's table, such as cp949, by UTF-8.
    if guessed := charset_of(detect_encoding(content, html5_compatible=False) or ""):
        yield "koi8-u" if guessed == "koi8-r" and _UKRAINIAN.search(content) else guessed, GUESSED
    yield "utf-8", GUESSED
    yield "cp1252", GUESSED


def _wide(content: bytes) -> str:
    """Returns the UTF-16 or UTF-32 codec that NULs show, in the first characters or in most of the others, or ""."""
    head = content[:_WIDE_PROBE]
    if found := wide_charset(head):
        return found
    even, odd = head[::2], head[1::2]
    if len(head) >= 4 and odd.count(0) > 0.7 * len(odd) and not even.count(0):
        return "utf-16-le"
    return "utf-16-be" if len(head) >= 4 and even.count(0) > 0.7 * len(even) and not odd.count(0) else ""


def _is_utf8_after_all(content: bytes, charset: str) -> bool:
    """Whether content for which another `charset` is named is valid UTF-8 and cannot be in that charset by chance."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    sequences = [found[0] for found in itertools.islice(_UTF8_SEQUENCE.finditer(content), _ENOUGH_SEQUENCES)]
    if charset not in _MULTIBYTE or len(sequences) >= _ENOUGH_SEQUENCES:
        return bool(sequences)
    # EUC and GB 2312 do not use 0x80 to 0xA0, so a single curly quote (E2 80 99) is enough evidence for UTF-8.
    return any(min(sequence[1:]) <= 0xA0 for sequence in sequences)


def _is_iso2022(content: bytes) -> bool:
    """Whether ASCII bytes have escape sequences of ISO-2022, which make sense in no other encoding."""
    return _ISO2022.search(content) is not None and content.isascii()


def _is_believed(text: str, charset: str, known_by: str, bad: int) -> bool:
    """Tells whether so few characters of `text` failed (`bad`) that its charset is accepted, by our limits."""
    beyond_ascii = len(text) if charset.startswith(WIDE) else len(text) - len(text.encode("ascii", "ignore"))
    good = beyond_ascii - bad
    if known_by in (BY_BYTES, BY_NULS):
        return bad <= _TOLERATED_SHARE * good
    return bad <= good and (charset == "utf-8" or bad <= max(_TOLERATED, _TOLERATED_SHARE * good))


def _meta_charset(head: bytes) -> str:
    """Returns the codec that the first <meta> with a charset names, or "" if there is none."""
    position, lowered = 0, head.lower()
    while (position := head.find(b"<", position)) >= 0:
        if head.startswith(b"<!--", position):
            end = head.find(b"-->", position + 2)
            if end < 0:
                return ""
            position = end + 3
        elif tag := _TAG.match(head, position):
            name, position = tag[1].lower(), tag.end()
            attributes: dict[bytes, bytes] = {}
            while found := _ATTRIBUTE.match(head, position):
                attributes.setdefault(found[1].lower(), found[2] or found[3] or found[4] or b"")
                position = found.end()
            if name == b"meta" and (charset := _of_meta(attributes)):
                return charset
            if name in _RAW_TEXT and (end := lowered.find(b"</" + name, position)) >= 0:
                position = end
        else:
            position += 1
    return ""


def _of_meta(attributes: dict[bytes, bytes]) -> str:
    if b"charset" in attributes:
        return charset_of(attributes[b"charset"].decode("latin-1"))
    if attributes.get(b"http-equiv", b"").strip().lower() == b"content-type":
        return header_charset(attributes.get(b"content", b"").decode("latin-1"))
    return ""
