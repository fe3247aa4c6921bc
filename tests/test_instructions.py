"""Whether an answer does what was asked: literal instructions and answers."""

from __future__ import annotations

import pytest

from agent_rl.instructions import obeys, satisfies

SHORT = "Tea is a hot drink made from leaves."
LONG = "Tea is a hot drink made from leaves. It comes from China. People drink it in the morning. It can be green."


@pytest.mark.parametrize(
    ("instruction", "answer", "obeyed"),
    [
        ("Please answer in one short sentence.", SHORT, True),
        ("Please answer in one short sentence.", LONG, False),
        ("Please answer in one short sentence.", "word " * 41, False),
        ('Start your answer with "Sure!"', "sure, tea is a drink", True),
        ('Start your answer with "Sure!"', "Surely tea", False),
        ("Please start every answer with: Aye aye, Captain!", "Aye aye, Captain! Tea", True),
        ("Don't start with 'Sure'.", "Sure, tea", False),
        ("Don't start with 'Sure'.", SHORT, True),
        ("Please end with a question.", "It is hot. Would you like some?", True),
        ("Please end with a question.", SHORT, False),
        ('End every answer with "Cheers"', "Tea is hot. Cheers!", True),
        ("Please always call me Captain.", "Well, Captain, it is hot.", True),
        ("Please always call me Captain.", SHORT, False),
        ("Don't call me Captain.", "Well, Captain, it is hot.", False),
        ("My name is Anna.", "Hello Anna, it is hot.", True),
        ("No lists please", "Tea:\n- hot\n- green", False),
        ("No lists please", SHORT, True),
        ("Please use a numbered list.", "1. Boil water.\n2. Add tea.", True),
        ("Please use a numbered list.", SHORT, False),
        ("Use bullet points.", "* hot\n* green", True),
        ("Use bullet points.", "1. hot", False),
        ("ALL CAPS please", "TEA IS HOT", True),
        ("ALL CAPS please", SHORT, False),
        ("Use lower case.", "tea is hot", True),
        ("Two sentences at most, please.", "It is hot. It is green.", True),
        ("Two sentences at most, please.", LONG, False),
        ("Answer in exactly four sentences.", LONG, True),
        ("Answer in exactly three sentences.", LONG, False),
        ("At least 3 sentences.", SHORT, False),
        ("No more than 8 words.", SHORT, True),  # eight words
        ("No more than 7 words.", SHORT, False),
        ("In a few words only.", LONG, False),
        ("Use metric units", "It is 8 km away.", True),
        ("Use metric units", "It is 8 miles away.", False),
        ("Use metric units", SHORT, None),
        ("No emojis.", "Hi 🙂", False),
        ("Use emojis", "Hi 🙂", True),
        ("Stop apologizing.", "I'm sorry, it is hot.", False),
        ("No exclamation marks", "Hot!", False),
        ('Please mention "green tea".', "There is green tea.", True),
        ("Give me an example.", "Hot drinks, for example tea.", True),
        ("Please answer in French.", "Le thé est une boisson dans la tasse.", True),
        ("Please answer in French.", "The tea is a drink and it is hot.", False),
        ("Please answer in French.", "Thé.", None),
        ("Use bullet points. No emojis!", "- hot 🙂", False),
        ("Too long.", SHORT, None),
        ("That's wrong.", SHORT, None),
        ("Be polite.", SHORT, None),
        ("Please use a numbered list.", "", False),
        ("Be polite.", "", None),
    ],
)
def test_one_answer_under_a_standing_instruction(instruction: str, answer: str, obeyed: bool | None) -> None:
    assert satisfies(instruction, answer) is obeyed


@pytest.mark.parametrize(
    ("hint", "before", "after", "obeyed"),
    [
        ("Too long.", LONG, SHORT, True),  # 21 words → 8
        ("Too long.", LONG, LONG, False),
        ("Too long.", LONG, "Hot. Green. Leaves.", False),  # short, but three sentences
        ("Too long. Please answer in one short sentence.", LONG, SHORT, True),
        ("Too long. Please answer in one short sentence.", LONG, "Tea is hot. It is green.", True),  # near enough
        ("Too long. Please answer in one short sentence.", LONG, LONG, False),
        ("Shorter, please.", SHORT, "A hot drink.", True),
        ("Shorter, please.", SHORT, "Tea is a drink made from leaves.", False),  # 7 of 8 words: not clearly
        ("More detail please.", SHORT, LONG, True),
        ("Too short.", LONG, SHORT, False),
        ("Please use a numbered list.", SHORT, "1. Tea is hot.", True),
        ("That's wrong.", SHORT, LONG, None),
        ("Too long.", LONG, "", False),
    ],
)
def test_a_second_answer_against_the_first(hint: str, before: str, after: str, obeyed: bool | None) -> None:
    assert obeys(hint, before, after) is obeyed
