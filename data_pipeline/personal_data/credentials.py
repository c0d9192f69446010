"""Finds keys, tokens and secrets in a text.

A key is recognized by its form: a token with a well-known prefix, a JSON web token, or a PEM private key with its
content (code that only mentions the BEGIN and END lines has none). A secret is a quoted random value that is assigned
to a name like `password`; this is a guess, so the PII stage looks for secrets only if the config says so. Keys without
a form of their own and passwords in running text are not found.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

# Formats as their issuers document them. Each has a run of LONG_RUN letters, digits, "_" and "-" in it.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    r"A[KS]IA(?![A-Z2-7]*EXAMPLE)[A-Z2-7]{16}"  # AWS access key; those in AWS's manuals end in EXAMPLE
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"
    r"|glpat-[A-Za-z0-9_\-]{20,}"  # GitLab
    r"|xox[abeoprs]-[A-Za-z0-9\-]{15,250}"  # Slack
    r"|hooks\.slack\.com/services/T[A-Z0-9]{7,12}/B[A-Z0-9]{7,12}/[A-Za-z0-9]{20,}"
    r"|AIza[A-Za-z0-9_\-]{35}"  # Google
    r"|[rs]k_live_[A-Za-z0-9]{20,}"  # Stripe
    r"|sk-[A-Za-z0-9_\-]{20,}T3BlbkFJ[A-Za-z0-9_\-]{20,}"  # OpenAI
    r"|sk-ant-[A-Za-z0-9]{3,8}-[A-Za-z0-9_\-]{60,}"  # Anthropic
    r"|hf_[A-Za-z]{34}"  # Hugging Face
    r"|npm_[A-Za-z0-9]{36}|pypi-AgE[A-Za-z0-9_\-]{50,}"
    r"|SG\.[A-Za-z0-9_\-]{22}\.[A-Za-z0-9_\-]{43}"  # SendGrid
    r"|eyJ[A-Za-z0-9_\-]{10,}\.eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]{10,}"  # JSON web token, RFC 7519
    r")(?![A-Za-z0-9_])"
)
_BEGIN = re.compile(r"(?<![A-Za-z0-9_])(?=A[KS]IA|gh|glpat|xox|hooks|AIza|[rs]k[_\-]|hf_|npm_|pypi|SG\.|eyJ)")
LONG_RUN = 18
_BEFORE_RUN = 60  # a token begins at most so many characters before its longest run
_PEM_BEGIN = re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----")
_PEM_END = re.compile(r"-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----")
_PEM_BODY = re.compile(r"[A-Za-z0-9+/=\s\\:,\-\"']*")  # content of a key without END line: as far as it looks like one
_PEM_CONTENT = re.compile(r"[A-Za-z0-9+/]{40,}")  # code that only mentions the BEGIN and END lines has none
_PEM_MAX = 1 << 14


def keys(text: str, runs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of each key, in characters.

    `runs` are the parts of the text with at least LONG_RUN letters, digits, "_" and "-" in a row; every token has one.
    """
    done = 0
    for first, last in runs:
        for begin in _BEGIN.finditer(text, max(done, first - _BEFORE_RUN), last):
            token = _TOKEN.match(text, begin.start())
            if token and token.start() >= done:
                yield token.span()
                done = token.end()
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
_SECRET_BITS = 3.5  # least entropy per character; English words have about 3, random base64 of 20 characters about 4


def secrets(text: str) -> Iterator[tuple[int, int]]:
    """Yields (start, end), in characters and without quotes, of values that look like secrets."""
    for match in _QUOTED.finditer(text):
        value = match[1]
        if not _NAMED.search(text[max(0, match.start() - _LONGEST_NAME) : match.start()]):
            continue
        counts = Counter(value).values()
        bits = -sum(count / len(value) * math.log2(count / len(value)) for count in counts)
        if bits >= _SECRET_BITS and any(map(str.isdigit, value)) and any(map(str.isalpha, value)):
            yield match.span(1)
