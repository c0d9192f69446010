"""Finds personal data, keys and tokens in a text: e-mail and IP addresses, telephone and card numbers.

Precision comes before recall, since false replacements damage dates, versions, serial numbers and code. The kinds are:
- email: addresses in Latin, Greek and Cyrillic letters, except at example.* and other reserved domains (RFC 2606), and
  except `git@`. Also those with "%40" or "(at)" for "@", "[dot]" for ".", and bare "AT" and "DOT" in capital letters:
  in small letters they could not be told from prose ("look at me dot com").
- ip: public IPv4 and IPv6 addresses (with `private_ips`, others too), but not versions and networks ("/24").
- phone: see `phones`.
- card: 14 to 19 digits with an issuer's prefix and length that pass the Luhn check (ISO/IEC 7812-1).
- key, secret: see `credentials`.
Names, street addresses, identity and account numbers are not found: they need a model, or a country's register.

One compiled pass finds the parts of a text that each kind needs (digits close together, dots, a long run of letters and
digits); regular expressions are tried only there. `mask` is for texts that are shown to people.
"""

import bisect
import ipaddress
import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import numba
import numpy as np

from configs.cuts import KINDS, Kind
from data_pipeline.personal_data import credentials
from data_pipeline.personal_data.credentials import LONG_RUN
from data_pipeline.personal_data.phones import phones
from data_pipeline.scan.characters import codes_of

_Spans = tuple[np.ndarray, np.ndarray]

PLACEHOLDERS: dict[Kind, str] = {
    "email": "<EMAIL>",
    "ip": "<IP_ADDRESS>",
    "phone": "<PHONE>",
    "card": "<CARD>",
    "key": "<KEY>",
    "secret": "<SECRET>",
}


class PersonalSpan(NamedTuple):
    """Personal data found in characters [start, end) of a text, and its kind."""

    start: int
    end: int
    kind: Kind


class CandidateSpans(NamedTuple):
    """Parts of a text, as (start, end), that may hold personal data; most finders look only at these."""

    dotted: list[tuple[int, int]]  # three dots at the distances of an IPv4 address
    numbers: list[tuple[int, int]]  # at least 7 digits, with at most 3 other characters between two of them
    runs: list[tuple[int, int]]  # LONG_RUN or more letters, digits, "_" and "-" in a row


def find(text: str, kinds: Collection[Kind] = KINDS, private_ips: bool = False) -> list[PersonalSpan]:
    """Finds all personal data of these kinds, in order and without overlaps.

    If finds of two kinds overlap, the kind that comes first in `_FINDERS` wins. `private_ips` includes IP addresses
    that are not public.
    """
    found: list[PersonalSpan] = []
    if not text.isascii() and WIDE.search(text):
        text = text.translate(_NARROW)  # character by character, so positions stay the same
    candidates = _candidate_spans(text)
    for kind, finder in _FINDERS.items():
        if kind in kinds:
            for start, end in finder(text, candidates, private_ips):
                position = bisect.bisect(found, (start,))
                after_one = position == 0 or found[position - 1].end <= start
                if after_one and (position == len(found) or end <= found[position].start):
                    found.insert(position, PersonalSpan(start, end, kind))
    return found


def mask(text: str) -> str:
    """Replaces personal data by placeholders; data that the text's end cuts off becomes "…"."""
    parts, position = [], 0
    for start, end, kind in find(text, private_ips=True):
        parts += [text[position:start], PLACEHOLDERS[kind]]
        position = end
    return _CUT_OFF.sub("…", "".join([*parts, text[position:]]))


# Full-width forms, as Chinese, Japanese and Korean texts have them, stand for ASCII characters, and so do the digits of
# Arabic, Persian, Hindi, Bengali and Thai.
_ZEROS = "\u0660\u06f0\u0966\u09e6\u0e50"
WIDE = re.compile(
    f"[\uff0b\uff10-\uff19\uff20{''.join(f'{zero}-{chr(ord(zero) + 9)}' for zero in _ZEROS)}]|@[^\\s@]{{1,64}}\uff0e"
    r"|[\uff08\uff3b]\s?(?:at|AT)\s?[\uff09\uff3d]|\uff08[0-9+]{1,5}\uff09\s?[0-9]"
)
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_NARROW |= {ord(zero) + digit: 0x30 + digit for zero in _ZEROS for digit in range(10)}

# --- e-mail -------------------------------------------------------------------------------------------------------

