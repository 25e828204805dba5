"""Names of customers that are spelled in more than one way."""

import difflib
import itertools
import re
import unicodedata

_LETTERS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa", "æ": "ae"})
_LEGAL_FORMS = re.compile(
    r"株式会社|\(株\)|\b(?:ab|ag|as|co|corp|corporation|gmbh|inc|kg|llc|ltd|ltda|plc|pty|sa)\b"
)


def near_duplicates(names: list[str], cutoff: float = 0.85) -> list[tuple[str, str, float]]:
    """Pairs of names that may mean one customer, with their similarity (0 to 1), closest first.

    Case, accents, punctuation, full width and legal forms make no difference. Names are compared
    with those that begin with the same letter; with all, time would grow with the square.
    """
    keys = sorted((_key(name), name) for name in set(names))
    pairs = []
    for _, group in itertools.groupby(keys, lambda pair: pair[0][:1]):
        for (key, name), (other_key, other) in itertools.combinations(group, 2):
            matcher = difflib.SequenceMatcher(None, key, other_key, autojunk=False)
            if matcher.quick_ratio() >= cutoff and (similarity := matcher.ratio()) >= cutoff:
                pairs.append((name, other, similarity))
    return sorted(pairs, key=lambda pair: -pair[2])


def _key(name: str) -> str:
    """What the spellings of one name have in common."""
    text = unicodedata.normalize("NFKC", name).casefold().translate(_LETTERS)
    text = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
    bare = _LEGAL_FORMS.sub(" ", unicodedata.normalize("NFC", text).replace(".", ""))
    return " ".join(re.findall(r"\w+", bare)) or text
