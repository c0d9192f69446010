"""Names of character encodings as the web uses them, and decoders for these encodings.

Labels and their meanings are those of the WHATWG Encoding Standard (encoding.spec.whatwg.org, section 4.2): euc-kr
means windows-949, iso-8859-1 means windows-1252, gb2312 means gb18030. Three things differ from the standard. Labels
that browsers refuse for security reasons (hz-gb-2312, iso-2022-kr, utf-7) are decoded, since no script is run here;
further names that Python knows (uhc, cp850, utf-32) are accepted; and windows-1258, which writes tone marks as separate
characters, is composed (NFC). Hebrew in visual order is not reordered, and x-user-defined means windows-1252, as the
HTML standard has it for a page's own declaration.
"""

import codecs
import functools
import re
import unicodedata

MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins with the mark of UTF-16, so it has to be tried first
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
WIDE = ("utf-16", "utf-32")
STATEFUL = ("iso2022", "hz", "utf-7")  # the meaning of a byte depends on the escape sequences before it
# One line per codec: Python's name of the codec, then the labels that stand for it.
_LABELS = """
utf-8: unicode-1-1-utf-8 unicode11utf8 unicode20utf8 utf-8 utf8 x-unicode20utf8
cp866: 866 cp866 csibm866 ibm866
iso8859-2: csisolatin2 iso-8859-2 iso-ir-101 iso8859-2 iso88592 iso_8859-2 iso_8859-2:1987 l2 latin2
iso8859-3: csisolatin3 iso-8859-3 iso-ir-109 iso8859-3 iso88593 iso_8859-3 iso_8859-3:1988 l3 latin3
iso8859-4: csisolatin4 iso-8859-4 iso-ir-110 iso8859-4 iso88594 iso_8859-4 iso_8859-4:1988 l4 latin4
iso8859-5: csisolatincyrillic cyrillic iso-8859-5 iso-ir-144 iso8859-5 iso88595 iso_8859-5 iso_8859-5:1988
iso8859-6: arabic asmo-708 csiso88596e csiso88596i csisolatinarabic ecma-114 iso-8859-6 iso-8859-6-e iso-8859-6-i
iso8859-6: iso-ir-127 iso8859-6 iso88596 iso_8859-6 iso_8859-6:1987
iso8859-7: csisolatingreek ecma-118 elot_928 greek greek8 iso-8859-7 iso-ir-126 iso8859-7 iso88597 iso_8859-7
iso8859-7: iso_8859-7:1987 sun_eu_greek
iso8859-8: csiso88598e csisolatinhebrew hebrew iso-8859-8 iso-8859-8-e iso-ir-138 iso8859-8 iso88598 iso_8859-8
iso8859-8: iso_8859-8:1988 visual csiso88598i iso-8859-8-i logical
iso8859-10: csisolatin6 iso-8859-10 iso-ir-157 iso8859-10 iso885910 l6 latin6
iso8859-13: iso-8859-13 iso8859-13 iso885913
iso8859-14: iso-8859-14 iso8859-14 iso885914
iso8859-15: csisolatin9 iso-8859-15 iso8859-15 iso885915 iso_8859-15 l9
iso8859-16: iso-8859-16
koi8-r: cskoi8r koi koi8 koi8-r koi8_r
koi8-u: koi8-ru koi8-u
mac-roman: csmacintosh mac macintosh x-mac-roman
cp874: dos-874 iso-8859-11 iso8859-11 iso885911 tis-620 windows-874
cp1250: cp1250 windows-1250 x-cp1250
cp1251: cp1251 windows-1251 x-cp1251
cp1252: ansi_x3.4-1968 ascii cp1252 cp819 csisolatin1 ibm819 iso-8859-1 iso-ir-100 iso8859-1 iso88591 iso_8859-1
cp1252: iso_8859-1:1987 l1 latin1 us-ascii windows-1252 x-cp1252 x-user-defined
cp1253: cp1253 windows-1253 x-cp1253
cp1254: cp1254 csisolatin5 iso-8859-9 iso-ir-148 iso8859-9 iso88599 iso_8859-9 iso_8859-9:1989 l5 latin5 windows-1254
cp1254: x-cp1254
cp1255: cp1255 windows-1255 x-cp1255
cp1256: cp1256 windows-1256 x-cp1256
cp1257: cp1257 windows-1257 x-cp1257
cp1258: cp1258 windows-1258 x-cp1258
mac-cyrillic: x-mac-cyrillic x-mac-ukrainian
gb18030: chinese csgb2312 csiso58gb231280 gb2312 gb_2312 gb_2312-80 gbk iso-ir-58 x-gbk gb18030
big5hkscs: big5 big5-hkscs cn-big5 csbig5 x-x-big5 cp950
euc_jp: cseucpkdfmtjapanese euc-jp x-euc-jp
iso2022_jp_ext: csiso2022jp iso-2022-jp iso2022_jp iso2022_jp_1
cp932: csshiftjis ms932 ms_kanji shift-jis shift_jis sjis windows-31j x-sjis
cp949: cseuckr csksc56011987 euc-kr iso-ir-149 korean ks_c_5601-1987 ks_c_5601-1989 ksc5601 ksc_5601 windows-949
utf-16-be: unicodefffe utf-16be
utf-16-le: csunicode iso-10646-ucs-2 ucs-2 unicode unicodefeff utf-16 utf-16le
hz: hz-gb-2312
iso2022_kr: csiso2022kr iso-2022-kr
"""
# Codecs of Python for which the standard has no label.
_FURTHER = frozenset(
    {
        *("cp437", "cp720", "cp737", "cp775", "cp850", "cp852", "cp855", "cp857", "cp858", "cp860", "cp861", "cp862"),
        *("cp863", "cp864", "cp865", "cp869", "cp1125", "johab", "koi8-t", "kz1048", "ptcp154", "utf-32", "utf-32-le"),
        *("utf-32-be", "mac-greek", "mac-iceland", "mac-latin2", "mac-turkish", "mac-croatian", "mac-romanian"),
        *("mac-arabic", "mac-farsi", "cp856", "cp1006", "hp-roman8", "shift_jis_2004", "shift_jisx0213"),
        *("euc_jis_2004", "euc_jisx0213", "iso2022_jp_2", "iso2022_jp_3", "iso2022_jp_2004", "utf-7"),
    }
)
# Names that Macintosh browsers wrote, for which Python has others.
_MACINTOSH = {"mac-ce": "mac-latin2", "mac-centraleurroman": "mac-latin2", "mac-icelandic": "mac-iceland"}
# A code page's number after a vendor's name, as in win-1251, windows1251 and ibm-866.
_CODE_PAGE = re.compile(r"(?:windows|win|cp|ms|ibm|dos)[-_]?0*(\d{3,5})")
_LABEL = re.compile(r"[a-z0-9][a-z0-9._:+-]{0,39}")
_LENIENT, _STRICT, _MARKING = "trivium.lenient", "trivium.strict", "trivium.marking"
_NULS: dict[tuple[bool, ...], str] = {
    (False, True, False, True): "utf-16-le",
    (True, False, True, False): "utf-16-be",
    (False, True, True, True): "utf-32-le",
    (True, True, True, False): "utf-32-be",
}
# Characters that Python's codecs give where the standard's tables have others.
_JAPANESE = str.maketrans("〜‖−¢£¬", "～∥－￠￡￢")
_CORRECTED = {
    "koi8-u": str.maketrans("╝╬", "ўЎ"),
    "gb18030": str.maketrans(  # the table of 2000, which Python has, gives private-use characters for these
        "".join(map(chr, (*range(0xE78D, 0xE797), 0xE7C7, 0xE816, 0xE817, 0xE818, 0xE81E, 0xE826, 0xE82B, 0xE82C)))
        + "".join(map(chr, (0xE831, 0xE832, 0xE83B, 0xE843, 0xE854, 0xE855, 0xE864))),
        "︐︒︑︓︔︕︖︗︘︙ḿ𠂇𠂉𠃌龴龵龶龷𡗗龸𢦏龹龺𤇾龻",
    ),
    "big5hkscs": str.maketrans("•､‾∼♁☉¥¢£", "‧﹑¯～⊕⊙￥￠￡"),
    **dict.fromkeys(("euc_jp", "iso2022_jp_ext"), _JAPANESE),
}
_WRONG = {charset: re.compile(f"[{''.join(map(chr, table))}]") for charset, table in _CORRECTED.items()}
# Private-use characters to which Python's cp932 decodes the four bytes that Shift_JIS leaves undefined.
_NO_SHIFT_JIS = re.compile("[\uf8f0-\uf8f3]")


