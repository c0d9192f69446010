"""Finds telephone numbers in a text.

Precision comes before recall, since versions, dates, prices, section and serial numbers have digits and dots as well.
These forms are found:
- "+", "00" or "011" and a country's calling code (ITU-T E.164), 8 to 15 digits in all, the national part in groups;
- North American numbers: area code, exchange and four digits, valid by the numbering plan, with separators or
  parentheses;
- Chinese mobile and area-code numbers next to Chinese text or after a word like Tel;
- Russian numbers with two dashes, as in 8 (495) 555-01-53;
- any number directly after a word for telephone, in one of about twenty languages, and those of a list after it;
- numbers in groups that begin with 0 after a word like call, office or T.
An extension ("x3", "(ext. 12)", ";ext=12") belongs to its number. Other national forms are not found, nor are ten
digits in a row without such a word before them, nor forms in which another kind of number is likely ("212.555-0153" is
like a clause of a regulation, "212-5550153" like a part number).
"""

import re
from collections.abc import Iterator, Sequence

_CONTEXT = 24  # how many characters before a number are checked for words like Tel or order
_DASHES = "\\-\u2010\u2011\u2012\u2013\u2014\u2212"
_SPACES = " \u00a0\u2009\u202f"
_WORD = r"(?:x|ext\.?|extn\.?|extension|доб\.?|ramal|[转轉])"
_EXTENSION = (
    rf"(?i:[{_SPACES}]?,?[{_SPACES}]?{_WORD}[{_SPACES}.:]{{0,2}}#?[0-9]{{1,6}}|[{_SPACES}]?\({_WORD}[{_SPACES}.:]{{0,2}}"
    rf"#?[0-9]{{1,6}}\)|;ext=[0-9]{{1,6}}|[{_SPACES}]?#[{_SPACES}]?[0-9]{{1,5}})?"
)
_AFTER = rf"(?![A-Za-z0-9_]|[.,{_DASHES}][0-9])"

_CALLING_CODES = (
    "1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]"
    "|21[1-368]|2[2-6][0-9]|29[01789]|3[578][0-9]|42[013]|50[0-9]|59[0-9]|67[02-9]|68[0-35-9]|69[0-2]"
    "|800|808|85[02356]|870|88[0-36-8]|96[0-8]|97[0-79]|99[2-68]"
)
_GROUP = (
    rf"(?:[{_SPACES}.{_DASHES}]{{0,2}}\(?[0-9]{{1,4}}\)?|[{_SPACES}]?/[{_SPACES}]?[0-9]{{2,4}}"
    rf"|[{_SPACES}]?(?:\[0\]|\(0xx[0-9]{{2}}\)))"
)
_WIDE_DASH = rf"[{_SPACES}][{_DASHES}][{_SPACES}]"
# A "/" before a number is allowed only if another number ends there.
_BEHIND_ANOTHER = rf"(?:(?<=[0-9][{_SPACES}{_DASHES}][0-9]{{4}}/)|(?<!/))"
_INTERNATIONAL = re.compile(
    rf"{_BEHIND_ANOTHER}(?<![A-Za-z0-9_.+\-=)~])"
    rf"(?:[(\[]\+(?P<enclosed>{_CALLING_CODES})[)\]]|\+\((?P<inner>{_CALLING_CODES})\)"
    rf"|(?:\+|(?<![0-9)\]][{_SPACES}])\+[{_SPACES}](?=[0-9]{{1,3}}[{_SPACES}.{_DASHES}(/]))"
    rf"(?P<code>{_CALLING_CODES}))"
    rf"(?:{_WIDE_DASH}[0-9]{{2,4}}(?:{_WIDE_DASH}[0-9]{{3,8}}){{1,3}}|{_GROUP}{{2,8}})"
    rf"(?:/[0-9]{{1,4}})*{_EXTENSION}(?![A-Za-z0-9_+]|[{_SPACES}.,/{_DASHES}]?[0-9])"
)
_DIALLED = re.compile(
    rf"(?<![A-Za-z0-9_.,+\-/=)])(?<![0-9][{_SPACES}])"
    rf"(?:(?:00[{_SPACES}]?|011[{_SPACES}{_DASHES}])(?!1)(?:{_CALLING_CODES})"
    rf"|\((?:00|011)[{_SPACES}]?(?!1)(?:{_CALLING_CODES})\)|011[{_SPACES}]\((?!1)(?:{_CALLING_CODES})\))"
    rf"(?:(?:[{_SPACES}.{_DASHES}]|(?<=\)))\(?[0-9]{{1,8}}\)?){{2,6}}{_EXTENSION}(?![A-Za-z0-9_]|[{_SPACES}.,/{_DASHES}]?[0-9])"
)

