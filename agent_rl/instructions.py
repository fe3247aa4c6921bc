"""Does an answer do what an instruction asks? Rules for what a rule can tell; None for all else. Pure.

A rule is a pattern over the instruction and a check of an answer. Rules are tried from the top, and the words that one
has matched are taken away, so that "don't start with 'Sure'" is never also read as "start with 'Sure'".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

from agent_rl.monitors import is_empty, sentences

Check = Callable[[str, str | None], bool | None]  # (answer, the answer before or None) → does it obey

CLEARLY_SHORTER, CLEARLY_LONGER = 0.75, 1.25  # in words, against the answer before
SHORT_SENTENCE = 40  # words: a sentence with more is not short
NUMBERS = {w: i for i, w in enumerate("zero one two three four five six seven eight nine ten".split())} | {
    "a single": 1,
    "a couple of": 2,
    "a few": 4,
    "twenty": 20,
    "thirty": 30,
    "fifty": 50,
    "hundred": 100,
    "a hundred": 100,
}
LANGUAGES = {
    "english": "the of and is to in that it are for",
    "french": "le la les des est une et dans que pour du",
    "spanish": "el la los las es una que en de y por",
    "german": "der die das und ist nicht ein eine mit auf",
    "italian": "il la che di è un una per sono con gli",
    "portuguese": "o a os as é uma que em para com não",
}
BULLET, NUMBERED = r"(?m:^\s*[-*•–]\s+\S)", r"(?m:^\s*\d+[.)]\s+\S)"
EMOJI = r"[\U0001F300-\U0001FAFF\u2600-\u27BF]"
IMPERIAL = r"(?i)\b(?:feet|foot|ft|miles?|mph|inch(?:es)?|yards?|pounds?|lbs?|ounces?|gallons?|fahrenheit)\b|°F"
METRIC = r"(?i)\b(?:k?m|cm|mm|kg|g|l|ml|km/h|(?:kilo|centi|milli)?(?:met(?:er|re)|gram|lit(?:er|re))s?|celsius)\b|°C"


def satisfies(instruction: str, answer: str) -> bool | None:
    """Whether one answer does what a standing instruction asks; None where no rule can tell.

    >>> satisfies("Please answer in one short sentence.", "Tea is a drink. It is hot.")
    False
    """
    return _all(instruction, answer, None)


def obeys(hint: str, before: str, after: str) -> bool | None:
    """Whether a second answer does what was asked of it after the first one; None where no rule can tell.

    >>> obeys("Too long.", before="Tea is a hot drink that is made from leaves.", after="A hot drink.")
    True
    """
    return _all(hint, after, before)


def _all(instruction: str, answer: str, before: str | None) -> bool | None:
    """False if one check fails, else True if one holds, else None. An empty answer obeys nothing that can be told."""
    checks = list(_checks(instruction))
    found = [verdict for check in checks if (verdict := check(answer, before)) is not None]
    if checks and is_empty(answer):
        return False
    return all(found) if found else None


def _checks(instruction: str) -> Iterator[Check]:
    rest = instruction.translate(str.maketrans("’‘“”", "''\"\""))
    for pattern, make in RULES:
        while match := pattern.search(rest):
            yield make(*match.groups())
            rest = rest[: match.start()] + " § " + rest[match.end() :]


# ------------------------------------------------------------------------------------------------------ checks


def _shorter(answer: str, before: str | None) -> bool | None:
    if before is None:
        return None
    return _words(answer) <= CLEARLY_SHORTER * _words(before) and sentences(answer) <= max(2, sentences(before) // 2)


def _longer(answer: str, before: str | None) -> bool | None:
    return None if before is None else _words(answer) >= CLEARLY_LONGER * _words(before)


def _one_sentence(answer: str, before: str | None) -> bool | None:
    """Alone, it is one short sentence. Against the answer before, two are near enough if it is clearly shorter."""
    if sentences(answer) == 1 and _words(answer) <= SHORT_SENTENCE:
        return True
    return before is not None and sentences(answer) <= 2 and _words(answer) <= CLEARLY_SHORTER * _words(before)


def _at_most(n: str, count: Callable[[str], int]) -> Check:
    return lambda answer, _: count(answer) <= _number(n)


def _exactly(n: str, count: Callable[[str], int]) -> Check:
    return lambda answer, _: count(answer) == _number(n)


def _at_least(n: str, count: Callable[[str], int]) -> Check:
    return lambda answer, _: count(answer) >= _number(n)


def _starts(quoted: str | None, bare: str | None) -> Check:
    phrase = _letters(quoted or bare or "")
    return lambda answer, _: f"{_letters(answer)} ".startswith(f"{phrase} ")


def _ends(quoted: str | None, bare: str | None) -> Check:
    phrase = _letters(quoted or bare or "")
    return lambda answer, _: f" {_letters(answer)}".endswith(f" {phrase}")


def _says(quoted: str | None, bare: str | None) -> Check:
    phrase = _letters(quoted or bare or "")
    return lambda answer, _: f" {phrase} " in f" {_letters(answer)} "


def _not(make: Callable[..., Check]) -> Callable[..., Check]:
    def negated(*groups: str | None) -> Check:
        check = make(*groups)
        return lambda answer, before: None if (found := check(answer, before)) is None else not found

    return negated


def _has(pattern: str) -> Callable[..., Check]:
    return lambda: lambda answer, _: re.search(pattern, answer) is not None


def _case(upper: bool) -> Check:
    def check(answer: str, _: str | None) -> bool | None:
        letters = [c for c in answer if c.upper() != c.lower()]
        return sum(c.isupper() == upper for c in letters) >= 0.9 * len(letters) if letters else None

    return check


def _metric(answer: str, _: str | None) -> bool | None:
    if re.search(IMPERIAL, answer):
        return False
    return True if re.search(METRIC, answer) else None


def _language(name: str) -> Check:
    """The language whose commonest words an answer has most of; None for an answer with too few of any."""

    def check(answer: str, _: str | None) -> bool | None:
        words = answer.lower().split()
        counts = {language: sum(w in common.split() for w in words) for language, common in LANGUAGES.items()}
        best = max(counts.values())
        return None if best < 2 else counts[name.lower()] == best

    return check


def _words(text: str) -> int:
    return len(text.split())


def _number(text: str) -> int:
    text = text.lower()
    return int(text) if text.isdigit() else NUMBERS[text]


def _letters(text: str) -> str:
    """Lower-case words alone, so that case and punctuation do not decide."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower()))