def charset_of(label: str) -> str:
    """Returns Python's name of the codec that a label stands for, or "" for an unknown label."""
    label = label.strip("\t\n\f\r \"';,").lower()
    if found := _table().get(label):
        return found
    if not _LABEL.fullmatch(label):
        return ""
    try:
        name = codecs.lookup(label).name
    except LookupError:
        if label.startswith("x-"):  # as in Java's x-windows-949
            return charset_of(label[2:])
        if page := _CODE_PAGE.fullmatch(label):
            return charset_of(f"cp{page[1]}") if label != f"cp{page[1]}" else ""
        return _MACINTOSH.get(label, "")
    if name in _FURTHER or name in _table().values():
        return name
    return _table().get(name) or _table().get(name.replace("_", "-"), "")


def marked_charset(content: bytes) -> str:
    """Returns the codec that the byte order mark of `content` names, or "" if it has no mark."""
    return next((charset for mark, charset in MARKS.items() if content.startswith(mark)), "")


@functools.cache
def _table() -> dict[str, str]:
    """Returns {label: Python's codec}; the first call also registers the error handlers of this module."""
    codecs.register_error(_LENIENT, _handle_as_browsers)
    codecs.register_error(_STRICT, _handle_or_raise)
    codecs.register_error(_MARKING, _handle_or_mark)
    lines = (line.split(":", 1) for line in _LABELS.strip().splitlines())
    return {label: codec for codec, labels in lines for label in labels.split()}


