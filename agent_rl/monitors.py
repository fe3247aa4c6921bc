"""What can be counted about answers without understanding them: repetition, emptiness, truncation, length. Pure."""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from agent_rl.types import Finish

SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")
ABBREVIATION = re.compile(r"\b(?:[A-Za-z]|Mr|Mrs|Ms|Dr|St|Prof|vs|etc|approx|e\.g|i\.e|a\.m|p\.m|U\.S|U\.K)\.$")
LIST_NUMBER = re.compile(r"(?m)^\s*\d+\.$")


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the bounds that hold it with the stated confidence; n is how many values it comes from."""

    mean: float
    low: float
    high: float
    n: int


def repetition(text: str, n: int = 3) -> float:
    """Share of word n-grams that the text has said before: 0.0 for none, near 1.0 for a loop.

    >>> repetition("one more one more one more")  # one-more-one, more-one-more, then both again
    0.5
    """
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compression(text: str) -> float | None:
    """Compressed size over size: below about 0.2 a text repeats itself, with or without spaces. None under 64 bytes,
    where the compressor's own header would be measured."""
    data = text.encode()
    return len(zlib.compress(data, 9)) / len(data) if len(data) >= 64 else None


def is_empty(text: str) -> bool:
    """True where there is no letter and no digit in any script."""
    return not any(c.isalnum() for c in text)


def sentences(text: str) -> int:
    """Sentences of a text; a last one without its full stop counts, abbreviations and the numbers of a list do not.

    >>> sentences("Dr. Who is 3.5 years old. Really?! Yes")
    3
    """
    if is_empty(text):
        return 0
    ends = [m.end() for m in SENTENCE_END.finditer(text) if not _inside(text[: m.end()], text[m.end() :])]
    return len(ends) + (not is_empty(text[ends[-1] if ends else 0 :]))


def _inside(before: str, after: str) -> bool:
    """True where the full stop that ends `before` belongs to an abbreviation or a list's number, not to a sentence."""
    return bool(LIST_NUMBER.search(before) or (after.strip() and ABBREVIATION.search(before)))


def summary(answers: Sequence[str], lengths: Sequence[int], finishes: Sequence[Finish]) -> dict[str, float]:
    """Counts over a set of answers, `lengths` in tokens. Raises ValueError where there is none or numbers differ.

    Names: length_mean, length_median (tokens), empty_rate, repetition, truncation_rate, sentences.
    """
    if not answers or not len(answers) == len(lengths) == len(finishes):
        counts = len(answers), len(lengths), len(finishes)
        raise ValueError(f"got {counts} answers, lengths and finishes; expected the same number of each, at least one")
    return {
        "length_mean": fmean(lengths),
        "length_median": median(lengths),
        "empty_rate": fmean(map(is_empty, answers)),
        "repetition": fmean(map(repetition, answers)),
        "truncation_rate": fmean(f is Finish.LENGTH for f in finishes),
        "sentences": fmean(map(sentences, answers)),
    }


def bootstrap(values: Sequence[float], *, confidence: float = 0.95, rounds: int = 2000, seed: int = 0) -> Interval:
    """Mean of `values` with a percentile-bootstrap interval; the same seed gives the same interval.

    Raises ValueError where there are no values or one is not finite: a mean of nothing is not zero.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"got {len(values)} values; expected at least one, all finite")
    draw = random.Random(seed)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(rounds))
    tail = (1 - confidence) / 2
    return Interval(fmean(values), means[int(tail * rounds)], means[math.ceil((1 - tail) * rounds) - 1], len(values))


def wilson(hits: int, n: int, *, z: float = 1.96) -> Interval:
    """A share with Wilson's score interval, sound for few trials and for shares of 0 and 1.

    Raises ValueError unless 0 ≤ hits ≤ n and n > 0.
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"got {hits} hits of {n}; expected 0 ≤ hits ≤ n and n > 0")
    p, zz = hits / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half), n)


def non_finite(values: Mapping[str, float]) -> list[str]:
    """Names of the values that are NaN or infinite."""
    return sorted(name for name, value in values.items() if not math.isfinite(value))