# ------------------------------------------------------------------------------------------------------- rules

N = r"(\d{1,3}|" + "|".join(sorted(NUMBERS, key=len, reverse=True)) + ")"
TEXT = r"(?:the words? |the phrase |the letters? |the sentence |the question )?"
QUOTED = TEXT + r"(?:\"([^\"]+)\"|'(.+?)'(?!\w))"
QUOTED_OR_REST = r"[:,]?\s+" + TEXT + r"[:,]?\s*(?:\"([^\"]+)\"|([^\".;]+))"
NAME = r"(?:\"([^\"]+)\"|((?:[A-Z][\w'-]*)(?: [A-Z][\w'-]*)*|\w+))"
DONT = r"(?:don'?t|do not|never|stop|avoid|no need to|without)(?: ever)? "
NO = r"(?:\bno(?: more)?|without(?: any)?|don'?t (?:use|give me|write|make|want)|do not use|stop using|avoid|skip the) "
USE = r"(?:\b(?:use|using|with|as|in|give me|make(?: it)?|put (?:it|that) (?:in|into)) )(?:a |an |some |more )?"

TABLE: list[tuple[str, Callable[..., Check]]] = [
    (DONT + r"(?:start|begin|open)(?:ing)?(?: \w+){0,2}? with" + QUOTED_OR_REST, _not(_starts)),
    (DONT + r"(?:end|finish|clos)(?:e|ing)?(?: \w+){0,2}? with a question\b", _not(_has(r"\?\s*$"))),
    (DONT + r"(?:end|finish)(?:ing)?(?: \w+){0,2}? with" + QUOTED_OR_REST, _not(_ends)),
    (DONT + r"call(?:ing)? me " + NAME, _not(_says)),
    (DONT + r"(?:say|saying|use|using|write|mention)(?:ing)? " + QUOTED, _not(_says)),
    (DONT + r"(?:apologi[sz](?:e|ing)|say(?:ing)? (?:you(?:'| a)re )?sorry)", _not(_has(r"(?i)\bsorry\b|apolog"))),
    (NO + r"apolog\w+", _not(_has(r"(?i)\bsorry\b|apolog"))),
    (NO + r"(?:bullet(?:ed|s)?(?: (?:points?|lists?))?|lists?|numbered lists?)", _not(_has(f"{BULLET}|{NUMBERED}"))),
    (NO + r"(?:emojis?|smileys?)", _not(_has(EMOJI))),
    (NO + r"exclamation (?:marks?|points?)", _not(_has("!"))),
    (NO + r"(?:questions?|question marks?)", _not(_has(r"\?"))),
    (NO + r"(?:headings?|headers?|titles?)", _not(_has(r"(?m)^#+ "))),
    (NO + r"(?:bold(?: text)?|markdown)", _not(_has(r"\*\*|(?m:^#+ )"))),
    (NO + r"(?:all )?(?:caps|capitals|capital letters)", lambda: _not(lambda: _case(True))()),
    (r"\b(?:start|begin|open)(?:ing)?(?: \w+){0,3}? with" + QUOTED_OR_REST, _starts),
    (r"\b(?:end|finish)(?:ing)?(?: \w+){0,3}? with (?:a question\b(?! \"))", _has(r"\?[\"')]*\s*$")),
    (r"\b(?:end|finish)(?:ing)?(?: \w+){0,3}? with" + QUOTED_OR_REST, _ends),
    (r"\b(?:call|address) me (?:as )?" + NAME, _says),
    (r"\bmy name is (?:not \w+,? (?:but )?)?" + NAME, _says),
    (r"\b(?:include|mention|say|contain|use) " + QUOTED, _says),
    (r"\b(?:one|1|a single|in a)(?: \w+){0,2} sentence\b(?: only)?", lambda: _one_sentence),
    (N + r"(?: \w+)? sentences (?:at most|max(?:imum)?|or (?:less|fewer))", partial(_at_most, count=sentences)),
    (r"(?:at most|no more than|up to|under|max(?:imum)?) " + N + r"(?: \w+)? sentences",
     partial(_at_most, count=sentences)),
    (r"at least " + N + r" sentences", partial(_at_least, count=sentences)),
    (r"\bin (?:exactly )?" + N + r"(?: \w+)? sentences", partial(_exactly, count=sentences)),
    (N + r" words (?:at most|max(?:imum)?|or (?:less|fewer))", partial(_at_most, count=_words)),
    (r"(?:at most|no more than|up to|under|less than|fewer than|within|max(?:imum)?) " + N + r" words",
     partial(_at_most, count=_words)),
    (r"at least " + N + r" words", partial(_at_least, count=_words)),
    (r"\bin a few words(?: only)?", partial(lambda: _at_most("12", _words))),
    (r"\b(?:in|with) (?:exactly )?(?:only )?" + N + r" words?\b", partial(_at_most, count=_words)),
    (USE + r"numbered (?:list|points|steps)", _has(NUMBERED)),
    (USE + r"(?:bullet(?:ed|s)?(?: (?:points?|lists?))?)", _has(BULLET)),
    (USE + r"(?:short )?lists?\b", _has(f"{BULLET}|{NUMBERED}")),
    (USE + r"(?:emojis?|smileys?)", _has(EMOJI)),
    (USE + r"(?:bold(?: text)?)", _has(r"\*\*\S")),
    (r"\b(?:all caps|capital letters|capitals|upper ?case)\b", lambda: _case(True)),
    (r"\blower ?case\b", lambda: _case(False)),
    (r"\b(?:metric(?: units)?|celsius|kilomet(?:er|re)s)\b", lambda: _metric),
    (r"\b(?:give|with|add|include|show)(?: me| us)? an example\b", _has(r"(?i)\bexample|for instance|such as|e\.g\.")),
    (r"\b(?:in|use|speak|write) (" + "|".join(LANGUAGES) + r")\b", _language),
    (r"\b(?:too long|too wordy|too verbose|shorter|shorten|brief(?:er|ly)?|concise(?:ly)?|less detail|too much detail|"
     r"too detailed|short answers?|keep \w+ short|be short|short,? please)\b", lambda: _shorter),
    (r"\b(?:too short|too brief|longer|more details?|in (?:more |greater )?detail|elaborate|expand)\b",
     lambda: _longer),
]  # fmt: skip
RULES = [(re.compile(pattern, re.I), make) for pattern, make in TABLE]
