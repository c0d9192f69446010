"""Where a text holds personal data, keys or tokens: e-mail and IP addresses, telephone and card numbers.

Precision comes first, since replacements scar dates, versions, serial numbers and code. What is found:
- email: by its ASCII form; not at example.* and other reserved domains (RFC 2606), nor `git@`.
- ip: public IPv4 and IPv6 addresses (`private_ips` for the others), neither versions nor networks ("/24").
- phone: with "+" and a country code; North American with its separators; Chinese mobile and area-code numbers next
  to Chinese text or a word like Tel; any number straight after such a word. Other national forms are left out.
- card: 14 to 19 digits that begin as an issuer's do, in its length, and pass the Luhn check (ISO/IEC 7812-1).
- key, secret: see `credentials`.
Names, street addresses, identity and account numbers are left out: they need a model, or a country's register.

Each kind is guarded by a scan for what it cannot do without (an "@", a run of digits, a prefix). `mask` is for
texts that people are shown.
"""

import bisect
import ipaddress
import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import numpy as np

from configs.cuts import KINDS, Kind
from data_pipeline import credentials

PLACEHOLDERS: dict[Kind, str] = {
    "email": "<EMAIL>",
    "ip": "<IP_ADDRESS>",
    "phone": "<PHONE>",
    "card": "<CARD>",
    "key": "<KEY>",
    "secret": "<SECRET>",
}


