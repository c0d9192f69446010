"""The reward for following checkable instructions, in the form and with the names of IFEval.

The rules are those of Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models", table 1, checked
strictly (section 3). They are checked without a limit of time, so each takes time in proportion to the text's length.
Left out are those that need a language detector, a sentence splitter or a tokenizer of words:
language:response_language, length_constraints:number_sentences and change_case:capital_word_frequency.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.rewards.unscorable import Unscorable

_Arguments = Mapping[str, Any]


def _compared(count: int, arguments: _Arguments, relation: str, bound: str) -> bool:
    match arguments[relation]:
        case "less than":
            return count < int(arguments[bound])
        case "at least":
            return count >= int(arguments[bound])
    raise Unscorable(f"a {relation} that is neither 'less than' nor 'at least'")


def _count(word: str, text: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def _keywords(text: str, a: _Arguments) -> bool:
    return all(_count(word, text) for word in a["keywords"])


def _frequency(text: str, a: _Arguments) -> bool:
    return _compared(_count(a["keyword"].strip(), text), a, "relation", "frequency")


def _forbidden(text: str, a: _Arguments) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in a["forbidden_words"])


def _letters(text: str, a: _Arguments) -> bool:
    return _compared(text.lower().count(a["letter"].lower()), a, "let_relation", "let_frequency")


def _words(text: str, a: _Arguments) -> bool:
    return _compared(len(re.findall(r"\w+", text)), a, "relation", "num_words")


def _paragraphs(text: str, a: _Arguments) -> bool:
    """Returns whether lines of *** divide the text into the wanted number of paragraphs, with no empty one inside."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == int(a["num_paragraphs"])


def _first_word(text: str, a: _Arguments) -> bool:
    """Returns whether the text has the wanted number of paragraphs, and the nth begins with the wanted word."""
    parts, nth = text.split("\n\n"), int(a["nth_paragraph"])
    filled = sum(bool(part.strip()) for part in parts)
    if filled != int(a["num_paragraphs"]) or not 0 < nth <= filled or not parts[nth - 1].strip():
        return False
    word = parts[nth - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == a["first_word"].lower()


def _placeholders(text: str, a: _Arguments) -> bool:
    return sum(map(_bracketed, text.split("\n"))) >= int(a["num_placeholders"])


def _bracketed(line: str) -> int:
    """Returns the number of matches of \\[.*?\\] in a line, in time that grows with its length alone."""
    count = end = 0
    while (begin := line.find("[", end)) >= 0 and (end := line.find("]", begin) + 1):
        count += 1
    return count


def _postscript(text: str, a: _Arguments) -> bool:
    marker = a["postscript_marker"].strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(marker, re.escape(marker.lower())), text.lower()) is not None