# NANPA's rules: neither ends in 11, which are service numbers, and no area code has a 9 in the middle.
_AREA = r"[2-9](?!11)[0-8][0-9]"
_EXCHANGE = r"[2-9](?!11)[0-9]{2}"
_BESIDE_DASH = rf"(?:[{_SPACES}]?[.{_DASHES}/][{_SPACES}]?|[{_SPACES}]{{1,2}})"
_DOT = rf"[{_SPACES}]?[\u00b7\u2022\u2219\u30fb][{_SPACES}]?"
_NORTH_AMERICAN = re.compile(
    rf"{_BEHIND_ANOTHER}(?<![A-Za-z0-9_.,+\-=\u2013\u2014\u2212$€£¥])(?<![0-9][{_SPACES}])(?<!\$ )"
    rf"(?:(?:\+[{_SPACES}]?)?(?:00)?1[{_SPACES}.{_DASHES}/]?|\(1\)[{_SPACES}]?)?(?:"
    rf"\([{_SPACES}]?{_AREA}[{_SPACES}]?\){_BESIDE_DASH}?{_EXCHANGE}{_BESIDE_DASH}?[0-9]{{4}}"
    rf"|{_AREA}(?P<first>[{_SPACES}.{_DASHES}/]|[{_SPACES}][{_DASHES}][{_SPACES}]|{_DOT}){_EXCHANGE}"
    rf"(?:(?P=first)(?<!/)|(?<![.][0-9]{{3}})[{_DASHES}])[0-9]{{4}}"
    rf"|{_AREA}(?:[{_SPACES}][{_DASHES}]|[{_DASHES}][{_SPACES}]){_EXCHANGE}[{_SPACES}]?[{_DASHES}][{_SPACES}]?[0-9]{{4}}"
    rf"){_EXTENSION}{_AFTER}(?![{_SPACES}][0-9])"
)
_CHINESE = re.compile(
    r"(?<![A-Za-z0-9_.+\-/=])(?:(?:86|0086)[ \-]?)?"
    r"(?:1[3-9][0-9](?:[0-9]{8}|([ \-])[0-9]{4}\1[0-9]{4})|\(?0[1-9][0-9]{1,2}\)?[ \-]?[2-9][0-9]{6,7})"
    r"(?:[转轉][0-9]{1,6})?(?![A-Za-z0-9_]|[.\-/][0-9])"
)
_RUSSIAN = re.compile(
    rf"(?<![A-Za-z0-9_.,+\-/=])(?<![0-9][{_SPACES}])"
    rf"(?:(?:8[{_SPACES}{_DASHES}]?)?\([03-9][0-9]{{2,4}}\)[{_SPACES}{_DASHES}]?"
    rf"|8[{_SPACES}{_DASHES}]?[3489][0-9]{{2}}[{_SPACES}{_DASHES}])"
    rf"[0-9]{{1,3}}(?P<dash>[{_DASHES}])[0-9]{{2}}(?P=dash)[0-9]{{2}}{_EXTENSION}{_AFTER}"
)
_WITH_TRUNK = re.compile(
    rf"(?<![A-Za-z0-9_.,+\-/=])(?<![0-9][{_SPACES}])"
    rf"(?:0[1-9](?P<between>[{_SPACES}.{_DASHES}])[0-9]{{2}}(?:(?P=between)[0-9]{{2}}){{3}}"
    rf"|0[1-9][{_SPACES}{_DASHES}][0-9]{{3,4}}[{_SPACES}{_DASHES}]?[0-9]{{3,4}}"
    rf"|(?:0[1-9][0-9]{{1,3}}|\(0[1-9][0-9]{{0,4}}\))[{_SPACES}/{_DASHES}][0-9]{{2,8}}(?:[{_SPACES}{_DASHES}][0-9]{{2,5}}){{0,3}})"
    rf"{_EXTENSION}{_AFTER}"
)
# Behind nine digits a "/" begins another number ("020 7555 0153/020 7555 0154") or a few last digits ("/54").
_ANY = re.compile(
    rf"(?<![0-9])\+?\(?[0-9](?:(?:[ .\-()/\u00a0\u2010-\u2013\u2212]{{0,2}}| / )[0-9]){{6,8}}"
    rf"(?:[ .\-()\u00a0\u2010-\u2013\u2212]{{0,2}}[0-9]){{0,6}}(?:/[0-9]{{1,4}}(?![ .\-/]?[0-9]))?{_EXTENSION}(?![0-9])"
)
# What stands between two numbers after one such word, and words that count only before a number with the prefix 0.
_AND_ANOTHER = re.compile(r"[ ]?(?:[,;/、]|\b(?:or|and|oder|und|ou|et|y|o|и|или)\b)[ ]?")
_BEFORE_TRUNK = re.compile(
    r"(?i)(?<![^\W_])(?:(?:call|ring|dial|text|sms|contact)(?: us| me)?(?: on| at| to)?|gsm|pager|viber|signal|office"
    r"|home|work|helpline|switchboard|freephone|reception|enquiries|[tpmf](?=\s?[:.]))[\s.:]{0,3}\Z"
)
# Words for telephone, mobile and fax; those that mean other things as well count only with a full stop or a colon.
_PHONE_BEFORE = re.compile(
    r"(?i)(?:(?:(?<![^\W_])(?:tel|telephones?|phone|phones(?=:)|mobile|mob|cell ?phone|cell(?=\s?[:：])|ph|fax|whatsapp"
    r"|hotline|telefonas|telefons|tālr(?=\.)|mobiltel|sími|κιν(?=[.:])"
    r"|telefon|telefax|telefonos?|teléfonos?|téléphone|tél|telefone|handy|telf|tfno|móvil|celular|mobil|tlf|tfn|puh|puhelin"
    r"|tel\. ?kom|telp|telepon|điện thoại|s?đt|тел(?=\.|:)|телефон[ау]?|факс|моб(?=\.|:)|мобильный|τηλ|τηλέφωνο|φαξ"
    r"|direct (?:line|dial)|whats(?=:)|fone|cel(?=[.:])|telemóvel|telefoon|telefoni|telefón|telefonszám"
    r"|(?:telefon|handy|mobil|ruf)n(?:ummer|r)|natel|mobiel|telefonní(?: číslo)?|tālrunis|ponsel|cellulare"
    r"|portable(?=\s?:)|komórka|contact(?= (?:no|nr|number)\b))(?:[ _]?(?:no|nr|number)|\.?-?(?:no|nr)"
    r"|\.? (?:fijo|casa|fixe|móvil|privat|home|office|work))?\b(?: is\b)?"
    r"|电话|手机|传真|热线|微信|联系方式|電話|手機|傳真|熱線|聯絡方式|携帯|ファックス|ファクス|전화|휴대폰|핸드폰|팩스|연락처"
    r"|טלפון|נייד|פקס|هاتف|تلفون|جوال|فاكس|โทรศัพท์|โทรสาร|โทร|تلفن|फ़ोन|फोन|मोबाइल|ফোন|মোবাইল|தொலைபேசி)"
    r"(?:号码|号|码|番号|番號|號碼|번호| नंबर)?|[☎☏✆📞📱📠]\ufe0f?)(?: ?\([^\W\d]{1,16}\))?"
    r"[\s.:：#=\"']{0,4}\+?\(?\Z|wa\.me/\Z"
)
# Words before a number which say that it is not a telephone number.
_OTHER_BEFORE = re.compile(
    r"(?i)(?:\b(?:order|invoice|part|serial|model|sku|isbn|issn|item|product|catalog(?:ue)?|ticket|case|patent|docket"
    r"|reference|ref|account|acct|tracking|version|ver|release|build|firmware|section|chapter|figure|table|clause|rfc|oid"
    r"|rev(?:ision)?|doi|id|v)s?|§)[\s.:#]{0,2}(?:(?:no|nr|number|id)\b)?[\s.:#(]{0,3}\Z"
)
_AMOUNT_BEFORE = re.compile(r"\b(?:USD|EUR|GBP|CHF|JPY|CAD|AUD|NZD|INR|CNY|RMB|HKD|Rs)[.:]?\s?\Z")
_ROUND = re.compile(rf"[1-9][0-9]{{0,2}}(?:[{_SPACES}.]000)+")
_CJK = re.compile(r"[\u4e00-\u9fff]")
_DATES = re.compile(r"(?:1[5-9]|20)[0-9]{2}(?:\D+(?:1[5-9]|20)[0-9]{2}|([\-./])[0-9]{1,2}\1[0-9]{1,2}\Z)")
_EXTENSION_DIGITS = re.compile(
    r"(?i)[\s(]*(?:[,;]?\s?(?:x|ext|extn|extension|доб|ramal)[\s.:=#]|[#转轉]|(?<!x)x(?!x)).*\Z"
)
_PATTERNS = (_INTERNATIONAL, _DIALLED, _NORTH_AMERICAN, _CHINESE, _RUSSIAN, _WITH_TRUNK, _ANY)


