"""What the next message says about an answer: literal messages and what they mean, traps among them."""

from __future__ import annotations

import pytest

from agent_rl.followups import Reading, normalise, read, same_question, split

QUESTION = "What is tea?"

# message → the instruction that stands from then on
INSTRUCTS: list[tuple[str, str]] = [
    ("Too long. Please answer in one short sentence.", "Please answer in one short sentence."),
    ('Start your answer with "Sure!"', 'Start your answer with "Sure!"'),
    ("Please start every answer with: Aye aye, Captain!", "Please start every answer with: Aye aye, Captain!"),
    ("Please always call me Captain.", "Please always call me Captain."),
    ("please always call me captain", "Please always call me captain."),
    ("No lists please", "No lists please."),
    ("Use metric units", "Use metric units."),
    ("Can you make it shorter?", "Make it shorter."),
    ("Could you please keep your answers short?", "Please keep your answers short."),
    ("Explain it simply.", "Explain it simply."),
    ("Please use a numbered list.", "Please use a numbered list."),
    ("Please answer in French.", "Please answer in French."),
    ("Too long.", "Too long."),
    ("That is too complicated for me.", "That is too complicated for me."),
    ("From now on, use British spelling.", "From now on, use British spelling."),
    ("No emojis.", "No emojis."),
    ("Don't apologize.", "Don't apologize."),
    ("Stop using bullet points.", "Stop using bullet points."),
    ("Shorter, please.", "Shorter, please."),
    ("Can you explain that in simpler words?", "Explain that in simpler words."),
    ("Two sentences at most, please.", "Two sentences at most, please."),
    ("In one sentence, please.", "In one sentence, please."),
    ("Short answers only.", "Short answers only."),
    ("My name is Anna.", "My name is Anna."),
    ("Please be more formal.", "Please be more formal."),
    ("Please end with a question.", "Please end with a question."),
    ("I asked for one sentence.", "I asked for one sentence."),
    ("That's wrong. Too long, too.", "Too long, too."),
    ("Be brief", "Be brief."),
]
# what this one answer should be: a hint, nothing that stands
CORRECTS: list[str] = [
    "No, it is made of leaves.",
    "I meant the drink, not the letter.",
    "Actually, it comes from China.",
    "Add a sentence about milk.",
    "Give me an example.",
    "You forgot the milk.",
    "The right answer is Lisbon.",
    "It should be Lisbon.",
    "Translate that into German.",
    "Summarize it.",
]
# not good, without a word on how to do better
COMPLAINS: list[str] = [
    "That's wrong.",
    "Wrong.",
    "No.",
    "I don't understand.",
    "You didn't answer my question.",
    "That's not what I asked.",
    "That doesn't make sense.",
    "Are you sure?",
    "What?",
    "Try again.",
    "what is tea?",
    "What is TEA",
]
# good
PRAISES: list[str] = [
    "Perfect!",
    "Correct.",
    "That's right.",
    "Great, thank you.",
    "Thanks!",
    "Thank you so much.",
    "Exactly!",
    "Good. Now tell me about coffee.",
    "That helps.",
    "Nice answer",
]
# new questions and tasks, some in the words of a complaint, and words that say nothing
ELSE: list[str] = [
    "Too long ago, when was it?",
    "Please answer: what is tea in Japanese?",
    "What is coffee?",
    "Thanks. What is coffee?",
    "Is it wrong to lie?",
    "What is too long for a novel?",
    "Make a list of fruits.",
    "Write a short poem about rain.",
    "Explain how tea is made in China.",
    "How do you say that in French?",
    "Stop words in NLP, what are they?",
    "Give me an example of a mammal.",
    "Is that correct English grammar?",
    "No lists were found in the file, why?",
    "Don't forget to call mom: remind me how reminders work.",
    "Add two and two.",
    "Shorter days are in which season?",
    'Could you translate "tea" into German?',
    "Never eat yellow snow: who sang that?",
    "Always Be My Baby is by whom?",
    "In one sentence, what is coffee?",
    "Wrong planet is a forum, right?",
    "Be careful with fire, but how do I light one?",
    "Ok",
    "Hmm.",
    "Great Britain has how many islands?",
    "Perfect numbers: name three.",
    "Call me a taxi, how do I say that?",
    "Short stories by Poe?",
    "Use of metric units in the UK: when did it start?",
    "The answer to life is what?",
]
# what was asked before holds no longer
BACK: list[str] = [
    "Never mind the short answers.",
    "Never mind the emojis, forget that.",
    "Forget that.",
    "Forget what I said.",
    "You can write long answers again.",
    "Please ignore my instructions.",
    "You don't have to call me Captain anymore.",
    "Go back to normal.",
]