def _bullets(text: str, a: _Arguments) -> bool:
    stars = re.findall(r"^[^\S\n]*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == int(a["num_bullets"])


def _one_of(text: str, a: _Arguments) -> bool:
    return any(option in text for option in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


def _highlights(text: str, a: _Arguments) -> bool:
    once = [part for part in re.findall(r"\*[^\n\*]*\*", text) if part.strip("*").strip()]
    twice = [part for part in re.findall(r"\*\*[^\n\*]*\*\*", text) if part[2:-2].strip()]
    return len(once) + len(twice) >= int(a["num_highlights"])


def _sections(text: str, a: _Arguments) -> bool:
    found = re.findall(rf"\s?{re.escape(a['section_spliter'].strip())}\s?\d+\s?", text)  # spelled so in IFEval
    return len(found) >= int(a["num_sections"])


def _json(text: str, a: _Arguments) -> bool:
    text = re.sub(r"^```(json|Json|JSON)?", "", text.strip()).removesuffix("```")
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, a: _Arguments) -> bool:
    return any(_titled(line).lstrip("<").rstrip(">").strip() for line in text.split("\n"))


def _titled(line: str) -> str:
    """Returns the match of <<.+>> in a line, "" if there is none, in time that grows with the line's length alone."""
    begin, end = line.find("<<"), line.rfind(">>")
    return line[begin : end + 2] if 0 <= begin < end - 2 else ""


def _two_responses(text: str, a: _Arguments) -> bool:
    parts = [part.strip() for part in text.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


def _repeats(text: str, a: _Arguments) -> bool:
    return text.strip().lower().startswith(a["prompt_to_repeat"].strip().lower())


def _ends(text: str, a: _Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower())


def _quoted(text: str, a: _Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


INSTRUCTIONS: Mapping[str, tuple[Callable[[str, _Arguments], bool], tuple[str, ...]]] = {
    # Name: the rule, and the arguments that it needs.
    "keywords:existence": (_keywords, ("keywords",)),
    "keywords:frequency": (_frequency, ("keyword", "frequency", "relation")),
    "keywords:forbidden_words": (_forbidden, ("forbidden_words",)),
    "keywords:letter_frequency": (_letters, ("letter", "let_frequency", "let_relation")),
    "length_constraints:number_words": (_words, ("num_words", "relation")),
    "length_constraints:number_paragraphs": (_paragraphs, ("num_paragraphs",)),
    "length_constraints:nth_paragraph_first_word": (_first_word, ("num_paragraphs", "nth_paragraph", "first_word")),
    "detectable_content:number_placeholders": (_placeholders, ("num_placeholders",)),
    "detectable_content:postscript": (_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": (_bullets, ("num_bullets",)),
    "detectable_format:constrained_response": (_one_of, ()),
    "detectable_format:number_highlighted_sections": (_highlights, ("num_highlights",)),
    "detectable_format:multiple_sections": (_sections, ("section_spliter", "num_sections")),
    "detectable_format:json_format": (_json, ()),
    "detectable_format:title": (_title, ()),
    "combination:two_responses": (_two_responses, ()),
    "combination:repeat_prompt": (_repeats, ("prompt_to_repeat",)),
    "startend:end_checker": (_ends, ("end_phrase",)),
    "startend:quotation": (_quoted, ()),
    "change_case:english_capital": (lambda text, _: text.isupper(), ()),  # in any language
    "change_case:english_lowercase": (lambda text, _: text.islower(), ()),
    "punctuation:no_comma": (lambda text, _: "," not in text, ()),
}


def instructions(prompt: Any, completion: str, answer: Any, metadata: Any, partial: bool = False) -> float:
    """Returns 1 if the completion follows all instructions of its problem, or with `partial` the share that it follows.

    A record has IFEval's own keys: instruction_id_list, the names, and kwargs, an object of arguments for each. An
    empty completion follows none.
    """
    followed = []
    for name, arguments in instructions_of(metadata):
        try:
            followed.append(bool(completion.strip()) and INSTRUCTIONS[name][0](completion, arguments))
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise Unscorable(f"wrong arguments of {name} ({type(error).__name__})") from None
    return sum(followed) / len(followed) if partial else float(all(followed))


def instructions_of(metadata: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the names and arguments of a problem's instructions. Raises Unscorable if one cannot be checked."""
    names, arguments = metadata.get("instruction_id_list"), metadata.get("kwargs")
    if not isinstance(names, list) or not names:
        raise Unscorable("no list instruction_id_list in the record")
    if not isinstance(arguments, list) or len(arguments) != len(names):
        raise Unscorable("kwargs of the record has not one object for each of instruction_id_list")
    for name, own in zip(names, arguments, strict=True):
        if name not in INSTRUCTIONS:
            raise Unscorable(f"the instruction {str(name)[:60]} is none of those that can be checked")
        missing = [key for key in INSTRUCTIONS[name][1] if not isinstance(own, Mapping) or own.get(key) is None]
        if missing:
            raise Unscorable(f"{name} without {missing[0]} in its kwargs")
    return list(zip(names, arguments, strict=True))
