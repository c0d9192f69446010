"""Tests decoding of pages in all encodings of the web, with every kind of declaration, right and wrong ones."""

from pathlib import Path

import pytest

from data_pipeline.extraction.extractors import main_text
from data_pipeline.reading.charsets import charset_of, decode, decode_whole
from data_pipeline.reading.input_records import Record
from data_pipeline.reading.page_decoding import declared_charset, decode_page
from tests.unit.data_pipeline.reading.encodings import (
    ENCODED,
    FRENCH,
    HEAD,
    HTTP_EQUIV,
    JAPANESE,
    KOREAN,
    META,
    POLISH,
    RUSSIAN,
    SIMPLIFIED,
    TRADITIONAL,
    UKRAINIAN,
    XML,
    encoded,
)
from tests.unit.data_pipeline.reading.raw_files import read, reasons, warc


def page(text: str, head: str = "", before: str = "") -> str:
    return before + HEAD.format(head) + f"<p>{text} And the end of it.</p></main></body></html>"


def pages(codec: str, text: str, label: str) -> dict[str, bytes]:
    """Makes three encoded pages of one text that declare their encoding in different ways."""
    return {
        "charset": encoded(page(text, META.format(label)), codec),
        "http-equiv": encoded(page(text, HTTP_EQUIV.format(label)), codec),
        "xml": encoded(page(text, before=XML.format(label)), codec),
    }


def text_of(record: Record) -> str:
    assert record.reason == "" and record.html
    return record.text


def test_pages_are_read_in_the_encoding_that_they_declare(tmp_path: Path) -> None:
    members, expected = [], []
    for label, codec, text in ENCODED:
        for content in pages(codec, text, label).values():
            members += warc([content], kind="text/html")
            expected.append((label, text))
    records = read(tmp_path / "a.warc.gz", b"".join(members), "warc")
    wrong = [want for want, record in zip(expected, records, strict=True) if want[1] not in text_of(record)]
    assert not wrong
    assert not [record.id for record in records if "\ufffd" in record.text or record.text.startswith("\ufeff")]


def test_pages_are_read_in_the_encoding_of_their_http_header(tmp_path: Path) -> None:
    kinds = ("text/html; charset={}", 'text/html;charset="{}"', "Text/HTML ; Charset='{}' ; x=y")
    members = [
        warc([encoded(page(text), codec)], kind=kinds[number % 3].format(label))[0]
        for number, (label, codec, text) in enumerate(ENCODED)
    ]
    records = read(tmp_path / "a.warc.gz", b"".join(members), "warc")
    for (label, _, text), record in zip(ENCODED, records, strict=True):
        assert text in text_of(record), label
        assert record.charset_from == "HTTP header", label


@pytest.mark.parametrize("way", ["charset", "http-equiv", "xml"])
def test_pages_in_files_are_read_in_the_encoding_that_they_declare(tmp_path: Path, way: str) -> None:
    for label, codec, text in ENCODED:
        (record,) = read(tmp_path / "a.html", pages(codec, text, label)[way], "html")
        assert text in text_of(record), label


def test_extraction_does_not_decode_a_page_again(tmp_path: Path) -> None:
    for label, codec, text in (ENCODED[0], ENCODED[25], ENCODED[46], ENCODED[35]):
        for content in pages(codec, text, label).values():
            (record,) = read(tmp_path / "a.html", content, "html")
            for extractor in ("resiliparse", "trafilatura"):
                assert text.split()[0] in main_text(record.text, extractor)[0], (label, extractor)


def test_utf_16_and_utf_32_with_and_without_a_mark(tmp_path: Path) -> None:
    for codec in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        for head in ("", META.format("utf-16"), META.format("utf-8"), META.format("euc-kr")):
            for kind in ("text/html", "text/html; charset=utf-16", "text/html; charset=iso-8859-1"):
                content = page(RUSSIAN, head).encode(codec)
                (record,) = read(tmp_path / "a.warc.gz", warc([content], kind=kind)[0], "warc")
                assert RUSSIAN in text_of(record) and record.text.startswith("<!"), (codec, head, kind)
    for codec in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):  # little markup and no mark
        assert decode_page(f"<p>{RUSSIAN * 9}".encode(codec)).text == f"<p>{RUSSIAN * 9}"
    for content in (page(RUSSIAN, META.format("utf-16")), page(RUSSIAN, before=XML.format("utf-16le"))):
        assert decode_page(content.encode()).text == content  # a declaration that can be read as ASCII is not in UTF-16
        assert decode_page(content.encode(), "text/html; charset=utf-16").text == content