@pytest.mark.parametrize(("text", "standing"), INSTRUCTS)
def test_an_instruction_on_manner_is_a_complaint_with_a_hint_that_stands(text: str, standing: str) -> None:
    reading = read(text, QUESTION)
    assert (reading.score, reading.standing, reading.related) == (-1, standing, True)
    assert reading.hint is not None


@pytest.mark.parametrize("text", CORRECTS)
def test_a_correction_is_a_hint_for_this_answer_alone(text: str) -> None:
    assert read(text, QUESTION) == Reading(-1, text, reason="told how to do better")


@pytest.mark.parametrize("text", COMPLAINS)
def test_a_bare_complaint_has_no_hint(text: str) -> None:
    reading = read(text, QUESTION)
    assert (reading.score, reading.hint, reading.standing, reading.related) == (-1, None, None, True)


@pytest.mark.parametrize("text", PRAISES)
def test_praise_is_positive_and_teaches_nothing(text: str) -> None:
    reading = read(text, QUESTION)
    assert (reading.score, reading.hint, reading.standing) == (1, None, None)


@pytest.mark.parametrize("text", ELSE)
def test_another_matter_says_nothing_of_the_answer(text: str) -> None:
    reading = read(text, QUESTION)
    assert (reading.score, reading.hint, reading.standing, reading.related) == (None, None, None, False)
    assert not reading.takes_back


@pytest.mark.parametrize("text", BACK)
def test_taking_back(text: str) -> None:
    reading = read(text, QUESTION)
    assert (reading.takes_back, reading.score, reading.hint, reading.standing) == (True, None, None, None)


def test_the_hint_is_the_part_of_the_message_that_is_about_the_answer() -> None:
    assert read("Thanks. Too long. Please answer in one short sentence.", QUESTION).hint == (
        "Too long. Please answer in one short sentence."
    )
    assert read("Too long. What is coffee?", QUESTION) == Reading(
        -1, "Too long.", "Too long.", reason="told how to do better"
    )


def test_an_instruction_before_a_new_question_stands_but_does_not_blame_the_old_answer() -> None:
    reading = read("Please use metric units. How tall is Everest?", QUESTION)
    assert (reading.score, reading.hint, reading.related) == (None, None, False)
    assert reading.standing == "Please use metric units."


def test_all_instructions_of_a_message_stand_together_and_bare_complaints_give_way() -> None:
    reading = read("Too long.  Use bullet points. No emojis!", QUESTION)
    assert reading.standing == "Use bullet points. No emojis!"


def test_quoted_sentences_are_not_torn_apart() -> None:
    assert split('Start with "Sure! Here it is." please. Thanks') == [
        'Start with "Sure! Here it is." please.',
        "Thanks",
    ]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("how do birds fly", True),
        ("Please, how do birds fly?", True),
        ("How do fish swim?", False),
        ("Birds fly?", False),  # too few words to be sure
    ],
)
def test_the_question_again(text: str, same: bool) -> None:
    assert same_question(text, "How do birds fly?") is same


def test_normalised_instructions_have_one_spelling() -> None:
    assert normalise("  use  metric units") == normalise("Use metric units.") == "Use metric units."
