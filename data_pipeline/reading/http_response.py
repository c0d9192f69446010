"""Parser of stored HTTP responses: status, headers, and the position of the body.

Archives hold what servers sent, which often violates RFC 9112: line ends may be bare line feeds, headers may be folded
or repeated, interim responses (100 Continue) may come first, and there may be no header at all.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_HEADER_BYTES = 1 << 18
_STATUS = re.compile(rb"[\r\n]*(?:HTTP/\d(?:\.\d)?|ICY)[ \t]+(\d{3})", re.IGNORECASE)
_HEADER_END = re.compile(rb"\r?\n\r?\n")
_LINE_END = re.compile(rb"\r?\n")
_RANGE = re.compile(r"bytes\s+0-(\d+)/(\d+)", re.IGNORECASE)
# Elements, also obsolete ones, with which a page may begin. Browsers look for fewer of them (WHATWG MIME Sniffing,
# section 7.1), but servers that send no type also send parts of pages.
_TAGS = (
    "!DOCTYPE HTML|HTML|HEAD|BODY|SCRIPT|STYLE|TITLE|META|LINK|BASE|NOSCRIPT|TEMPLATE|IFRAME|FRAMESET|FRAME|NOFRAMES"
    "|H[1-6]|HGROUP|DIV|SPAN|P|A|B|I|U|S|BR|HR|FONT|CENTER|STRONG|EM|SMALL|BIG|TT|CODE|PRE|BLOCKQUOTE|ADDRESS|NOBR"
    "|SECTION|ARTICLE|MAIN|HEADER|FOOTER|NAV|ASIDE|FIGURE|DETAILS|DIALOG|SEARCH|TABLE|TBODY|THEAD|TR|TD|UL|OL|DL|LI|DT"
    "|DD|DIR|MENU|FORM|FIELDSET|INPUT|BUTTON|LABEL|IMG|PICTURE|VIDEO|AUDIO|CANVAS|MAP|MARQUEE|BASEFONT|BGSOUND|LAYER"
)
_MARKUP = re.compile(
    rb"(?:\xef\xbb\xbf)?[\t\n\f\r ]*(?:<!--|<(?:%b)[ \t\n\f\r>/]"
    rb"|<\?xml\b.{0,1024}?<(?:!DOCTYPE )?HTML[ \t\n\f\r>])" % _TAGS.encode(),
    re.IGNORECASE | re.DOTALL,
)
# A document after text, such as a server's warning; no code or data, in which markup can begin a line as well.
_PAGE_AFTER_TEXT = re.compile(
    rb"[^{};=`\x00-\x08\x0e-\x1a\x1c-\x1f]*\n[\t ]*<(?:!DOCTYPE[ \t]+HTML|HTML)[ \t\n\f\r>]", re.IGNORECASE
)
_UTF16_MARKS = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
_SNIFFED = 2048
# Content types that servers send when they do not know a file's type.
_UNKNOWN_TYPES = ("", "unknown/unknown", "application/unknown", "*/*")


@dataclass(frozen=True)
class Response:
    """A response's status (0 without a status line), its headers and the byte at which its body starts.

    `headers` are (name in lower case, value), in the order sent.
    """

    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body_start: int = 0

    def all(self, name: str) -> str:
        """Returns the values of all headers of that name, joined by commas."""
        return ", ".join(value for own, value in self.headers if own == name and value)

    def content_type(self) -> str:
        """Returns all Content-Type values joined by "; ", the last one first.

        Browsers use the last one for the type; an earlier one may still name the charset.
        """
        values = [value for own, value in self.headers if own == "content-type" and value]
        return "; ".join(reversed(values))

    def has_page(self) -> bool:
        """Whether the body is a whole page: status 200, 203 (changed by a proxy), none, or 206 with the full range."""
        if self.status == 206:
            span = _RANGE.search(self.all("content-range"))
            return span is not None and int(span[1]) + 1 == int(span[2])
        return self.status in (0, 200, 203)


def parse_response(content: bytes) -> Response:
    """Parses the response at the start of `content`, which may be truncated.

    Interim responses (1xx) are skipped. Content without a status line is returned as a body without headers.
    """
    start = 0
    while found := _STATUS.match(content, start):
        end = _HEADER_END.search(content, found.end(), start + MAX_HEADER_BYTES)
        head, start = content[found.end() : end.start() if end else None], end.end() if end else len(content)
        if not found[1].startswith(b"1"):
            return Response(int(found[1]), list(_headers(head)), start)
    return Response(body_start=start)


def _headers(head: bytes) -> Iterator[tuple[str, str]]:
    lines: list[str] = []
    for line in _LINE_END.split(head)[1:]:
        text = line.decode("latin-1")
        if lines and text[:1] in (" ", "\t"):
            lines[-1] += text
        else:
            lines.append(text)
    for text in lines:
        name, colon, value = text.partition(":")
        if colon:
            yield name.strip().lower(), value.strip()


def mime_type(content_type: str) -> str:
    """Returns the type in a Content-Type header, in lower case and without its parameters."""
    return re.split(r"[;,\s]", content_type.strip(), maxsplit=1)[0].lower()


def is_type_unknown(kind: str) -> bool:
    """Whether a MIME type is missing or one by which a server says that it does not know the type."""
    return kind in _UNKNOWN_TYPES


def looks_like_page(body: bytes) -> bool:
    """Whether a body begins with an HTML tag or comment, or with text before a document; for bodies of unknown type."""
    head = body[:_SNIFFED]
    if charset := _UTF16_MARKS.get(head[:2]):
        head = head[2:].decode(charset, "replace").encode("utf-8")
    return bool(_MARKUP.match(head) or _PAGE_AFTER_TEXT.match(head))
