"""Words people type -> words the embedded model was trained with.

The embedded word head knows some dozens of concepts, and the embedded text encoder the phrases of its training captions: "melanoma" is to
both a row of letters. A vocabulary says that it is a skin lesion. It replaces words only: whether the thing is in the image is tested afterwards as ever.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, lru_cache
from pathlib import Path

from torch import Tensor

from zeroseg.errors import ZeroSegError

SHIPPED = Path(__file__).with_name("vocabulary.txt")
"""The concepts of the embedded backbone and terms for them."""
NEAREST = 3
"""So many known words are named where a word is not known."""

LEAST_ALIKE = 0.7
"""Least cosine of two phrases that are taken for each other. Of 21 unlisted names of known things 19 were taken for something, 17 for the right
one, and of 36 other words ("giraffe", "pancreas", "thyroid nodule") none."""
SHORTEST = 4
"""Letters of the shortest term that is compared by meaning: abbreviations such as PET are also other words."""

# What joins phrases in the training captions, "no" among them.
_JOINTS = re.compile(r"((?:\s*(?:[,;]|\b(?:with|and|in|of|on|no)\b)\s*)+)", re.IGNORECASE)
_ARTICLES = {"a", "an", "the"}
_SPELLING = {"tumor": "tumour", "tumors": "tumour"}


@dataclass(frozen=True)
class Meaning:
    """What a prompt is taken for.

    Attributes:
        text: words for the backbone, or None where none are known.
        replaced: whether they are other words than the prompt's.
        similarity: 1.0 for what the vocabulary holds, a cosine for what means nearly the same, 0.0 for what is not known.
        nearest: known words that look, or mean, most like an unknown prompt, the nearest first, with what each is taken for.
    """

    text: str | None
    replaced: bool = False
    similarity: float = 1.0
    nearest: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why words that are not known are called absent."""
        return f"the model was trained without these words; nearest it knows: {', '.join(self.nearest)}"

    def notes(self, text: str) -> list[str]:
        """A line for the reader, where other words took the place of ``text``."""
        return [f"{text!r} is taken for: {self.text} (similarity {self.similarity:.2f})"] if self.replaced else []

    def describe(self) -> dict:
        """What a manifest records."""
        if self.text is None:
            return {"nearest": list(self.nearest)}
        return {"taken_for": self.text, "similarity": self.similarity} if self.replaced else {}


class Vocabulary:
    """Concepts and the terms that stand for them.

    Args:
        targets: term -> concept, both as spelled in the file; a concept is its own target.
    """

    def __init__(self, targets: dict[str, str]):
        self.targets = targets
        self.concepts = tuple(dict.fromkeys(targets.values()))
        self._known = {normalise(term): concept for term, concept in targets.items()}
        self._vectors: Tensor | None = None
        self._words = {word for concept in self.concepts for word in normalise(concept).split()}

    def look_up(self, text: str, encoder: Callable[[Sequence[str]], Tensor] | None = None) -> Meaning:
        """What a prompt is taken for.

        A concept, and any phrase made only of words of concepts, stays as it is. A term is replaced; so are the terms of a phrase
        whose parts, between commas, "with", "and", "in", "of", "on" and "no", are all known. Anything else is taken for the term that
        means most alike, where an encoder is given and they are alike enough.

        Args:
            text: a prompt, not blank.
            encoder: phrases -> (n, D) vectors of length 1, see ``synonyms.SentenceEncoder``; always the same one.
        """
        key = normalise(text)
        concept = self._known.get(key)
        if concept is not None:
            same = _spelled(text) == _spelled(concept)
            return Meaning(text.strip() if same else concept, not same)
        # Capital letters and commas are nothing to the backbone's tokenizer, which was trained with both kinds of caption.
        parts = _JOINTS.split(text.strip())
        pieces = [part if _JOINTS.fullmatch(part) or not part.strip() else self._piece(part) for part in parts]
        if key and None in pieces and encoder is not None:
            return self._alike(text, encoder)
        if not key or None in pieces:
            return Meaning(None, similarity=0.0, nearest=self._nearest(key))
        meant = "".join(piece for piece in pieces if piece is not None)
        replaced = _spelled(meant) != _spelled(text)
        return Meaning(meant if replaced else text.strip(), replaced)

    def _piece(self, text: str) -> str | None:
        key = normalise(text)
        if key in self._known:
            concept = self._known[key]
            return text if _spelled(text) == _spelled(concept) else concept
        return text if all(word in self._words for word in key.split()) else None

    def things(self, text: str) -> tuple[tuple[str, ...], ...]:
        """The concepts that known words ask for, as ``look_up`` gives them.

        Of "chest x-ray with lungs, no heart" the first two parts; what is said not to be there is not asked for. A part that is no
        concept, such as "cell", stands for all whose names hold its words.

        Returns:
            of each part the concepts it may be.
        """
        asked, wanted = [], True
        for part in _JOINTS.split(text.strip()):
            if _JOINTS.fullmatch(part):
                wanted = not re.search(r"\bno\b", part, re.IGNORECASE)
                continue
            key = normalise(part)
            if not key or not wanted:
                continue
            concept = self._known.get(key)
            words = set(key.split())
            asked.append(
                (concept,)
                if concept is not None
                else tuple(c for c in self.concepts if words <= set(normalise(c).split()))
            )
        return tuple(asked)

    def _alike(self, text: str, encoder: Callable[[Sequence[str]], Tensor]) -> Meaning:
        terms = [term for term in self.targets if len(normalise(term)) >= SHORTEST]
        if self._vectors is None:
            self._vectors = encoder(terms)
        cosines = (self._vectors @ encoder([text])[0]).tolist()
        best: dict[str, tuple[float, str]] = {}
        for cosine, term in sorted(zip(cosines, terms, strict=True), reverse=True):
            best.setdefault(self.targets[term], (cosine, term))
        (concept, (most, _)), *_ = best.items()
        if most >= LEAST_ALIKE:
            return Meaning(concept, True, round(most, 2))
        return Meaning(None, similarity=0.0, nearest=self._named(best))

    def _named(self, best: dict[str, tuple[float, str]]) -> tuple[str, ...]:
        """The terms of the nearest concepts, with what each stands for."""
        first = list(best.items())[:NEAREST]
        return tuple(term if term == concept else f"{term} ({concept})" for concept, (_, term) in first)

    def _nearest(self, key: str) -> tuple[str, ...]:
        """One term for each of the nearest concepts."""
        words = set(key.split())
        scored: dict[str, tuple[float, str]] = {}
        for term, concept in self.targets.items():
            known = normalise(term)
            shared = len(words & set(known.split())) / max(1, len(words | set(known.split())))
            score = max(shared, SequenceMatcher(None, key, known, autojunk=False).ratio())
            if score > scored.get(concept, (-1.0, ""))[0]:
                scored[concept] = score, term
        return self._named(dict(sorted(scored.items(), key=lambda item: -item[1][0])))