def test_the_order_of_those_that_name_an_encoding() -> None:
    cyrillic = page(RUSSIAN, META.format("koi8-r"))
    for content, kind, known_by in (
        (b"\xef\xbb\xbf" + cyrillic.encode(), "text/html; charset=windows-1251", "byte order mark"),
        (cyrillic.encode("cp1251"), "text/html; charset=windows-1251", "HTTP header"),
        (cyrillic.encode("koi8-r"), "text/html", "the page's declaration"),
        (cyrillic.encode("koi8-r"), "text/html; charset=no-such", "the page's declaration"),
        (cyrillic.encode("koi8-r"), "text/html; charset=", "the page's declaration"),
        (page(RUSSIAN).encode(), "", "being valid UTF-8"),
        (page(RUSSIAN).encode("utf-16-le"), "text/html; charset=utf-8", "the NULs of UTF-16 or UTF-32"),
        (page(RUSSIAN, META.format("koi-none")).encode("cp1251"), "", "a guess"),
    ):
        found = decode_page(content, kind)
        assert (RUSSIAN in found.text, found.known_by, found.lost) == (True, known_by, 0), (kind, found)


@pytest.mark.parametrize(
    ("head", "charset"),
    [
        ("<meta charset=euc-kr>", "cp949"),
        ("<META\nCHARSET = 'EUC-KR' />", "cp949"),
        ("<meta name=x content=y charset=' euc-kr '>", "cp949"),
        ("<meta/charset=euc-kr>", "cp949"),
        ("<meta http-equiv='content-type' content='text/html;charset = \"euc-kr\"'>", "cp949"),
        ("<meta content='text/html; charset=euc-kr'>", ""),  # has no meaning without http-equiv
        ("<meta http-equiv=refresh content='5; charset=euc-kr'>", ""),
        ("<!-- <meta charset=euc-kr> --><meta charset=koi8-r>", "koi8-r"),
        ("<!-- <meta charset=euc-kr>", ""),
        ("<script>'<meta charset=euc-kr>'</script><meta charset=koi8-r>", "koi8-r"),
        ("<p title='<meta charset=euc-kr>'><meta charset=koi8-r>", "koi8-r"),
        ("<meta charset=no-such><meta charset=euc-kr>", "cp949"),
        ("<metadata charset=euc-kr>", ""),
        (f"<!--{'x' * 5000}--><meta charset=euc-kr>", "cp949"),
        ("<meta charset=x-user-defined>", "cp1252"),
        ("<meta charset=utf-16be>", "utf-8"),
        ("<?xml version='1.0' encoding='euc-kr'?><p>", "cp949"),
        ("<?xml version='1.0' encoding='euc-kr'?><meta charset=koi8-r>", "koi8-r"),
        ("<p><?xml encoding='euc-kr'?>", ""),
        ("<a <b = = '> <<< <meta charset", ""),
    ],
)
def test_declarations(head: str, charset: str) -> None:
    assert declared_charset(head.encode()) == charset


@pytest.mark.parametrize(
    ("label", "content", "text"),
    [
        ("big5", "a145a1e3a1f2a247", "‧～⊕￡"),
        ("gbk", "a6d9a8bcfe51fe59fea0", "︐ḿ𠂇龴龻"),
        ("euc-jp", "a1c1a1dd", "～－"),
        ("koi8-u", "aebe", "ўЎ"),
        ("windows-1255", "eec5e5ca", "מֵוֺ"),
    ],
)
def test_characters_for_which_python_has_others_than_browsers(label: str, content: str, text: str) -> None:
    assert decode(bytes.fromhex(content), charset_of(label)) == text
    assert decode_whole(bytes.fromhex(content), charset_of(label)) == text


def test_names_that_are_no_character_encoding() -> None:
    for label in (
        "rot13",
        "base64",
        "idna",
        "punycode",
        "unicode_escape",
        "undefined",
        "os",
        "",
        "é",
        "utf-8\0",
        "../x",
    ):
        assert charset_of(label) == "", label
    assert (charset_of(" Latin1 "), charset_of("gb2312"), charset_of("windows-31j")) == ("cp1252", "gb18030", "cp932")
    assert (charset_of("x-windows-949"), charset_of("x-cp1251"), charset_of("x-x-none")) == ("cp949", "cp1251", "")


@pytest.mark.parametrize(
    ("text", "codec", "named"),
    [
        # UTF-8 that is declared as another encoding.
        (FRENCH, "utf-8", "iso-8859-1"),
        ("It’s", "utf-8", "windows-1252"),
        (RUSSIAN, "utf-8", "windows-1251"),
        (SIMPLIFIED * 2, "utf-8", "gb2312"),
        ("It’s", "utf-8", "gbk"),
        (KOREAN, "utf-8", "euc-kr"),
        (JAPANESE, "utf-8", "shift_jis"),
        # Other encodings that are declared as UTF-8.
        (FRENCH, "cp1252", "utf-8"),
        (RUSSIAN * 3, "cp1251", "utf-8"),
        (KOREAN * 3, "cp949", "utf-8"),
        (JAPANESE * 3, "cp932", "utf-8"),
        (SIMPLIFIED * 3, "gb18030", "utf-8"),
    ],
    ids=lambda value: value if value.isascii() else "",
)
def test_a_page_that_is_wrong_about_itself(text: str, codec: str, named: str) -> None:
    for content, kind in ((page(text, META.format(named)), ""), (page(text), f"text/html; charset={named}")):
        found = decode_page(content.encode(codec), kind)
        assert text in found.text and not found.lost


