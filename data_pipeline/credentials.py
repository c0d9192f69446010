"""Keys, tokens and secrets in a text.

A key is what its form gives away: a token with a well-known prefix, a JSON web token, a PEM private key with its
content (code that only names the marks has none). A secret is a quoted random value that is given to a name like
`password`: guessing, so it is on only when asked for. Keys without a form of their own are left out, and so are
passwords in running text.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

# Prefix, and what follows it; formats as their issuers document them.
_TOKENS: dict[str, str] = {
    "AKIA": r"(?![A-Z2-7]*EXAMPLE)[A-Z2-7]{16}",  # AWS access key; theirs for manuals end in EXAMPLE
    "ASIA": r"(?![A-Z2-7]*EXAMPLE)[A-Z2-7]{16}",
    **{f"gh{letter}_": "[A-Za-z0-9]{36,255}" for letter in "pousr"},  # GitHub
    "github_pat_": r"[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
    "glpat-": r"[A-Za-z0-9_\-]{20,}",  # GitLab
    "xox": r"[abeoprs]-[A-Za-z0-9\-]{10,250}",  # Slack
    "hooks.slack.com/services/": r"T[A-Z0-9]{7,}/B[A-Z0-9]{7,}/[A-Za-z0-9]{20,}",
    "AIza": r"[A-Za-z0-9_\-]{35}",  # Google
    "sk_live_": r"[A-Za-z0-9]{20,}",  # Stripe
    "rk_live_": r"[A-Za-z0-9]{20,}",
    "sk-": r"[A-Za-z0-9_\-]{20,}T3BlbkFJ[A-Za-z0-9_\-]{20,}",  # OpenAI
    "sk-ant-": r"[A-Za-z0-9]{3,8}-[A-Za-z0-9_\-]{60,}",  # Anthropic
    "hf_": r"[A-Za-z]{34}",  # Hugging Face
    "npm_": r"[A-Za-z0-9]{36}",
    "pypi-AgE": r"[A-Za-z0-9_\-]{50,}",
    "SG.": r"[A-Za-z0-9_\-]{22}\.[A-Za-z0-9_\-]{43}",  # SendGrid
    "eyJ": r"[A-Za-z0-9_\-]{10,}\.eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]{10,}",  # JSON web token, RFC 7519
}
_WORD = re.compile(r"[A-Za-z0-9_]")
_TOKEN_PATTERNS = {
    prefix: re.compile(rf"{re.escape(prefix)}{rest}(?![A-Za-z0-9_])") for prefix, rest in _TOKENS.items()
}
_PEM_BEGIN = re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----")
_PEM_END = re.compile(r"-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----")
_PEM_BODY = re.compile(r"[A-Za-z0-9+/=\s\\:,\-\"']*")  # without an end: as far as it looks like one
_PEM_CONTENT = re.compile(r"[A-Za-z0-9+/]{40,}")  # code that only names the marks has none
_PEM_MAX = 1 << 14


def keys(text: str) -> Iterator[tuple[int, int]]:
    """Where keys are, (start, end) in characters."""
    for prefix, pattern in _TOKEN_PATTERNS.items():
        start = text.find(prefix)
        while start >= 0:
            if not _WORD.match(text[start - 1 : start]) and (match := pattern.match(text, start)):
                yield match.span()
            start = text.find(prefix, start + len(prefix))
    if "PRIVATE KEY" in text:
        for begin in _PEM_BEGIN.finditer(text):
            end = _PEM_END.search(text, begin.end(), begin.end() + _PEM_MAX)
            body = text[begin.end() : end.start()] if end else ""
            if not end and (rest := _PEM_BODY.match(text, begin.end(), begin.end() + _PEM_MAX)):
                body = rest[0].rstrip()
            if _PEM_CONTENT.search(body):
                yield begin.start(), end.end() if end else begin.end() + len(body)


_QUOTED = re.compile(r"[\"']([A-Za-z0-9_+/=.!@#$%^&*\-]{16,128})[\"']")
_NAMED = re.compile(
    r"(?i)(?:secret|token|passw(?:or)?d|passphrase|api_?key|access_?key|auth_?key)[\"']?\s{0,4}(?::=|=>|[:=])\s{0,4}\Z"
)
_LONGEST_NAME = 32
_SECRET_BITS = 3.5  # a character; English words have about 3, random base64 of 20 characters about 4


def secrets(text: str) -> Iterator[tuple[int, int]]:
    """Where values are that look like secrets, (start, end) in characters, without their quotes."""
    for match in _QUOTED.finditer(text):
        value = match[1]
        if not _NAMED.search(text[max(0, match.start() - _LONGEST_NAME) : match.start()]):
            continue
        counts = Counter(value).values()
        bits = -sum(count / len(value) * math.log2(count / len(value)) for count in counts)
        if bits >= _SECRET_BITS and any(map(str.isdigit, value)) and any(map(str.isalpha, value)):
            yield match.span(1)