def normalise(text: str) -> str:
    """One spelling for one meaning: small letters, British tumour, no articles, no punctuation, singular."""
    words = re.sub(r"[^\w&]+|_", " ", text.casefold()).split()
    return " ".join(_singular(_SPELLING.get(word, word)) for word in words if word not in _ARTICLES)


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    plural = word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is"))
    return word[:-1] if plural else word


def _spelled(text: str) -> str:
    """A text as the backbone's tokenizer sees it: without capitals and with single blanks."""
    return " ".join(text.casefold().split())


def read_vocabulary(path: str | Path | None = None) -> Vocabulary:
    """The shipped vocabulary, with the terms of a file of one's own over it.

    The file has lines ``concept: term, term, ...``; ``#`` begins a line of comment. What stands before the colon is a concept of the
    shipped file, or a term of either file.

    Args:
        path: the file, or None.

    Raises:
        ZeroSegError: it cannot be read or is not UTF-8, a line is malformed, a term stands twice or is a concept itself, terms stand for
            each other in a circle, or a line leads to no known concept; one line that names file and line.
    """
    if path is None:
        return _shipped()
    try:
        stat = Path(path).stat()
    except (OSError, ValueError):
        # Reading it says what is wrong.
        return _extended(Path(path), (0, 0))
    return _extended(Path(path), (stat.st_mtime_ns, stat.st_size))


@cache
def _shipped() -> Vocabulary:
    lines = list(_lines(SHIPPED))
    targets = {concept: concept for _, concept, _ in lines}
    for number, concept, terms in lines:
        for term in terms:
            if term in targets:
                raise ZeroSegError(f"vocabulary {SHIPPED.name}, line {number}: {term!r} stands there twice")
            targets[term] = concept
    return Vocabulary(targets)


@lru_cache(8)
def _extended(path: Path, stamp: tuple[int, int]) -> Vocabulary:
    """A file's vocabulary as it was when it had that stamp; kept, with the sentence encoder's vectors of its terms."""
    shipped = _shipped()
    where = f"vocabulary {path.name}, line"
    concepts = {normalise(concept): concept for concept in shipped.concepts}
    own: dict[str, tuple[int, str, str]] = {}
    for number, target, terms in _lines(path):
        for term in terms:
            key = normalise(term)
            if key in concepts:
                raise ZeroSegError(f"{where} {number}: {term!r} is a concept itself and stands for nothing else")
            if key in own:
                raise ZeroSegError(f"{where} {number}: {term!r} stands there twice, first in line {own[key][0]}")
            own[key] = number, term, target
    by_key = {normalise(term): concept for term, concept in shipped.targets.items()}

    def concept_of(key: str) -> str:
        passed = [key]
        while passed[-1] in own:
            number, _, target = own[passed[-1]]
            step = normalise(target)
            if step in passed:
                circle = " -> ".join([*passed[passed.index(step) :], step])
                raise ZeroSegError(f"{where} {number}: the terms stand for each other in a circle: {circle}")
            if step not in own and step not in by_key:
                hint = ", ".join(shipped._nearest(step))
                raise ZeroSegError(f"{where} {number}: {target!r} is no known concept; nearest: {hint}")
            passed.append(step)
        return by_key[passed[-1]]

    kept = {term: concept for term, concept in shipped.targets.items() if normalise(term) not in own}
    return Vocabulary(kept | {term: concept_of(key) for key, (_, term, _) in own.items()})


def _lines(path: Path) -> Iterable[tuple[int, str, list[str]]]:
    """(line number, what stands before the colon, the terms) of a vocabulary file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ZeroSegError(f"the vocabulary {path.name} is not UTF-8 text: save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no such name is possible"
        raise ZeroSegError(f"cannot read the vocabulary {path.name}: {reason}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        concept, colon, rest = line.partition(":")
        terms = [term.strip() for term in rest.split(",")] if rest.strip() else []
        if not colon or not normalise(concept) or not all(normalise(term) for term in terms):
            raise ZeroSegError(f"vocabulary {path.name}, line {number}: write concept: term, term")
        yield number, concept.strip(), terms