def test_what_the_header_gets_wrong_the_page_puts_right() -> None:
    assert KOREAN in decode_page(page(KOREAN, META.format("euc-kr")).encode("cp949"), "text/html; charset=utf-8").text


@pytest.mark.parametrize("named", ["utf-8", "shift_jis", "windows-1252"])
def test_escape_sequences_of_iso_2022_say_more_than_a_wrong_name(named: str) -> None:
    content = page(JAPANESE, META.format("iso-2022-jp")).encode("iso2022_jp")
    assert JAPANESE in decode_page(content, f"text/html; charset={named}").text
    escaped = page("\x1b$B " + RUSSIAN, META.format("utf-8")).encode()  # in the middle of other text they say nothing
    assert RUSSIAN in decode_page(escaped, f"text/html; charset={named}").text


@pytest.mark.parametrize(
    "codec", ["cp949", "cp932", "euc_jp", "iso2022_jp", "gb18030", "big5", "cp1251", "koi8_r", "koi8_u", "cp852", "hz"]
)
def test_pages_that_say_nothing_are_guessed(codec: str) -> None:
    texts = {"cp949": KOREAN, "gb18030": SIMPLIFIED, "hz": SIMPLIFIED, "big5": TRADITIONAL, "cp852": POLISH}
    texts |= {"koi8_u": UKRAINIAN, "koi8_r": RUSSIAN}
    text = texts.get(codec, RUSSIAN if codec == "cp1251" else JAPANESE)
    found = decode_page(page(text).encode(codec))
    assert text in found.text and found.known_by == "a guess"


def test_short_korean_that_happens_to_be_utf_8_is_korean() -> None:
    assert "킬" in decode_page(b"<meta charset=euc-kr><p>" + b"\xc5\xb3").text
    assert b"\xc5\xb3".decode() == "ų"


@pytest.mark.parametrize("codec", ["utf-8", "euc_kr", "cp932", "gb18030", "big5", "euc_jp"])
def test_a_cut_or_damaged_page_loses_a_character_and_no_more(codec: str) -> None:
    text = {"euc_kr": KOREAN, "big5": TRADITIONAL, "gb18030": SIMPLIFIED}.get(codec, JAPANESE)
    content = page(text * 3, META.format(codec)).encode(codec)
    position = content.index(b"<p>") + 3
    cut = content[: content.index(b" And")][:-1]
    damaged = content[:position] + b"\xff" + content[position:]
    for found in (decode_page(cut), decode_page(damaged)):
        assert text * 2 in found.text
        assert found.known_by == "the page's declaration"
        assert 0 < found.lost < 0.02


def test_a_page_of_which_too_much_is_lost_is_set_aside(tmp_path: Path) -> None:
    damaged = bytearray(page(KOREAN * 5, META.format("utf-8")).encode())
    start = damaged.index("나".encode())
    damaged[start : start + 300 : 7] = b"\xff" * len(damaged[start : start + 300 : 7])
    noise = bytes(range(256)) * 20
    members = warc([bytes(damaged), b"<html>" + noise, page(KOREAN).encode()], kind="text/html; charset=utf-8")
    members += warc([b"<html>" + noise], kind="text/html; charset=iso-8859-1")
    records = read(tmp_path / "a.warc.gz", b"".join(members), "warc")
    assert reasons(records) == ["undecodable", "undecodable", "", "undecodable"]
    assert not records[0].html and "Call" not in records[0].text
    assert reasons(read(tmp_path / "a.html", bytes(damaged), "html", max_undecoded_share=0.5)) == [""]


def test_what_others_could_not_decode_stays_as_it_is() -> None:
    content = page("don\ufffdt, can\ufffdt")
    for kind in ("", "text/html; charset=utf-8", "text/html; charset=iso-8859-1"):
        assert decode_page(content.encode(), kind).text == content


def test_text_that_speaks_of_pages_declares_nothing(tmp_path: Path) -> None:
    """Reads a conversion record, which is plain text: a <meta> tag that it quotes does not declare its encoding."""
    content = f"{RUSSIAN} <meta charset=euc-kr>".encode("cp1251")
    assert decode_page(content, "text/plain; charset=windows-1251", markup=False).text.startswith(RUSSIAN)
    assert decode_page(RUSSIAN.encode() + b"<meta charset=koi8-r>", markup=False).text.startswith(RUSSIAN)
