"""Fill-in-the-middle: a share of documents is rewritten so that the middle comes last (V3 4.1, PSM form).

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

At document level, before packing. The two cuts are uniform over the document's characters; whether and where a document
is cut depends on (seed, its number) only, so the same documents are rewritten however many processes read them.
"""

from deepv3.data.order import chance, draw

_CHOICE, _FIRST, _SECOND = 0xF1, 0xF2, 0xF3  # streams of the seeded hash


def chosen(number: int, seed: int, rate: float) -> bool:
    """Whether this document is rewritten."""
    return chance(rate, seed, _CHOICE, number)


def cut(text: str, number: int, seed: int) -> tuple[str, str, str]:
    """(prefix, middle, suffix); any of them may be empty."""
    places = len(text) + 1
    low, high = sorted((draw(seed, _FIRST, number) % places, draw(seed, _SECOND, number) % places))
    return text[:low], text[low:high], text[high:]
