"""Someone who speaks of hurting themselves gets help lines instead of a small model's advice.

Only the first person counts, and the last message: a question about the subject, a novel, a friend
or an idiom is answered as any other. English only; further phrases can be given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

HELP = (
    "It sounds as if you are going through something very painful, and I am not able to help with"
    " it as a person could. Please talk to someone now: in an emergency call your local number"
    " (112 in Europe, 911 in North America, 999 in the UK). In the US and Canada, call or text 988;"
    " in the UK and Ireland, call 116 123; elsewhere, https://findahelpline.com lists free and"
    " confidential lines by country. If you can, tell a person near you how you feel."
)
READ_CHARS = 8_000  # of a message, its end

_SELF_DEED = (
    r"(?:kill(?:ing)?|hurt(?:ing)?|harm(?:ing)?|cut(?:ting)?|hang(?:ing)?|shoot(?:ing)?"
    r"|drown(?:ing)?|starv(?:e|ing)|burn(?:ing)?|poison(?:ing)?) myself"
    r"|self[ -]?harm(?:ing)?\b|end(?:ing)? (?:my (?:own )?life|it all|things for good)"
    r"|tak(?:e|ing) my (?:own )?life|commit(?:ting)? suicide|(?:be|being) dead|overdos(?:e|ing)"
    r"|jump(?:ing)? (?:off|from) (?:a|the|this|my) (?:bridge|roof|building|balcony|cliff)"
    r"|die\b(?! (?:of|from|for|laughing))|dying\b(?! (?:to|for|of|from|laughing))"
    r"|not (?:exist|be here|wake up)"
    r"|stop (?:existing|living)|disappear(?:ing)? forever|suicide"
)
_INTENT = (
    r"(?:want(?:ed)?(?: so badly)? to|wanna|going to|gonna|plan(?:ning)?(?: to| on)|about to"
    r"|ready to|decided to|trying to|tried to|need to|have to|urges? to|tempted to|wish(?:ing)? to"
    r"|will|i'll|let me|thinking (?:about|of)|thoughts? (?:about|of)|think(?: a lot)? (?:about|of)"
    r"|dream(?:ing)? (?:about|of)|considering|feel like|keep|started|help me"
    r"|how (?:do|can|could|to) i?)"
)
_FIRST = r"\b(?:i|i'm|im|i've|ive|i'd|my|me)\b"
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_FIRST}[^.!?\n]{{0,60}}\b{_INTENT} (?:\w+ ){{0,3}}?(?:{_SELF_DEED})",
        r"\b(?:suicide|suicidal)\b[^.!?\n]{0,20}\b(?:and i|i am|i'm|i feel|my)\b",
        rf"{_FIRST}[^.!?\n]{{0,40}}\b(?:feel(?:ing)?|am|been|so|very|really|i'm|im)"
        r" (?:\w+ ){0,2}suicidal\b",
        r"\bi (?:just |really |only )?(?:do not|don't|dont|no longer) (?:want to|wanna)"
        r" (?:live|be alive|exist|wake up|be here|go on)\b(?! in\b| near\b| with\b| at\b)",
        r"\bi (?:just |really )?wish i (?:was|were|would be) (?:dead|never born|gone)\b",
        r"\bi (?:just |really )?wish i (?:had never been born"
        r"|(?:would not|wouldn't|didn't) (?:wake up|exist))",
        r"\b(?:better off|happier) (?:if i (?:was|were|am) (?:dead|gone)|without me|dead)\b",
        r"\bno (?:reason|point|sense) (?:for me to|to|in|left to)(?: keep| go on)?"
        r" ?(?:liv(?:e|ing)|go on|being alive)\b",
        r"\b(?:i can't|i cannot|i cant) (?:go on|live|do life)(?: like this)?"
        r"(?: any ?more| any longer)\b",
        r"\b(?:nobody|no one|noone) would (?:miss|care|notice)[^.!?\n]{0,30}"
        r"\bi (?:died|was gone|were gone|was dead|were dead|disappeared|killed)",
        r"\bmy (?:own )?(?:suicide|goodbye) (?:note|letter|plan)\b",
        r"\b(?:painless(?:ly)?|quick(?:est)?|easiest|best|fastest|peaceful) (?:way|method|means)s?"
        r" (?:for me )?(?:to|of) (?:die|dying|kill(?:ing)? myself|commit(?:ting)? suicide"
        r"|end(?:ing)? (?:it|my life))",
        r"\bhow many (?:\w+ ){0,4}(?:would|do i|should i|does it|will)[^.!?\n]{0,30}"
        r"\b(?:to die|kill me|to overdose|to never wake)",
        r"\bi (?:have )?(?:cut|burn(?:ed|t)?|hurt) myself"
        r" (?:again|on purpose|every|to (?:feel|cope))",
    )
)
# Said in jest, or of something else: taken out before the patterns look.
_IDIOMS = re.compile(
    r"\bkill(?:ing)? myself (?:laughing|with laughter)"
    r"|\b(?:die|dying) (?:of|from) (?:laughter|laughing|embarrassment"
    r"|boredom|curiosity|hunger|thirst|heat)|\bdying to\b|\bto die for\b"
    r"|\b(?:die|dying) (?:in|at) (?:the |a |this )?(?:game|level|dungeon|boss|minecraft|match)\w*"
    r"|\bkeep (?:dying|killing myself) (?:in|at|on|to|with)\b"
    r"|\bcut(?:ting)? myself (?:shaving|while|when|on|off|some|a |out)"
    r"|\b(?:hurt(?:ing)?|burn(?:ing)?) myself"
    r" (?:while|when|playing|at|in|on (?:the|a)|by accident|lifting|running|cooking)"
    r"|\bsuicide (?:squad|burns?|prevention|bomb\w*|drill|rates?|hotline|awareness)"
)


def is_distress(message: str, phrases: Sequence[str] = ()) -> bool:
    """Whether the speaker seems to be in danger from themselves."""
    text = message[-READ_CHARS:].casefold().replace("\u2019", "'")
    text = _IDIOMS.sub(" ", re.sub(r"[ \t]+", " ", text))
    return any(p.search(text) for p in _PATTERNS) or any(p.casefold() in text for p in phrases)
