import random

import pytest

from graphmoe.data.pieces import LONG, cut, cut_chunks, cut_document
from graphmoe.data.tokenizer import Piece, train_bpe

ALPHABET = " \n\t\r\x1c\u0085\u00a0\u2003ab1'.sé日🙂\u0301"


def chunked(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.mark.parametrize("letters", [0, 1, 5])
def test_pieces_do_not_depend_on_the_chunks(letters):
    rng = random.Random(letters)
    for _ in range(400):
        text = "".join(rng.choices(ALPHABET + "abcdefgh" * letters, k=rng.randint(0, 400)))
        size = rng.choice([1, 3, 7, 20, 100])
        pieces = list(cut(text, size))
        assert "".join(pieces) == text
        assert all(len(piece) >= size for piece in pieces[:-1])
        assert list(cut_chunks(chunked(text, rng.choice([1, 2, 5, 50])), size)) == pieces


def test_a_text_without_spaces_is_cut_before_white_space():
    size, lines = 10, ["日本語の文章です。" * 2 for _ in range(60)]
    for border in ("\n\n", "\r\n"):
        text = border.join(lines)
        pieces = list(cut(text, size))
        assert "".join(pieces) == text
        assert len(pieces) > 40
        assert all(piece[0] in "\r\n" for piece in pieces[1:-1])
        tool = train_bpe([text, "a b"], 300)
        assert [token for piece in pieces for token in tool.encode(piece)] == tool.encode(text)


def test_a_text_without_any_white_space_stays_whole():
    text = "x" * (10 * LONG * 5)
    assert list(cut_chunks(chunked(text, 7), 10)) == [text]


def test_the_last_piece_of_a_document_is_known():
    assert list(cut_document(["one two", " three"], 4, held_out=True)) == [
        Piece("one two", False, True),
        Piece(" three", True, True),
    ]
    assert list(cut_document([], 4, held_out=False)) == [Piece("", True, False)]