class Found(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int
    kind: Kind


class Numbers(NamedTuple):
    """Stretches of a text, as (start, end), where numbers of interest can be."""

    dotted: list[tuple[int, int]]  # three dots as far apart as an IPv4 address has them
    long: list[tuple[int, int]]  # at least 7 digits, never far from each other


def find(text: str, kinds: Collection[Kind] = KINDS, private_ips: bool = False) -> list[Found]:
    """What is found in `text`, in order, without overlaps: where kinds meet, the first of `_FINDERS` has it."""
    found: list[Found] = []
    numbers = _numbers(text) if {"ip", "phone", "card"} & set(kinds) else Numbers([], [])
    for kind, finder in _FINDERS.items():
        if kind in kinds:
            for start, end in finder(text, numbers, private_ips):
                place = bisect.bisect(found, (start,))
                after_one = place == 0 or found[place - 1].end <= start
                if after_one and (place == len(found) or end <= found[place].start):
                    found.insert(place, Found(start, end, kind))
    return found


def mask(text: str) -> str:
    """`text` with placeholders for all that is found; also for what may have been cut off at its end."""
    parts, position = [], 0
    for start, end, kind in find(text, private_ips=True):
        parts += [text[position:start], PLACEHOLDERS[kind]]
        position = end
    return _CUT_OFF.sub("…", "".join([*parts, text[position:]]))


# A beginning of an address, a number, a token or a key, right at the end of a text.
_CUT_OFF = re.compile(r"(?:[!-~]*@[!-~]*|[+(]?[0-9][0-9 .()\-:]{4,}|[A-Za-z0-9_\-+/=.]{8,}|-----BEGIN [^\0]*)\Z")

# --- e-mail -------------------------------------------------------------------------------------------------------

_LOCAL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._%+\-]{0,62}[A-Za-z0-9_+\-])?\Z")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.)+([A-Za-z]{2,24})(?![A-Za-z0-9_\-(\[=])")
_RESERVED_DOMAINS = re.compile(r"(?i)(?:^|\.)(?:example(?:\.(?:com|org|net|edu))?|test|invalid|local|localhost)\Z")
_FILE_TYPES = {"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "html", "json", "xml", "txt", "pdf", "zip"}
_COMMON_DOMAINS = {"com", "org", "net", "edu", "gov", "mil", "int", "info", "biz", "name", "pro", "io"}
_LONGEST_LOCAL = 64  # RFC 5321


def _emails(text: str, numbers: Numbers, private_ips: bool) -> Iterator[tuple[int, int]]:
    at = text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        # The name is sought backwards from the sign: scanning forward for one costs a try at every word.
        local = _LOCAL.search(text[max(0, at - _LONGEST_LOCAL) : at]) if domain else None
        if domain and local:
            top = domain[1].lower()
            # `w@x.mean` is a matrix product: unusual domains ask for a name of some length.
            usual = len(top) == 2 or top in _COMMON_DOMAINS or len(local[0]) >= 3
            if usual and top not in _FILE_TYPES and local[0] != "git" and not _RESERVED_DOMAINS.search(domain[0]):
                yield at - len(local[0]), domain.end()
        at = text.find("@", at + 1)


# --- numbers ------------------------------------------------------------------------------------------------------

_LONGEST_GAP = 3  # signs between two digits of a telephone number: ") " and the like
_LOOK_AROUND = 4  # characters beside digits that patterns may look at: "(", "+", "//"


def _numbers(text: str) -> Numbers:
    """One vectorised look at all characters: `re` would spend its time on the years in prose."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    dots = np.flatnonzero(codes == ord("."))
    apart = dots[2:] - dots[:-2]
    first = dots[:-2][(apart >= 4) & (apart <= 8)]
    digits = np.flatnonzero(codes - np.uint32(ord("0")) < 10)
    groups = np.flatnonzero(np.diff(digits) > _LONGEST_GAP + 1) + 1
    starts, ends = np.r_[0, groups], np.r_[groups, len(digits)]
    many = ends - starts >= 7
    return Numbers(
        [(max(0, dot - 3 - _LOOK_AROUND), dot + 12 + _LOOK_AROUND) for dot in first.tolist()],
        [
            (max(0, start - _LOOK_AROUND), end + 1 + _LOOK_AROUND)
            for start, end in zip(digits[starts[many]].tolist(), digits[ends[many] - 1].tolist(), strict=True)
        ],
    )


def _matches(pattern: re.Pattern[str], text: str, start: int, end: int) -> Iterator[re.Match[str]]:
    """Matches that begin in a stretch, whatever lies behind its end."""
    for match in pattern.finditer(text, start, end):
        if whole := pattern.match(text, match.start()):
            yield whole


_IPV4 = re.compile(
    r"(?:(?<=//)|(?<![A-Za-z0-9_.+\-/~^]))(?:[0-9]{1,3}\.){3}[0-9]{1,3}"
    r"(?![A-Za-z0-9_]|\.[0-9]|-[A-Za-z0-9]|/[0-9]{1,3}(?![0-9/]))"
)
_VERSION_BEFORE = re.compile(
    r"(?i)(?:[=<>~!]=|\bv|\b(?:version|ver|release|firmware|build|section|chapter|rfc|bsd|oid)s?|§|版本号?|第)"
    r"[\s.:=(\"']{0,3}\Z"
)
_CONTEXT = 24
_VERSION_PART = 32  # four numbers below it are taken for a version: of addresses, one in 4,096 is like that
_IPV6_MIDDLE = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IPV6_SIGNS = frozenset("0123456789abcdefABCDEF:.")
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")


def _ips(text: str, numbers: Numbers, private_ips: bool) -> Iterator[tuple[int, int]]:
    for start, end in numbers.dotted:
        for match in _matches(_IPV4, text, start, end):
            before = text[max(0, match.start() - _CONTEXT) : match.start()]
            if _is_ipv4(match[0], private_ips) and not _VERSION_BEFORE.search(before):
                yield match.span()
    done = 0
    for middle in _IPV6_MIDDLE.finditer(text):
        if middle.start() < done:
            continue
        start, end = middle.span()
        while start > 0 and text[start - 1] in _IPV6_SIGNS:
            start -= 1
        while end < len(text) and text[end] in _IPV6_SIGNS:
            end += 1
        done = end
        while text[end - 1] == "." or text[end - 1] == ":" != text[end - 2]:  # the sentence's, not the address's
            end -= 1
        bounded = not (_is_word(text[start - 1 : start]) or _is_word(text[end : end + 1]) or text[end : end + 1] == "/")
        if bounded and _is_ipv6(text[start:end], private_ips):
            yield start, end


def _is_ipv4(digits: str, private_ips: bool) -> bool:
    parts = digits.split(".")
    if any(len(part) > 1 and part[0] == "0" for part in parts) or max(map(int, parts)) > 255:
        return False
    address = ipaddress.IPv4Address(digits)
    if not address.is_global or address.is_multicast:
        return private_ips and int(parts[0]) >= 10 and not address.is_unspecified
    return max(map(int, parts)) >= _VERSION_PART


def _is_ipv6(signs: str, private_ips: bool) -> bool:
    """Slices in code (`a[1::2]`) and times have the form of addresses, but no address begins like them."""
    try:
        address = ipaddress.IPv6Address(signs)
    except ValueError:
        return False
    if len([group for group in signs.split(":") if group]) < 3:
        return False
    return address in _GLOBAL_IPV6 and (private_ips or address.is_global)


def _is_word(sign: str) -> bool:
    return sign.isascii() and (sign.isalnum() or sign == "_")


_INTERNATIONAL = re.compile(
    r"(?<![A-Za-z0-9_.+\-/=)])\+[1-9][0-9]{0,2}(?:[ .\-\u00a0]?\(?[0-9]{1,4}\)?){2,5}(?![A-Za-z0-9_]|[.\-/]?[0-9])"
)
_NORTH_AMERICAN = re.compile(
    r"(?<![A-Za-z0-9_.+\-/=(])(?:1[ \-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}-)[2-9][0-9]{2}-[0-9]{4}"
    r"(?![A-Za-z0-9_]|[.\-/][0-9])"
)
_CHINESE = re.compile(
    r"(?<![A-Za-z0-9_.+\-/=])(?:(?:86|0086)[ \-]?)?"
    r"(?:1[3-9][0-9](?:[0-9]{8}|([ \-])[0-9]{4}\1[0-9]{4})|\(?0[1-9][0-9]{1,2}\)?[ \-]?[2-9][0-9]{6,7})"
    r"(?![A-Za-z0-9_]|[.\-/][0-9])"
)
_ANY_PHONE = re.compile(r"(?<![0-9])\+?\(?[0-9](?:[ .\-()/\u00a0]{0,2}[0-9]){6,14}(?![0-9])")
_PHONE_BEFORE = re.compile(
    r"(?i)(?:\b(?:tel|telephone|phone|mobile|fax|whatsapp)(?: ?(?:no|nr|number))?\b|电话|手机|传真|热线|微信|联系方式)"
    r"[号码]{0,2}[\s.:：#]{0,3}\+?\(?\Z"
)
_CJK = re.compile(r"[\u4e00-\u9fff]")
_YEARS = re.compile(r"(?:1[5-9]|20)[0-9]{2}\D+(?:1[5-9]|20)[0-9]{2}")


def _phones(text: str, numbers: Numbers, private_ips: bool) -> Iterator[tuple[int, int]]:
    for start, end in numbers.long:
        for pattern in (_INTERNATIONAL, _NORTH_AMERICAN, _CHINESE, _ANY_PHONE):
            for match in _matches(pattern, text, start, end):
                if _is_phone(text, match, pattern):
                    yield match.span()


def _is_phone(text: str, match: re.Match[str], pattern: re.Pattern[str]) -> bool:
    before = text[max(0, match.start() - _CONTEXT) : match.start()]
    if pattern is _INTERNATIONAL:
        return 10 <= sum(map(str.isdigit, match[0])) <= 15  # E.164 allows 15
    if pattern is _NORTH_AMERICAN:
        return True
    if pattern is _CHINESE:
        beside = before[-8:] + text[match.end() : match.end() + 8]
        return bool(_CJK.search(beside) or _PHONE_BEFORE.search(before))
    return bool(_PHONE_BEFORE.search(before)) and not _YEARS.search(match[0])


_CARD = re.compile(
    r"(?<![A-Za-z0-9_.+\-/,])(?:[0-9]{4}([ \-])[0-9]{4}\1[0-9]{4}\1[0-9]{4}|3[47][0-9]{2}([ \-])[0-9]{6}\2[0-9]{5}"
    r"|[0-9]{14,19})(?![A-Za-z0-9_]|[ .\-/,][0-9])"
)
# Digits that an issuer's numbers begin with, and how many they have.
_ISSUERS = re.compile(
    r"4[0-9]{15}|(?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}|3[47][0-9]{13}"
    r"|(?:6011|65[0-9]{2}|64[4-9][0-9])[0-9]{12}|35(?:2[89]|[3-8][0-9])[0-9]{12}|62[0-9]{14,17}|3(?:0[0-5]|[68][0-9])[0-9]{11}"
)


def luhn(digits: str) -> bool:
    """The check digit of ISO/IEC 7812-1."""
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def _cards(text: str, numbers: Numbers, private_ips: bool) -> Iterator[tuple[int, int]]:
    for start, end in numbers.long:
        for match in _matches(_CARD, text, start, end):
            digits = "".join(filter(str.isdigit, match[0]))
            if _ISSUERS.fullmatch(digits) and luhn(digits):
                yield match.span()


_Finder = Callable[[str, Numbers, bool], Iterator[tuple[int, int]]]
_FINDERS: dict[Kind, _Finder] = {
    "key": lambda text, numbers, private_ips: credentials.keys(text),
    "email": _emails,
    "card": _cards,
    "ip": _ips,
    "phone": _phones,
    "secret": lambda text, numbers, private_ips: credentials.secrets(text),
}
