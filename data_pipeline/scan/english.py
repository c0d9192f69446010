"""English word splitter by the rules of spaCy's tokenizer (Honnibal et al., version 3.8, MIT), as datatrove uses it.

A text is split at white space. From each piece are split off: punctuation, quotes, symbols and currency signs in front;
the same, full stops, units after numbers and "'s" at the end; then separators between letters and digits, such as a
hyphen. Addresses (hosts, e-mails, 13.6.1), abbreviations and emoticons stay whole, and contractions are split into
their parts ("do", "n't"). The rules are spaCy's own; `words_of` lists the three differences.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator
from itertools import accumulate

import numpy as np

_PIECE = 500  # characters; longer pieces are split in parts of this size, so that time stays linear in the text
_LONGEST_SUFFIX = 8  # characters of the longest suffix, except for a row of full stops
_REMEMBERED = 40  # characters; the words of pieces up to this length are cached
_MOST_REMEMBERED = 200_000  # pieces in the cache, which is then emptied


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


# Ranges of code points that are letters; letters of a script without case count as upper and as lower case.
_LETTERS = _listed(
    "AZ az \u00c0\u00d6 \u00d8\u00f6 \u00f8\u01bf \u01c4\u02af \u0386\u0386 \u0388\u038a \u038c\u038c \u038e\u038f "
    "\u0391\u03a9 \u03ac\u03af \u03b1\u03c9 \u03cc\u03ce \u0400\u0401 \u0403\u040a \u040c\u040d \u0410\u0451 "
    "\u0453\u045a \u045c\u045d \u0490\u0491 \u0496\u0497 \u04a2\u04a3 \u04ae\u04af \u04ba\u04bb \u04d8\u04d9 "
    "\u04e8\u04e9 \u0591\u05f4 \u0620\u064a \u066e\u06d5 \u06e5\u06ff \u0750\u077f \u08a0\u08bd \u0900\u09ff "
    "\u0b80\u0cff \u0d80\u0dff \u1100\u137f \u1d00\u1d25 \u1d6b\u1d77 \u1d79\u1d9a \u1e00\u1eff \u2c60\u2c7b "
    "\u2c7e\u2c7f \u2e80\u2fdf \u2ff0\u2fff \u3001\u30ff \u31c0\u31ef \u3200\u4dbf \u4e00\u9fff \ua722\ua76f "
    "\ua771\ua787 \ua78b\ua78e \ua790\ua7b9 \ua7fa\ua7fa \uab30\uab5a \uab60\uab64 \uac00\ud7af \uf900\ufaff "
    "\ufb1d\ufbb1 \ufbd3\ufd3d \ufd50\ufdc7 \ufdf0\ufdfb \ufe30\ufe4f \ufe70\ufefc \uff21\uff3a \uff41\uff5a "
    "\U0001ee00\U0001eebb \U0001f200\U0001f2ff \U00020000\U0002a6df \U0002a700\U0002ebef \U0002f800\U0002fa1f"
)
# Ranges of symbols that Unicode has added since spaCy's table of symbols was made.
_NOT_SYMBOLS = _listed(
    "\u166d\u166d \u2b97\u2b97 \u2bc9\u2bc9 \u2bff\u2bff \u2e50\u2e51 \u32ff\u32ff \ufd40\ufdcf \ufdfe\ufdff "
    "\U0001019c\U0001019c \U00011f00\U0001cfff \U0001d1e9\U0001d1ea \U0001e100\U0001ed2e \U0001f10d\U0001f10f "
    "\U0001f16c\U0001f16f \U0001f1ad\U0001f1ad \U0001f6d5\U0001f6df \U0001f6fa\U0001f6ff \U0001f774\U0001f77f "
    "\U0001f7d9\U0001f7ff \U0001f8b0\U0001f8ff \U0001f90c\U0001f90f \U0001f93f\U0001f93f \U0001f971\U0001f972 "
    "\U0001f977\U0001f979 \U0001f97b\U0001f97b \U0001f9a3\U0001f9af \U0001f9ba\U0001f9bf \U0001f9c3\U0001f9cf "
    "\U0001fa00\U0001fa5f \U0001fa70\U0001fbff"
)
_PUNCTUATION = _listed("… , : ; ! ? ¿ ؟ ¡ ( ) [ ] { } < > _ # * & 。 ？ ！ ， 、 ； ： ～ · । ، ۔ ؛ ٪")
_QUOTES = _listed("' \" ” “ ` ‘ ´ ’ ‚ , „ » « 「 」 『 』 （ ） 〔 〕 【 】 《 》 〈 〉 ⟦ ⟧ \u2329 \u232a")
_CURRENCY = _listed("$ £ € ¥ ฿ ₽ ﷼ ₠ ₡ ₢ ₣ ₤ ₥ ₦ ₧ ₨ ₩ ₪ ₫ ₭ ₮ ₯ ₰ ₱ ₲ ₳ ₴ ₵ ₶ ₷ ₸ ₹ ₺ ₻ ₼ ₾ ₿")
_DOLLARS = r"US\$|C\$|A\$"
_UNITS = _listed(
    "km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa "
    "mbar mb MB kb KB gb GB tb TB T G M K % км км² км³ м м² м³ дм дм² дм³ см см² см³ мм мм² мм³ нм кг г мг м/с км/ч "
    "кПа Па мбар Кб КБ кб Мб МБ мб Гб ГБ гб Тб ТБ"
)

_PRONOUNS = _listed("i you he she it we they")
_QUESTIONS = _listed("who what when where why how there that this these those")
_NEGATED = _listed("ca could do does did had may might must need ought sha should wo would")
_NEGATED_ALONE = _listed("ai are is was were have has dare")
_NOT_SPLIT = _listed("Ill ill Its its Hell hell Shell shell Shed shed were Were Well well Whore whore")
_SPLIT = _listed(
    "y'|all y|all how|'d|'y How|'d|'y not|'ve not|ve Not|'ve Not|ve can|not Can|not gon|na Gon|na got|ta Got|ta let|'s "
    "Let|'s c'm|on C'm|on"
)
_WHOLE = _listed(
    "'S 's \u2018S \u2018s and/or w/o 're 'Cause 'cause 'cos 'Cos 'coz 'Coz 'cuz 'Cuz 'bout ma'am Ma'am o'clock "
    "O'clock lovin' Lovin' lovin Lovin havin' Havin' havin Havin doin' Doin' doin Doin goin' Goin' goin Goin nothin "
    "Nothin nothin' Nothin' nuthin Nuthin nuthin' Nuthin' ol Ol ol' Ol' somethin Somethin somethin' Somethin' em 'em "
    "ll 'll nuff 'nuff Mt. Ak. Ala. Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec. Del. Feb. Fla. Ga. Ia. Id. Ill. Ind. "
    "Jan. Jul. Jun. Kan. Kans. Ky. La. Mar. Mass. Mich. Minn. Miss. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. "
    "Oct. Okla. Ore. Pa. S.C. Sep. Sept. Tenn. Va. Wash. Wis. 'd a.m. Adm. Bros. co. Co. Corp. D.C. Dr. e.g. E.g. E.G. "
    "Gen. Gov. i.e. I.e. I.E. Inc. Jr. Ltd. Md. Messrs. Mo. Mont. Mr. Mrs. Ms. p.m. Ph.D. Prof. Rep. Rev. Sen. St. vs. "
    "v.s. \\t \\n — ' \\\") <space> '' C++ a. b. c. d. e. f. g. h. i. j. k. l. m. n. o. p. q. r. s. t. u. v. w. x. y. "
    "z. ä. ö. ü. "
    # Emoticons.
    ":) :-) :)) :-)) :))) :-))) (: (-: =) (= :] :-] [: [-: [= =] :o) (o: :} :-} 8) 8-) (-8 ;) ;-) (; (-; :( :-( :(( "
    ":-(( :((( :-((( ): )-: =( >:( :') :'-) :'( :'-( :/ :-/ =/ =| :| :-| ]= =[ :1 :P :-P :p :-p :O :-O :o :-o :0 :-0 "
    ":() >:o :* :-* :3 :-3 =3 :> :-> :X :-X :x :-x :D :-D ;D ;-D =D xD XD xDD XDD 8D 8-D ^_^ ^__^ ^___^ >.< >.> <.< "
    "._. ;_; -_- -__- v.v V.V v_v V_V o_o o_O O_o O_O 0_o o_0 0_0 o.O O.o O.O o.o 0.0 o.0 0.o @_@ <3 <33 <333 </3 "
    "(^_^) (-_-) (._.) (>_<) (*_*) (¬_¬) ಠ_ಠ ಠ︵ಠ (ಠ_ಠ) ¯\\(ツ)/¯ (╯°□°）╯︵┻━┻ ><(((*>"
)


def special_cases() -> dict[str, tuple[str, ...]]:
    """Returns {piece of text: the words into which it is split} for contractions, abbreviations and emoticons."""
    found: dict[str, tuple[str, ...]] = {}

    def add(*parts: str) -> None:
        """Adds a contraction with and without its apostrophes, each also with a capital letter."""
        for first in (parts[0], parts[0].title()):
            for one in ((first, *parts[1:]), (first, *(part.replace("'", "") for part in parts[1:]))):
                found["".join(one)] = one

    add("i", "'m")
    add("i", "'m", "a")
    for word in _PRONOUNS:
        for rest in (("'ll",), ("'ll", "'ve"), ("'d",), ("'d", "'ve")):
            add(word, *rest)
        add(word, "'s") if word in ("he", "she", "it") else add(word, "'ve")
        if word in ("you", "we", "they"):
            add(word, "'re")
    for word in _QUESTIONS:
        for rest in (("'ll",), ("'ll", "'ve"), ("'d",), ("'d", "'ve")):
            add(word, *rest)
        if word not in ("these", "those"):
            add(word, "'s")
        if word not in ("that", "this"):
            add(word, "'re")
            add(word, "'ve")
    for word in _NEGATED:
        add(word, "n't")
        add(word, "n't", "'ve")
        if word in ("could", "might", "must", "should", "would"):
            add(word, "'ve")
    for word in _NEGATED_ALONE:
        add(word, "n't")
    for hour in range(1, 13):
        for half in ("a.m.", "am", "p.m.", "pm"):
            found[f"{hour}{half}"] = (str(hour), half)
    for joined in _SPLIT:
        found[joined.replace("|", "")] = tuple(joined.split("|"))
    for word in _NOT_SPLIT:
        found.pop(word, None)
    found |= {word: (word,) for word in _WHOLE}
    found |= {f"°{unit}.": ("°", unit, ".") for unit in "cfkCFK"}
    curly = {word: parts for word, parts in found.items() if "'" in word}
    return found | {
        word.replace("'", "’"): tuple(part.replace("'", "’") for part in parts) for word, parts in curly.items()
    }


class _Rules:
    """Compiled regular expressions and special cases of the splitter, and the cache of pieces already split."""

    def __init__(self) -> None:
        letters = [chr(code) for one in _LETTERS for code in range(ord(one[0]), ord(one[1]) + 1)]
        alpha = "".join(f"{one[0]}-{one[1]}" for one in _LETTERS)
        lower = _as_class(letter for letter in letters if not letter.isupper())
        upper = _as_class(letter for letter in letters if not letter.islower())
        symbols = _as_class(sign for sign in map(chr, range(0x1FC00)) if _is_symbol(sign))
        quotes, marks = re.escape("".join(_QUOTES)), re.escape("".join(_PUNCTUATION))
        currency, units = re.escape("".join(_CURRENCY)), "|".join(map(re.escape, _UNITS))
        self.prefix = re.compile(rf"[§%=—–{marks}{quotes}{currency}{symbols}]|\+(?![0-9])|\.\.+|{_DOLLARS}").match
        self.suffix = re.compile(
            rf"(?:……|\.\.+|[{marks}{quotes}{symbols}—–]|['’][sS]|(?<=[0-9])(?:\+|{_DOLLARS}|[{currency}]|{units})"
            rf"|(?<=°[FfCcKk])\.|(?<=[0-9{lower}%²\-\+{marks}|(?:{quotes})])\.|(?<=[{upper}][{upper}])\.)$"
        ).search
        infixes = [
            rf"\.\.+|…|[{symbols}]", r"(?<=[0-9])[+\-\*^](?=[0-9-])",
            rf"(?<=[{lower}{quotes}])\.(?=[{upper}{quotes}])", rf"(?<=[{alpha}]),(?=[{alpha}])",
            rf"(?<=[{alpha}0-9])(?:-|–|—|--|---|——|~)(?=[{alpha}])", rf"(?<=[{alpha}0-9])[:<>=/](?=[{alpha}])",
        ]  # fmt: skip
        self.infixes = re.compile("|".join(infixes)).finditer
        self.address = re.compile(_address(lower)).match
        self.special = special_cases()
        self.remembered: dict[str, tuple[int, ...]] = {}
        # Special cases that the other rules split: the parts in which they are found -> the words that replace them.
        self.joined: dict[tuple[str, ...], tuple[str, ...]] = {}
        for word, parts in self.special.items():
            if self.prefix(word) or self.suffix(word) or any(True for _ in self.infixes(word)):
                self.joined[tuple(self.cut(word, {}))] = parts
        self.longest = max(map(len, self.joined))
        self.first = {words[0] for words in self.joined}

    def ends(self, piece: str) -> tuple[int, ...]:
        """Returns the positions at which the words of a piece end; the piece contains no white space."""
        if piece.isascii() and piece.isalpha() and piece not in self.special:
            found: tuple[int, ...] = (len(piece),)
        else:
            found = tuple(accumulate(map(len, self._rejoined(list(self.cut(piece, self.special))))))
        if len(piece) <= _REMEMBERED:
            if len(self.remembered) >= _MOST_REMEMBERED:
                self.remembered.clear()
            self.remembered[piece] = found
        return found

    def cut(self, piece: str, special: dict[str, tuple[str, ...]]) -> Iterator[str]:
        """Yields the words of a piece: prefixes, the parts of the middle, suffixes."""
        behind: list[str] = []
        before = -1
        while piece and len(piece) != before and piece not in special:
            before = len(piece)
            match = self.prefix(piece)
            front = match.end() if match else 0
            if front and piece[front:] in special:
                yield piece[:front]
                piece = piece[front:]
                break
            rest = piece[front:] if front else piece
            # All suffixes but a row of full stops are short.
            match = self.suffix(rest, 0 if rest.endswith("..") else max(0, len(rest) - _LONGEST_SUFFIX))
            rear = match.end() - match.start() if match else 0
            if rear and piece[:-rear] in special:
                behind.append(piece[-rear:])
                piece = piece[:-rear]
                break
            if front:
                yield piece[:front]
            if rear and front + rear <= len(piece):
                behind.append(piece[-rear:])
                piece = piece[front:-rear]
            else:
                piece = piece[front:]
        if piece in special:
            yield from special[piece]
        elif piece and "." in piece and self.address(piece):
            yield piece
        elif piece:
            yield from self._between(piece)
        yield from reversed(behind)

    def _between(self, piece: str) -> Iterator[str]:
        start = 0
        for match in self.infixes(piece):
            if match.start() == 0:
                continue
            if match.start() != start:
                yield piece[start : match.start()]
            yield match.group()
            start = match.end()
        if start < len(piece):
            yield piece[start:]

    def _rejoined(self, words: list[str]) -> list[str]:
        """Replaces runs of words that together are a special case by its words; longer runs take precedence."""
        if self.first.isdisjoint(words):
            return words
        spans = [
            (size, first)
            for first in range(len(words))
            for size in range(min(self.longest, len(words) - first), 0, -1)
            if words[first] in self.first and tuple(words[first : first + size]) in self.joined
        ]
        taken: set[int] = set()
        chosen: dict[int, int] = {}
        for size, first in sorted(spans, key=lambda span: (-span[0], span[1])):
            if first not in taken and first + size - 1 not in taken:
                chosen[first] = size
            taken.update(range(first, first + size))
        found: list[str] = []
        position = 0
        while position < len(words):
            size = chosen.get(position, 0)
            found += self.joined[tuple(words[position : position + size])] if size else words[position : position + 1]
            position += size or 1
        return found


def _as_class(characters: Iterator[str]) -> str:
    """Returns characters as ranges for a regular expression's [...]."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, set(characters))):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


