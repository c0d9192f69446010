"""Streams of text: whole characters only, all of the text, and nothing from a stop string on."""

import random

import pytest

from pretrain.generation.text_codec import TextCodec
from pretrain.generation.text_stream import CharacterStream, TextStream
from tests.tiny_models import CHINESE, odd_strings


def decode_bytes(ids: list[int]) -> str:
    """Decodes ids that are bytes, as all of Trivium's tokenizers do with their fallback to bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def pieces_of(stream: CharacterStream | TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("text", ["a é 中 👩‍👩‍👧‍👦🏳️‍🌈", CHINESE, "\ufffd and \ufffd", *odd_strings(30, list("né中👍"))])
def test_a_character_is_passed_on_with_its_last_byte(text: str) -> None:
    ids = list(text.encode())
    for beginning in ("", "before 中"):
        stream, passed = CharacterStream(decode_bytes, list(beginning.encode())), ""
        for i, token in enumerate(ids, 1):
            passed += stream.push(token)
            whole = bytes(ids[:i]).decode("utf-8", errors="ignore")
            # U+FFFD itself looks like an unfinished character, and waits for the next one.
            assert passed == whole.rstrip("\ufffd") or passed == whole
        assert passed + stream.finish() == text


def test_bytes_that_are_no_characters_are_passed_on_as_they_are_decoded() -> None:
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.choice((0x41, 0xE4, 0xB8, 0xAD, 0xFF, 0xF0, 0x9F, draw.randrange(256))) for _ in range(20)]
        assert "".join(pieces_of(CharacterStream(decode_bytes, [0xE4]), ids)) in (
            decode_bytes(ids),
            decode_bytes([0xE4, *ids])[1:],  # the prompt ended with half a character
        )


def test_tokens_whose_text_depends_on_the_one_before() -> None:
    words = ["It", "was", "the", "best"]

    def decode(ids: list[int]) -> str:
        return " ".join(words[i] for i in ids)  # as WordPiece does, and sentencepiece with its first space

    assert pieces_of(CharacterStream(decode, [0]), [1, 2, 3]) == [" was", " the", " best", ""]
    assert pieces_of(CharacterStream(decode), [1, 2, 3]) == ["was", " the", " best", ""]


def test_pieces_of_a_tokenizer_are_its_text(tokenizer_path) -> None:
    codec = TextCodec(tokenizer_path)
    for text in odd_strings(60, codec.tokenizer.pieces):
        prompt, ids = codec.encode_prompt("It was 中"), codec.tokenizer.encode(text)
        pieces = pieces_of(CharacterStream(codec.decode, prompt), ids)
        assert "".join(pieces) == text and ("\ufffd" in text or "\ufffd" not in "".join(pieces))


def up_to_stop(text: str, stops: list[str]) -> tuple[str, int]:
    """Returns the text before the stop that ends first, and the number of characters up to that end or 0 for none."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))], end
    return text, 0


def test_stop_strings_end_a_text_wherever_its_tokens_are_cut() -> None:
    draw = random.Random(1)
    ended = 0
    for _ in range(2000):
        text = "".join(draw.choice("ab中") for _ in range(draw.randrange(12)))
        stops = ["".join(draw.choice("ab中") for _ in range(draw.randrange(1, 5))) for _ in range(draw.randrange(4))]
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(6)))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        stream, passed = TextStream(lambda ids, parts=parts: "".join(parts[i] for i in ids), stops), []
        for token in range(len(parts)):
            passed.append(stream.push(token))
            if stream.stopped:
                break
        passed.append(stream.finish())
        wanted, end = up_to_stop(text, stops)
        assert "".join(passed) == stream.text == wanted and stream.stopped == (end > 0)
        if end:
            ended += 1
            assert len("".join(parts[:token])) < end <= len("".join(parts[: token + 1])), "it ends no token later"
    assert 500 < ended < 1900


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    parts = ["It", " w", "as", " was", " worse"]
    stream = TextStream(lambda ids: "".join(parts[i] for i in ids), ["was worse", "was, "])
    assert [stream.push(i) for i in range(4)] == ["It", " ", "", "was "]
    assert stream.push(4) == "" and stream.stopped and stream.text == "It was "
    assert stream.finish() == ""