# Letters of alphabets whose words have spaces between them; of other scripts, a sentence could not be told from a name.
# With them go accents as characters of their own, and characters that are not seen: soft hyphens and joiners.
_LETTERS = (
    "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0386-\u0481\u048a-\u052f\u1e00-\u1fff"
    "\u0300-\u036f\u00ad\u200b-\u200d\u2060"
)
_IRISH = rf"(?<=\b[oO])['\u2019](?=[{_LETTERS}])"  # of other apostrophes, a name's could not be told from a quotation's
_LOCAL = re.compile(rf"[{_LETTERS}0-9_](?:(?:[{_LETTERS}0-9._%+\-]|{_IRISH}){{0,62}}[{_LETTERS}0-9_+\-])?\Z")
_LABEL = rf"[{_LETTERS}0-9](?:[{_LETTERS}0-9\-]{{0,61}}[{_LETTERS}0-9])?"
_TOP = rf"(xn--[A-Za-z0-9\-]{{2,59}}|[{_LETTERS}]{{2,24}})(?![{_LETTERS}0-9_\-(\[=])"
_DOMAIN = re.compile(rf"(?![0-9]+\.[0-9]+\.)(?:{_LABEL}\.)+{_TOP}")  # name@1.3.0.tgz is a version
# Ways to spell a dot. Within a name, those that prose does not have; elsewhere also " dot ".
_CLEAR_DOT = r"(?:\s?[(\[{<]\s?(?:[dD]ot|DOT|\.)\s?[)\]}>]\s?|\s(?:DOT|-dot-|_dot_)\s)"
_DOT_WORD = rf"(?:{_CLEAR_DOT}|\sdot\s)"
_SPELLED_DOMAIN = re.compile(rf"\s{{0,2}}(?:{_LABEL}(?:\.|{_DOT_WORD}))+{_TOP}")
_DOTS_SPELLED, _CLEARLY_SPELLED = (
    re.compile(rf"(?:{_LABEL}\.)*{_LABEL}{dot}(?:{_LABEL}(?:\.|{dot}))*{_TOP}") for dot in (_DOT_WORD, _CLEAR_DOT)
)
# What stands before the last dot of a local part, if that dot is spelled out.
_BEFORE_CLEAR_DOT = re.compile(rf"[{_LETTERS}0-9_][{_LETTERS}0-9._%+\-]{{0,62}}{_CLEAR_DOT}\Z")
_BEFORE_DOT_WORD = re.compile(rf"[{_LETTERS}0-9_][{_LETTERS}0-9._%+\-]{{0,62}}{_DOT_WORD}\Z")
# The sign itself, as URLs and HTML escape it, and what people write in its place to hide an address from programs.
_AT_SIGNS = ("@", "%40", "%2540", "&#64;", "&#064;", "&#x40;", "&commat;", "\\u0040")
_AT_SPELLINGS = ("at", " at ", "AT", " AT ", "At", "@")
_AT_WORDS = (
    *(f"{left}{at}{right}" for left, right in ("()", "[]", "{}", "<>") for at in _AT_SPELLINGS),
    *(" _at_ ", " -at- "),
)
_BARE_AT = " AT "
# The domains that may follow each of these; after a sign one without a spelled dot is a plain domain.
_SPELLED_DOMAINS = {
    **dict.fromkeys(_AT_SIGNS, _DOTS_SPELLED),
    **dict.fromkeys(_AT_WORDS, _SPELLED_DOMAIN),
    _BARE_AT: _CLEARLY_SPELLED,
}
# Matches the beginning of an address, a number, a token or a key at the end of a text.
_CUT_OFF = re.compile(
    rf"(?:[!-~{_LETTERS}]*[@\uff20][!-~\uff01-\uff5e{_LETTERS}]*|[+(\uff0b\uff08]?\d[\d .()\-:\uff0d\uff08\uff09]{{4,}}"
    r"|[A-Za-z0-9_\-+/=.]{8,}|-----BEGIN [^\0]*)\Z"
)
_RESERVED_DOMAINS = re.compile(r"(?i)(?:^|\.)(?:example(?:\.(?:com|org|net|edu))?|test|invalid|local|localhost)\Z")
_FILE_TYPES = {"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "html", "json", "xml", "txt", "pdf", "zip"}
_COMMON_DOMAINS = {"com", "org", "net", "edu", "gov", "mil", "int", "info", "biz", "name", "pro", "io"}
_LONGEST_LOCAL = 64  # RFC 5321


def _emails(text: str, candidates: CandidateSpans, private_ips: bool) -> Iterator[tuple[int, int]]:
    for sign in _SPELLED_DOMAINS:
        at = text.find(sign)
        while at >= 0:
            if found := _address(text, at, sign):
                yield found
            at = text.find(sign, at + 1)


def _address(text: str, at: int, sign: str) -> tuple[int, int] | None:
    """Returns (start, end) of the address whose "@", or `sign` in its place, is at a position; None if it is none."""
    after = at + len(sign)
    domain = _DOMAIN.match(text, after) if sign in _AT_SIGNS else None
    spelled = domain is None
    if spelled:
        domain = _SPELLED_DOMAINS[sign].match(text, after)
    if not domain or (sign == _BARE_AT and not domain[1].islower()):  # "LOOK AT ME DOT COM"
        return None
    # The local part is searched for before the "@", since a search for whole addresses would try every word.
    end = at - 1 if sign in _AT_WORDS and at and text[at - 1] in " \u00a0\u3000" else at
    local = _LOCAL.search(text[max(0, end - _LONGEST_LOCAL) : end])
    if not local or not _is_address(local[0], domain, spelled):
        return None
    start = end - len(local[0])
    if spelled:
        before = _BEFORE_DOT_WORD if re.search(r"\sdot\s", domain[0]) else _BEFORE_CLEAR_DOT
        while earlier := before.search(text[max(0, start - _LONGEST_LOCAL) : start]):
            start -= len(earlier[0])
    return start, domain.end()


def _is_address(local: str, domain: re.Match[str], spelled: bool) -> bool:
    """Whether a local part and a domain are an e-mail address that counts; `spelled` is for those without an "@"."""
    top = domain[1].lower()
    # `w@x.mean` is a matrix product: with an unusual domain, the local part needs at least 3 characters.
    usual = len(top) == 2 or top in _COMMON_DOMAINS or (len(local) >= 3 and not spelled)
    name = re.sub(_DOT_WORD, ".", domain[0].strip())
    return usual and top not in _FILE_TYPES and local != "git" and not _RESERVED_DOMAINS.search(name)


# --- numbers ------------------------------------------------------------------------------------------------------

_LONGEST_GAP = 3  # characters between two digits of a telephone number, such as ") "
_MIN_DIGITS = 7
_LOOK_AROUND = 4  # characters before and after digits that patterns may match, such as "(", "+", "//"


def _candidate_spans(text: str) -> CandidateSpans:
    """Finds the parts of a text that may hold personal data."""
    codes = codes_of(text)
    dotted, numbers, runs = (list(zip(*map(np.ndarray.tolist, spans), strict=True)) for spans in _scan(codes))
    return CandidateSpans(dotted, numbers, runs)


@numba.njit(cache=True, nogil=True)
def _scan(codes: np.ndarray) -> tuple[_Spans, _Spans, _Spans]:
    """Returns (starts, ends) of the three kinds of `CandidateSpans`, from one pass over all characters."""
    size = len(codes)
    most = size // 2 + 2  # at most one per dot, where a dot and the next but one are at least 4 apart
    starts, ends = np.empty((3, most), np.int64), np.empty((3, most), np.int64)
    counts = np.zeros(3, np.int64)
    dot, dot_before = -100, -100
    first_digit, last_digit, digits = 0, -100, 0
    run = 0
    for position in range(size + 1):
        code = codes[position] if position < size else np.uint32(0)
        if 48 <= code <= 57:
            if position - last_digit > _LONGEST_GAP + 1:
                if digits >= _MIN_DIGITS:
                    starts[1, counts[1]], ends[1, counts[1]] = first_digit, last_digit + 1
                    counts[1] += 1
                first_digit, digits = position, 0
            last_digit = position
            digits += 1
        elif code == 46:
            if 4 <= position - dot_before <= 8:
                starts[0, counts[0]], ends[0, counts[0]] = dot_before - 3, position + 4
                counts[0] += 1
            dot_before, dot = dot, position
        if not (48 <= code <= 57 or 65 <= code <= 90 or 97 <= code <= 122 or code == 95 or code == 45):
            if position - run >= LONG_RUN:
                starts[2, counts[2]], ends[2, counts[2]] = run, position
                counts[2] += 1
            run = position + 1
    if digits >= _MIN_DIGITS:
        starts[1, counts[1]], ends[1, counts[1]] = first_digit, last_digit + 1
        counts[1] += 1
    for kind in range(2):
        for span in range(counts[kind]):
            starts[kind, span] = max(starts[kind, span] - _LOOK_AROUND, 0)
            ends[kind, span] = min(ends[kind, span] + _LOOK_AROUND, size)
    return (
        (starts[0, : counts[0]].copy(), ends[0, : counts[0]].copy()),
        (starts[1, : counts[1]].copy(), ends[1, : counts[1]].copy()),
        (starts[2, : counts[2]].copy(), ends[2, : counts[2]].copy()),
    )


def _matches(pattern: re.Pattern[str], text: str, start: int, end: int) -> Iterator[re.Match[str]]:
    """Yields the matches that begin in a part of the text; they may go beyond its end."""
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
_VERSION_PART = 32  # four numbers below it count as a version, which is wrong for one address in 4,096
_IPV6_MIDDLE = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IPV6_SIGNS = frozenset("0123456789abcdefABCDEF:.")
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")


def _ips(text: str, candidates: CandidateSpans, private_ips: bool) -> Iterator[tuple[int, int]]:
    for start, end in candidates.dotted:
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
        while text[end - 1] == "." or text[end - 1] == ":" != text[end - 2]:  # punctuation after the address
            end -= 1
        bounded = not (_is_word(text[start - 1 : start]) or _is_word(text[end : end + 1]) or text[end : end + 1] == "/")
        if bounded and _is_ipv6(text[start:end], private_ips):
            yield start, end


def _is_ipv4(digits: str, private_ips: bool) -> bool:
    """Whether four numbers with dots are an IP address that counts, and not a version."""
    parts = digits.split(".")
    if any(len(part) > 1 and part[0] == "0" for part in parts) or max(map(int, parts)) > 255:
        return False
    address = ipaddress.IPv4Address(digits)
    if not address.is_global or address.is_multicast:
        return private_ips and int(parts[0]) >= 10 and not address.is_unspecified
    return max(map(int, parts)) >= _VERSION_PART


def _is_ipv6(string: str, private_ips: bool) -> bool:
    """Whether a string is an IPv6 address in 2000::/3 with at least three groups.

    Slices in code (`a[1::2]`) and times can be read as addresses too, but do not begin as these do.
    """
    try:
        address = ipaddress.IPv6Address(string)
    except ValueError:
        return False
    if len([group for group in string.split(":") if group]) < 3:
        return False
    return address in _GLOBAL_IPV6 and (private_ips or address.is_global)


def _is_word(character: str) -> bool:
    return character.isascii() and (character.isalnum() or character == "_")


_CARD = re.compile(
    r"(?<![A-Za-z0-9_.+\-/,])(?:[0-9]{4}([ \-])[0-9]{4}\1[0-9]{4}\1[0-9]{4}|3[47][0-9]{2}([ \-])[0-9]{6}\2[0-9]{5}"
    r"|[0-9]{14,19})(?![A-Za-z0-9_]|[ .\-/,][0-9])"
)
# Prefixes and lengths of the issuers' numbers.
_ISSUERS = re.compile(
    r"4[0-9]{15}|(?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}|3[47][0-9]{13}"
    r"|(?:6011|65[0-9]{2}|64[4-9][0-9])[0-9]{12}|35(?:2[89]|[3-8][0-9])[0-9]{12}|62[0-9]{14,17}|3(?:0[0-5]|[68][0-9])[0-9]{11}"
)


def luhn(digits: str) -> bool:
    """Whether the check digit of a card number is right (Luhn, ISO/IEC 7812-1)."""
    doubled = [int(digit) * (1 + position % 2) for position, digit in enumerate(reversed(digits))]
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def _cards(text: str, candidates: CandidateSpans, private_ips: bool) -> Iterator[tuple[int, int]]:
    for start, end in candidates.numbers:
        for match in _matches(_CARD, text, start, end):
            digits = "".join(filter(str.isdigit, match[0]))
            if _ISSUERS.fullmatch(digits) and luhn(digits):
                yield match.span()


_Finder = Callable[[str, CandidateSpans, bool], Iterator[tuple[int, int]]]
_FINDERS: dict[Kind, _Finder] = {
    "key": lambda text, candidates, private_ips: credentials.keys(text, candidates.runs),
    "email": _emails,
    "card": _cards,
    "ip": _ips,
    "phone": lambda text, candidates, private_ips: phones(text, candidates.numbers),
    "secret": lambda text, candidates, private_ips: credentials.secrets(text),
}
