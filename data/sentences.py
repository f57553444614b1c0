"""A text cut into its sentences, by Wikimedia's sentencex: rules and abbreviations of English, 50 MB/s, no download."""

import re

LONG = 1_000  # characters; what is longer is rarely a sentence: a table, a program

_WIDE_BLANK = re.compile(r"[^\S\x00-\x7f]")  # blanks outside ASCII, such as the no-break space


def split(text: str) -> list[str]:
    """The sentences of a text, in order. Nothing but blanks is lost; blanks outside ASCII become spaces.

    What is longer than LONG is cut at its ends of lines.
    """
    import sentencex

    # Before an initial (`J.`) the library steps back one byte over a blank, and panics where the blank has more.
    pieces = sentencex.segment("en", _WIDE_BLANK.sub(" ", text))
    short = (part for piece in pieces for part in (piece.splitlines(True) if len(piece) > LONG else [piece]))
    return [part for part in short if part.strip()]