def phones(text: str, numbers: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of what looks like a telephone number; `numbers` are parts of it with 7 or more digits."""
    for start, end in numbers:
        for pattern in _PATTERNS:
            for begun in pattern.finditer(text, start, end):
                # Matched again without the end of the part, since a number may go beyond it.
                match = pattern.match(text, begun.start())
                if not match or not _is_phone(text, match, pattern):
                    continue
                yield match.span()
                if pattern in (_WITH_TRUNK, _ANY):
                    yield from _further(text, match, pattern)


def _further(text: str, first: re.Match[str], pattern: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Yields the numbers like the `first` one that a list goes on with, as in "Tel. 030 555015 or 030 555016"."""
    digits = _digits(first)
    while (between := _AND_ANOTHER.match(text, first.end())) and (following := pattern.match(text, between.end())):
        more = _digits(following)
        if abs(len(more) - len(digits)) > 1 or more[0] != digits[0] or _is_date_or_round(following[0]):
            return
        yield following.span()
        first = following


def _digits(match: re.Match[str]) -> str:
    """Returns the digits of a number without its extension's."""
    return "".join(filter(str.isdigit, _EXTENSION_DIGITS.sub("", match[0])))


def _is_date_or_round(number: str) -> bool:
    return bool(_DATES.search(number) or _ROUND.fullmatch(number))


def _is_phone(text: str, match: re.Match[str], pattern: re.Pattern[str]) -> bool:
    """Whether the match of a pattern has plausible digits and is not preceded by words of another kind of number."""
    before = text[max(0, match.start() - _CONTEXT) : match.start()]
    digits = _digits(match)
    if pattern is _INTERNATIONAL:
        if (match["code"] or match["enclosed"] or match["inner"]) == "1":
            return bool(re.fullmatch(f"1{_AREA}{_EXCHANGE}[0-9]{{4}}", digits))
        fraction = re.fullmatch(r"\+[0-9]+\.[0-9]+", match[0])
        return not fraction and 9 <= len(digits) <= 15 + digits.count("0", 0, 4)  # "(0)" is written but not dialled
    if pattern is _DIALLED:
        sizes = {len(group) for group in re.findall("[0-9]+", match[0])}
        # Groups of four digits are code points, and groups of one or two are bytes.
        return 11 <= len(digits) <= 17 and sizes != {4} and max(sizes) >= 3
    if pattern is _NORTH_AMERICAN:
        return not (_OTHER_BEFORE.search(before) or _AMOUNT_BEFORE.search(before))
    if pattern is _CHINESE:
        beside = before[-8:] + text[match.end() : match.end() + 8]
        return bool(_CJK.search(beside) or _PHONE_BEFORE.search(before))
    if pattern is _RUSSIAN:
        return len(digits) == (11 if match[0][0] == "8" else 10) and not _OTHER_BEFORE.search(before)
    if pattern is _WITH_TRUNK:
        return bool(_BEFORE_TRUNK.search(before)) and 9 <= len(digits) <= 12
    return bool(_PHONE_BEFORE.search(before)) and not _is_date_or_round(match[0])
