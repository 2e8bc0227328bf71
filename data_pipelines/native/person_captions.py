"""Captions of a person, with `<p>` where the person is named: "a young man smiles" -> "<p> smiles".

Only the first person of a caption is rewritten, and groups ("two women", "men") are not.
"""

import re

from data_pipelines.native.tables import text_of

PLACEHOLDER = "<p>"
_STAND_IN = "\ue000"  # of Unicode's private use


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A person, by what one is called.
_PEOPLE = _words("""
    man woman person boy girl guy lady gentleman male female adult child kid baby toddler
    infant teen teenager adolescent youth individual human dude lad lass senior elder
    businessman businesswoman sportsman sportswoman policeman policewoman fireman cameraman
    salesman chairman spokesman cowboy bride groom grandmother grandfather mother father
""")
# A person, by what one does.
_ROLES = _words("""
    actor actress singer model musician politician athlete player footballer celebrity artist
    author writer director dancer doctor nurse worker soldier officer student teacher chef
    cook comedian driver rapper guitarist drummer skier surfer skateboarder snowboarder
    cyclist runner swimmer boxer wrestler golfer coach journalist presenter host scientist
    engineer farmer fisherman pilot lawyer judge king queen prince princess president minister
    senator
""")
_DETERMINERS = _words("""
    a an the this that one another some
""")
# What stands before a noun without a determiner, as in "portrait of young woman".
_ADJECTIVES = _words("""
    young old older elderly middle-aged adult little small tall short big beautiful handsome
    pretty attractive happy sad angry serious bald blonde blond brunette redhead asian african
    european american caucasian black white indian chinese japanese korean latin hispanic arab
    famous professional pregnant shirtless bearded muscular slim senior teenage male female
    pop rock country film football tennis
""")
# These end what belongs to a noun: "a picture of a man" is no kind of man.
_STOPS = _words("""
    of in on at with without by for from to and or as is are was were be been has have had who
    whose which that's while near behind beside next over under between against into onto
    about like than not no his her their its my our your he she they it where when than two
    three four five six seven several many group image picture photo photograph painting
    portrait drawing showing depicting featuring
""")
_PLURAL_BEFORE = _words("""
    two three four five six seven eight several many few these
""")
_WORD = re.compile(r"[^\W_]+(?:[-'\u2019][^\W_]+)*|[^\w\s]", re.UNICODE)
_POSSESSIVE = re.compile(r"['\u2019]s?$")
_MAX_MODIFIERS = 5


def rewrite(caption: str, *, name: str = "") -> str:
    """The caption with `<p>` for its first person; one that names none begins with "<p>, ".

    `name` is the person's, if it is known: it is what is rewritten where it stands. An empty
    caption stays empty.
    """
    # It looks like HTML's tag of a paragraph, and is taken for one where that is closed.
    if PLACEHOLDER in caption and "</p>" not in caption:
        return text_of(caption.replace(PLACEHOLDER, _STAND_IN)).replace(_STAND_IN, PLACEHOLDER)
    caption = text_of(caption)
    if not caption:
        return ""
    if name and (found := _by_name(caption, name)):
        return found
    words = list(_WORD.finditer(caption))
    lowered = [word[0].lower() for word in words]
    for k, word in enumerate(lowered):
        noun = _POSSESSIVE.sub("", word)
        if noun in _PEOPLE or noun in _ROLES:
            span = _noun_phrase(lowered, k, is_role=noun in _ROLES)
            if span is not None:
                return _replaced(caption, words, *span)
    for k, word in enumerate(lowered):
        if word in ("he", "she"):
            return _replaced(caption, words, k, k)
    return f"{PLACEHOLDER}, {caption}"


def _by_name(caption: str, name: str) -> str:
    """The caption with `<p>` for a name, of which spaces may be underscores; "" without it."""
    spaced = r"[\s_]+".join(map(re.escape, re.split(r"[\s_]+", name.strip())))
    if not re.search(r"[^\W\d_]{2}", name):  # a number or an initial is no name
        return ""
    pattern = re.compile(rf"(?<!\w){spaced}(?!\w)", re.IGNORECASE)
    if not (match := pattern.search(caption)):
        return ""
    return caption[: match.start()] + PLACEHOLDER + caption[match.end() :]


def _noun_phrase(words: list[str], k: int, *, is_role: bool) -> tuple[int, int] | None:
    """From which to which word a person is named, whose noun is word k; None if it is no person."""
    last = k
    # "a woman doctor", "a baby boy": the last noun is the person.
    while (
        last + 1 < len(words)
        and not _POSSESSIVE.search(words[last])
        and _POSSESSIVE.sub("", words[last + 1]) in _PEOPLE | _ROLES
    ):
        last += 1
    first = k
    while first > 0 and k - first < _MAX_MODIFIERS:
        before = words[first - 1]
        if before in _DETERMINERS:
            # One of a group, as in "one of the men", has no noun of one person.
            return first - 1, last
        if before in _PLURAL_BEFORE:
            return None
        if before in _STOPS or not before[0].isalnum() or _POSSESSIVE.search(before):
            break
        first -= 1
    # Without a determiner only what is known to describe a person belongs to the noun.
    first = k
    while first > 0 and _describes(words[first - 1]):
        first -= 1
    before = words[first - 1] if first else ""
    begins = not before or not before[0].isalpha() or before in _STOPS or before == "portrait"
    if is_role and not begins:  # "film director" may be said of a festival
        return None
    return (first, last) if begins else None


def _describes(word: str) -> bool:
    return word in _ADJECTIVES or word.endswith(
        ("-haired", "-eyed", "-skinned", "-old", "-dressed")
    )


def _replaced(caption: str, words: list[re.Match], first: int, last: int) -> str:
    """The caption with `<p>` for its words `first` to `last`; 's of the last one stays."""
    owner = _POSSESSIVE.search(words[last][0])
    end = words[last].end() - (len(owner[0]) if owner else 0)
    return caption[: words[first].start()] + PLACEHOLDER + caption[end:]