def decode(content: bytes, charset: str) -> str:
    """Decodes `content` with a codec that `charset_of` returned, without byte order marks.

    Bytes that cannot be decoded become U+FFFD.
    """
    text = _decoded(content, charset, "replace" if charset.startswith("utf") else _LENIENT)
    return _NO_SHIFT_JIS.sub("\ufffd", text) if charset == "cp932" else text


def decode_whole(content: bytes, charset: str) -> str:
    """Decodes `content` like `decode`, but raises UnicodeDecodeError at the first byte that cannot be decoded."""
    text = _decoded(content, charset, _STRICT)
    if charset == "cp932" and (found := _NO_SHIFT_JIS.search(text)):
        position = len(text[: found.start()].encode(charset, "replace"))
        raise UnicodeDecodeError(charset, content, position, position + 1, "means nothing")
    return text


def incremental_decoder(charset: str) -> codecs.IncrementalDecoder:
    """Returns a decoder of text that comes in pieces; bytes that cannot be decoded become a lone surrogate."""
    _table()
    return codecs.getincrementaldecoder(charset)(_MARKING)


def wide_charset(start: bytes) -> str:
    """Returns the UTF-16 or UTF-32 codec of text that begins with two ASCII characters, as JSON and markup do.

    It shows in where the NULs are among the first four bytes (RFC 4627, section 3). Returns "" for other encodings.
    """
    return _NULS.get(tuple(byte == 0 for byte in start[:4]), "")


def _decoded(content: bytes, charset: str, errors: str) -> str:
    _table()
    text = content.decode(charset, errors)
    if charset == "cp1258":
        text = unicodedata.normalize("NFC", text)
    elif (wrong := _WRONG.get(charset)) and wrong.search(text):  # the search is several times as fast
        text = text.translate(_CORRECTED[charset])
    return text.lstrip("\ufeff")


def _handle_or_raise(error: UnicodeError) -> tuple[str, int]:
    """Handles a decoding error like `_handle_as_browsers`, but raises it if the result is U+FFFD or a C1 control."""
    text, position = _handle_as_browsers(error)
    if text == "\ufffd" or "\x80" <= text < "\xa0":
        raise error
    return text, position


def _handle_or_mark(error: UnicodeError) -> tuple[str, int]:
    """Handles a decoding error like `_handle_as_browsers`, but with a lone surrogate in place of U+FFFD."""
    text, position = _handle_as_browsers(error)
    return "\udcff" if text == "\ufffd" else text, position


def _handle_as_browsers(error: UnicodeError) -> tuple[str, int]:
    """Returns (text, position to go on at) for bytes that Python's codec cannot decode and the standard's table can.

    The text is U+FFFD if the standard's table lacks them too.
    """
    if not isinstance(error, UnicodeDecodeError):
        raise error
    pair = error.object[error.start : error.start + 2]
    if error.encoding == "charmap" and pair[0] < 0xA0:
        return chr(pair[0]), error.start + 1
    if error.encoding == "gb18030" and pair[0] == 0x80:
        return "€", error.start + 1
    if error.encoding == "charmap" and pair[0] == 0xCA:  # in windows-1255, also where a page calls it iso-8859-8
        return "\u05ba", error.start + 1
    if len(pair) == 2:
        if error.encoding == "big5hkscs":
            return _or_replaced(pair, "cp950", error)
        # NEC and IBM added rows to JIS X 0208 (circled and Roman numbers, units, names), which Python's cp932 has.
        high = error.encoding == "euc_jp" and min(pair) > 0xA0 and max(pair) < 0xFF
        if high or (error.encoding.startswith("iso2022_jp") and min(pair) > 0x20 and max(pair) < 0x7F):
            return _or_replaced(_shift_jis(pair[0] & 0x7F, pair[1] & 0x7F), "cp932", error)
    return "\ufffd", max(error.end, error.start + 1)


def _or_replaced(pair: bytes, charset: str, error: UnicodeDecodeError) -> tuple[str, int]:
    try:
        return pair.decode(charset), error.start + 2
    except UnicodeDecodeError:
        return "\ufffd", max(error.end, error.start + 1)


def _shift_jis(row: int, cell: int) -> bytes:
    """Converts the two bytes of a JIS X 0208 character, each from 0x21 to 0x7E, to its two bytes in Shift_JIS."""
    lead = (row - 0x21) // 2 + (0x81 if row < 0x5F else 0xC1)
    trail = cell + (0x1F if cell < 0x60 else 0x20) if row % 2 else cell + 0x7E
    return bytes((lead, trail))