def _is_symbol(sign: str) -> bool:
    younger = any(one[0] <= sign <= one[1] for one in _NOT_SYMBOLS)
    return unicodedata.category(sign) == "So" and not younger


def _address(lower: str) -> str:
    """Returns a regular expression for addresses: [scheme://][user@]host[:port][/...].

    The host is a public IPv4 address or a domain. It is D. Perini's (gist.github.com/dperini/729294, MIT), as spaCy
    has it; it has to match a whole piece.
    """
    inner = r"A-Za-z0-9\u00a1-\uffff"
    return (
        r"(?:(?:[\w\+\-\.]{2,})://)?(?:\S+(?::\S*)?@)?(?:"
        r"(?!(?:10|127)(?:\.\d{1,3}){3})(?!(?:169\.254|192\.168)(?:\.\d{1,3}){2})"
        r"(?!172\.(?:1[6-9]|2\d|3[0-1])(?:\.\d{1,3}){2})"
        r"(?:[1-9]\d?|1\d\d|2[01]\d|22[0-3])(?:\.(?:1?\d{1,2}|2[0-4]\d|25[0-5])){2}"
        r"(?:\.(?:[1-9]\d?|1\d\d|2[0-4]\d|25[0-4]))"
        rf"|(?:(?:[{inner}][{inner}_-]{{0,62}})?[{inner}]\.)+(?:[{lower}]{{2,63}}))"
        r"(?::\d{2,5})?(?:[/?#]\S*)?$"
    )


_rules = functools.cache(_Rules)
_PIECES = re.compile(r"\S+")


def words_of(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (starts, ends) of a text's words in characters, each int32 [words].

    Three things differ from spaCy's own words. A piece of over 500 characters without white space is split every 500
    characters. Symbols that only a later Python knows count as symbols under that Python. And an emoticon is one word
    even if its first character would form another emoticon with the last character before the white space.
    """
    rules = _rules()
    remembered = rules.remembered
    starts: list[int] = []
    ends: list[int] = []
    for match in _PIECES.finditer(text):
        piece, before = match.group(), match.start()
        found = remembered.get(piece)
        start = before
        for end in found or (rules.ends(piece) if len(piece) <= _PIECE else _in_parts(piece, rules)):
            starts.append(before)
            before = start + end
            ends.append(before)
    return np.array(starts, np.int32), np.array(ends, np.int32)


def _in_parts(piece: str, rules: _Rules) -> tuple[int, ...]:
    parts = range(0, len(piece), _PIECE)
    return tuple(first + end for first in parts for end in rules.ends(piece[first : first + _PIECE]))
