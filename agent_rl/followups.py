"""What a user's next message says about the answer before it: English rules, readable as a table. Pure.

A message is read sentence by sentence. Each sentence means the first row of MEANINGS that fits it from its beginning;
one that fits none is a matter of its own. `read` adds the sentences up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Means(StrEnum):
    COMPLAINT = "complaint"  # the answer is not good, without saying how to do better
    MANNER = "manner"  # how answers should be: holds for other questions too
    CONTENT = "content"  # what this answer should say: a correction, something to add or leave out
    PRAISE = "praise"
    THANKS = "thanks"  # polite: praise only where nothing else is said
    TAKE_BACK = "take back"  # what was asked before holds no longer
    FILLER = "filler"  # says nothing by itself: "Hmm."
    OTHER = "other"  # a new question or a new task


@dataclass(frozen=True, slots=True)
class Reading:
    """`hint` is the part of the message that tells how to do better, `standing` what of it holds for others."""

    score: int | None
    hint: str | None = None
    standing: str | None = None
    related: bool = True
    takes_back: bool = False
    reason: str = ""


FORM = (
    r"(?:(?:one|two|three|four|five|a few|a couple of|\d+|a single|full|complete|short|simple|plain|fewer|more|"
    r"less|a|an|"
    r"exactly|only|just|at most|no more than|under|about|brief|very|long|the|form of|bullet(?:ed)?|numbered|clear) )*"
    r"(?:sentences?|words?|lines?|paragraphs?|bullets?(?: points?| lists?)?|lists?|steps|points|tables?|prose|"
    r"(?:all )?caps|capitals|capital letters|upper ?case|lower ?case|metric(?: units)?|celsius|markdown|plain text|"
    r"json|"
    r"english|french|spanish|german|italian|portuguese|dutch|chinese|japanese|detail|details|depth|terms|language|tone|"
    r"rhymes?|verse|poem|style|emojis?|emoji|units|headings?|bold|exclamation marks?|questions?|apolog\w+|jargon|"
    r"introductions?|disclaimers?|slang|kilomet(?:er|re)s|imperial(?: units)?)"
)
END = (
    r"(?=\s*(?:[.!,;:]|$| at | and | but | only\b| please\b| instead\b| from now| next time| in future| at most| or ))"
)
IT = (
    r"(?:it|that|this|them|the answer|your answers?|the (?:last|previous) answer|answers?|your (?:reply|replies|"
    r"response|responses)|everything|things)"
)
HOW = (
    r"(?:(?:a (?:bit|little)|much|even|far|more|less|way|very|so|too|as|really) )*"
    r"(?:short(?:er)?|long(?:er)?|brief(?:er|ly)?|concise(?:ly)?|simpl(?:e|er|y)|clear(?:er|ly)?|formal(?:ly)?|"
    r"informal(?:ly)?|polite(?:ly)?|friendl(?:y|ier)|detailed|specific|precise(?:ly)?|technical|verbose|wordy|"
    r"funn(?:y|ier)|"
    r"serious(?:ly)?|casual(?:ly)?|direct(?:ly)?|to the point|creative|readable|nicer|kinder|strict|helpful|vague|dry|"
    r"complicated|complex|general|abstract|repetitive|slow|advanced|generic|basic|boring|dense|rude|chatty|harsh|cold)"
)
ANSWER = (
    r"(?:answer|reply|respond|write|speak|talk|say it|explain (?:it|that|this)|put it|phrase it|rephrase it|"
    r"format (?:it|that|this)|do it|try again|give it|summari[sz]e (?:it|that|this))"
)

MEANINGS: list[tuple[Means, re.Pattern[str]]] = [
    (means, re.compile(pattern, re.I))
    for means, pattern in [
        # -------------------------------------------------------------------------- what was asked before is over
        (Means.TAKE_BACK, r"(?:never ?mind|forget|ignore|drop|disregard|scrap) (?:about )?(?:that|it|"
         r"what i (?:said|asked)|"
         r"(?:the|my|those|all|that) .*(?:answers?|instructions?|requests?|rules?|preferences?|sentences?|lists?|"
         r"lines?|"
         r"style|tone|format|thing|captain|name))\b(?!.*\?)"),
        (Means.TAKE_BACK, r"(?:you (?:can|may|don'?t (?:need|have) to)|no need to|it'?s (?:ok(?:ay)?|fine) to) .*"
         r"(?:again|any ?more|any longer|now|anymore)$"),
        (Means.TAKE_BACK, r"(?:stop|quit) (?:answering|replying|writing|keeping|calling)\b.*\b(?:short|briefly|"
         r"brief|that way|so)$"),
        (Means.TAKE_BACK, r"(?:go|get) back to (?:normal|how (?:you|it) (?:was|were)|your (?:usual|normal))"),
        (Means.TAKE_BACK, r"never ?mind (?:about )?(?:the|those|that|my|what|it|all)\b(?!.*\?)"),
        (Means.FILLER, r"never ?mind$"),
        # ---------------------------------------------------------------------------------------- how answers should be
        (Means.MANNER, r"(?:way |much |far |a (?:bit|little) |still |again |it'?s |that(?:'s| is| was) |this is |"
         r"your (?:answer|reply|response) (?:is|was) )*"
         r"(?:too|so) (?:long|short|wordy|verbose|brief|detailed|formal|informal|casual|technical|complicated|complex|"
         r"vague|general|generic|chatty|repetitive|many words|much (?:text|detail|information)|dry|rude|simple|"
         r"advanced)(?:-winded)?"
         r"(?: again| for me| as well| and .*|, .*|; .*)?$"),
        (Means.MANNER, r"(?:from now on|in (?:the )?future|next time|going forward|henceforth|always|never)\b.{3,}"),
        (Means.MANNER, ANSWER + r"(?: (?:me|us|again|always|only|back|it|this|that))* (?:in|with|using|without|as|"
         r"like)(?: "
         r"(?:just|only|a|an|exactly))* .{2,}"),
        (Means.MANNER, ANSWER + r"(?: (?:me|again|always|it|this|that))* " + HOW + r"\b"),
        (Means.MANNER, r"(?:be|stay|sound|try to be|be a bit) " + HOW + r"\b"),
        (Means.MANNER, r"(?:make|keep|have|write|get) " + IT + r" (?:all |always )?(?:" + HOW + r"|sound .+|"
         r"in " + FORM + r"|rhyme)"),
        (Means.MANNER, r"(?:a (?:bit|little) |much |even )?(?:shorter|longer|briefer|simpler|clearer|"
         r"more " + HOW + r"|less " + HOW
         + r"|more detail|less detail|fewer words)(?: (?:answers?|sentences?|next time|this time))?$"),
        (Means.MANNER, r"(?:short|brief|long|concise|simple|detailed|direct) (?:answers?|sentences?|"
         r"replies)(?: only)?$"),
        (Means.MANNER, r"(?:start|begin|open|end|finish|close)(?:ing)? (?:it |this |that |(?:all |each of |"
         r"every )?(?:your |the )?"
         r"(?:answers?|repl(?:y|ies)|responses?|sentences?|messages?|one) )?with\b"),
        (Means.MANNER, r"(?:always |just )*(?:call|address) me\b"),
        (Means.MANNER, r"my name is\b"),
        (Means.MANNER, r"(?:no|without|fewer|less|more|only|not so many|use no) (?:more )?" + FORM + END),
        (Means.MANNER, r"(?:use|give me|i want|i(?:'d| would) (?:like|prefer)|i prefer|i like|prefer|make it|"
         r"put it in(?:to)?|turn it into|"
         r"as|in|with|format it as) (?:it in |it as |them in )?" + FORM + END),
        (Means.MANNER, r"(?:don'?t|do not|stop|avoid|quit|no need to|skip|drop|leave out|"
         r"cut) (?:the )?(?:ever )?(?:us(?:e|ing)|say(?:ing)?|"
         r"start(?:ing)?|begin(?:ning)?|end(?:ing)?|call(?:ing)? me|apologi[sz](?:e|ing)|giv(?:e|ing) me|mak(?:e|"
         r"ing)|writ(?:e|ing)|repeat(?:ing)?|"
         r"be(?:ing)? (?:so )?" + HOW + r"|rambl(?:e|ing)|lectur(?:e|ing)|explain(?:ing)?|answer(?:ing)?|"
         r"add(?:ing)?|list(?:ing)?|ask(?:ing)?|"
         r"put(?:ting)?|talk(?:ing)?|introductions?|intro|apolog(?:y|ies)|pleasantries|disclaimers?|jargon|emojis?|"
         r"lists?|bullet points?|fluff)\b"),
        (Means.CONTENT, r"(?:explain|put|say|tell|describe|write|rewrite|rephrase|translate|summari[sz]e|shorten|"
         r"simplify|condense|reformat|"
         r"reword) (?:it|that|this|the answer|your answer|me (?:that|this|it))\b"),
        (Means.CONTENT, r"(?:shorten|simplify|elaborate|rephrase|summari[sz]e|expand)$"),
        (Means.MANNER, r"(?:at most |no more than |max(?:imum)? |only |just )?" + FORM + r" ?(?:at most|"
         r"max(?:imum)?|or (?:less|fewer)|only)?$"),
        (Means.MANNER, r"i (?:said|asked (?:you )?for|told you|wanted|want|need(?:ed)?|"
         r"asked you to) (?:it )?(?:to )?(?:be |keep it |answer |a |an |in )*"
         r"(?:" + HOW + r"|" + FORM + r")"),
        # -------------------------------------------------------------------------------- what this answer should say
        (Means.CONTENT, r"(?:no,? |nope,? |actually,? |sorry,? but |but |wrong,? |not (?:quite|"
         r"really),? )+(?:it(?:'s| is| was)|that(?:'s| is| was)|"
         r"they (?:are|were)|there (?:are|is)|he|she|the .* (?:is|are|was|were)|i (?:meant|asked|mean|said|"
         r"want(?:ed)?))\b"
         r"(?! (?:wrong|incorrect|false|not (?:right|true|correct)|not what)).+"),
        (Means.CONTENT, r"actually,? (?:it|that|the|he|she|they)\b.+"),
        (Means.CONTENT, r"(?:it|that|this|the (?:right |correct )?answer) (?:should|must|ought to) (?:be|have been|"
         r"say|include|mention|use)\b"),
        (Means.CONTENT, r"the (?:right|correct|real|actual) (?:answer|name|word|number|one|date|spelling) (?:is|"
         r"was|would be)\b"),
        (Means.CONTENT, r"i (?:meant|mean|was asking about|asked about|asked for|asked how|asked why|asked what)\b.+"),
        (Means.CONTENT, r"you (?:forgot|missed|left out|should have|should(?:n'?t| not)? (?:have|mention|include|"
         r"say|add)|did(?:n'?t| not) (?:mention|include|say|add)|"
         r"confused|mixed up|got the)\b"),
        (Means.CONTENT, r"(?:also |and )?(?:add|include|mention|leave out|remove|replace|correct|fix|change|"
         r"drop) (?:a |an |the |some |that |in |it |your |this |more )"),
        (Means.CONTENT, r"(?:give|show) (?:me |us )?(?:an |another |some |more |"
         r"one more )?examples?(?: (?:of (?:that|this|it)|too|as well))?$"),
        (Means.CONTENT, r"(?:with|and) (?:an example|examples)$"),
        (Means.CONTENT, r"(?:be|focus|concentrate) (?:on|about) .+"),
        # ------------------------------------------------------------------------------------------- not good, no more
        (Means.COMPLAINT, r"(?:no,? |nope,? |sorry,? |but |hmm,? |still |i think |i'?m afraid )*(?:(?:that|this|it|"
         r"the answer|your answer|your reply|which)"
         r"(?:'s|’s| is| was| sounds| seems| looks)(?: still| just| simply| completely| totally| all| plain| quite|"
         r" a)* )?"
         r"(?:wrong|incorrect|false|not (?:right|true|correct|helpful|useful|good|accurate|enough|what i (?:asked|"
         r"wanted|meant|said|need(?:ed)?))\b.*|"
         r"nonsense|useless|unhelpful|terrible|bad(?: answer)?|awful|rubbish|garbage|off[- ]topic|irrelevant|"
         r"confusing|unclear|inaccurate|"
         r"mistake|misleading|outdated|lie)(?: answer)?(?: again)?$"),
        (Means.COMPLAINT, r"(?:no,? |but |sorry,? )*you (?:did(?:n'?t| not) (?:answer|understand|listen|read|do)|"
         r"misunderstood|are wrong|'?re wrong|got (?:it|that) wrong|"
         r"made (?:a mistake|that up|an error)|ignored|keep \w+ing|already said|are (?:not|repeating)|'?re (?:not|"
         r"repeating))\b"),
        (Means.COMPLAINT, r"(?:but )?(?:that|this|it) (?:does(?:n'?t| not)|did(?:n'?t| not)) (?:answer|help|"
         r"make (?:any )?sense|work|compile|run|address)\b"),
        (Means.COMPLAINT, r"i (?:don'?t|do not|didn'?t|did not) (?:understand(?: (?:that|this|it|your answer|"
         r"a word|anything|you))?|get (?:it|that)|like (?:that|this|it|the answer|your answer)|"
         r"follow|believe (?:that|you))$"),
        (Means.COMPLAINT, r"(?:try|do it|answer|once|say (?:it|that)|please try|do that) (?:again|once more|over)\b"),
        (Means.COMPLAINT, r"(?:no|nope|wrong|incorrect|false|huh|what|bad|not really|not quite|meh|boring|ugh|"
         r"really|are you (?:sure|serious|kidding))$"),
        (Means.COMPLAINT, r"that(?:'s| is| was) not\b.*(?:question|asked|wanted|meant|answer)"),
        # ------------------------------------------------------------------------------------------------------ good
        (Means.PRAISE, r"(?:(?:that|this|it|which)(?:'s| is| was|s) )?(?:really |very |so |much |just |exactly |"
         r"quite |absolutely |a |an )*(?:perfect|great|excellent|wonderful|"
         r"awesome|amazing|brilliant|good|nice|helpful|useful|better|fantastic|lovely|correct|right|well done|"
         r"good job|nice one|cool|clear|what i (?:needed|wanted|was looking for))"
         r"(?: (?:answer|explanation|job|work|one|summary|example|now|and .+|thanks|thank you|indeed))*$"),
        (Means.PRAISE, r"(?:exactly|bravo|yes,? (?:exactly|perfect|that'?s (?:it|right)|much better)|that helps|"
         r"this helps|that works|it works|i (?:love|like) (?:it|that|this)|"
         r"you(?:'re| are) (?:right|great|the best)|makes sense|that makes sense|now i (?:understand|get it|see)|"
         r"i (?:see|understand) now)\b"),
        (Means.THANKS, r"(?:ok(?:ay)?,? |great,? |perfect,? |cool,? |nice,? |no,? |yes,? )*(?:thanks|thank you|thx|"
         r"cheers|much appreciated|ty)\b(?: (?:so much|a lot|very much|again|"
         r"for .+|you|that .+))?$"),
        (Means.FILLER, r"(?:ok(?:ay)?|hmm+|well|hi|hello|hey|oh|ah|i see|sure|yes|yeah|right then|so|please|sorry|"
         r"got it|understood|alright|come on|interesting)$"),
    ]
]  # fmt: skip

SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+|\n+")
POLITE = re.compile(
    r"^(?:(?:please|pls|kindly|ok(?:ay)?|hmm+|well|hey|oh|but|and|so|now|sorry|just)[,:]?\s+|"
    r"(?:thanks|thank you)[,:]\s+|"
    r"(?:can|could|would|will) you (?:please |just |maybe |also )*|i(?:'d| would) like you to |i want you to |"
    r"(?:would|could) it be |you (?:should|must|need to) )+",
    re.I,
)
TASK = re.compile(r"^(?:answer|reply)[^.]*:\s*\S", re.I)  # "Please answer: what is tea?"
ASKS = re.compile(
    r"^(?:what|who|whom|whose|when|where|why|how|which|is|are|was|were|do|does|did|has|have|should)\b", re.I
)


def read(text: str, question: str) -> Reading:
    """What `text`, the message after an answer to `question`, says about that answer.

    >>> read("Too long. Please answer in one short sentence.", "What is tea?").standing
    'Please answer in one short sentence.'
    """
    if same_question(text, question):
        return Reading(-1, reason="the question was asked again")
    parts = [(part, meaning(part)) for part in split(text)]
    found = {means for _, means in parts}
    if Means.TAKE_BACK in found:
        return Reading(None, takes_back=True, reason="takes back what was asked before")
    told = [part for part, means in parts if means in (Means.MANNER, Means.CONTENT)]
    manner = [part for part, means in parts if means is Means.MANNER]
    about = [part for part, means in parts if means in (Means.COMPLAINT, Means.MANNER, Means.CONTENT)]
    standing = normalise(_instructions(manner)) if manner else None
    if told and Means.OTHER in found and not _complains(parts):
        return Reading(None, standing=standing, related=False, reason="an instruction for a new question")
    if about:
        hint = " ".join(about) if told else None
        return Reading(-1, hint, standing, reason="told how to do better" if told else "a complaint without a hint")
    if Means.PRAISE in found:
        return Reading(1, reason="praised")
    if Means.THANKS in found and Means.OTHER not in found:
        return Reading(1, reason="thanked")
    return Reading(None, related=False, reason="a matter of its own" if Means.OTHER in found else "says nothing of it")


def meaning(sentence: str) -> Means:
    """The first row of MEANINGS that fits; a question is one of its own unless it asks for another answer."""
    plain = sentence.translate(str.maketrans("’‘“”", "''\"\"")).strip()
    core = POLITE.sub("", plain).rstrip(" .!?…")
    core = re.sub(r",? (?:please|pls|thanks|thank you|ok|okay)$", "", core, flags=re.I)
    asked = plain.endswith("?")
    if TASK.match(core) or (asked and ASKS.match(core) and not re.match(r"(?:what|really|are you sure)$", core, re.I)):
        return Means.OTHER
    if asked and not POLITE.match(plain) and len(core.split()) > 4:
        return Means.OTHER
    return next((means for means, pattern in MEANINGS if pattern.match(core)), Means.OTHER)


def split(text: str) -> list[str]:
    """Sentences and lines of a message; a quotation, and what goes on in lower case behind one, is not torn apart."""
    parts: list[str] = []
    for piece in SENTENCE.split(text.strip()):
        last = parts[-1] if parts else ""
        quoting = sum(map(last.count, '"“”')) % 2 == 1
        if quoting or (last.endswith(('"', "”")) and piece[:1].islower()):
            parts[-1] = f"{last} {piece}"
        elif piece.strip():
            parts.append(piece.strip())
    return parts


def same_question(text: str, question: str) -> bool:
    """True where a message repeats the question: four in five of the words are the same, and three at least."""
    a, b = (set(re.findall(r"\w+", t.lower())) for t in (text, question))
    return len(a & b) >= 3 and len(a & b) >= 0.8 * len(a | b)


def normalise(text: str) -> str:
    """One spelling for one instruction: single spaces, a capital letter, a full stop."""
    text = re.sub(r"^(?:can|could|would|will) you (.*?)\?$", r"\1", " ".join(text.split()), flags=re.I)
    return text[:1].upper() + text[1:] + ("" if text[-1:] in ".!?\"'" else ".")


def _instructions(manner: list[str]) -> str:
    """The sentences that instruct; a bare "Too long." only where there is no other."""
    bare = re.compile(r"(?i)(?:\w+ ){0,4}(?:too|so) \w+")
    return " ".join([part for part in manner if not bare.match(part)] or manner)


def _complains(parts: list[tuple[str, Means]]) -> bool:
    """True where the message finds fault before it goes on."""
    return any(
        means in (Means.COMPLAINT, Means.CONTENT) or (means is Means.MANNER and re.search(r"(?i)\b(?:too|so) ", part))
        for part, means in parts
    )
