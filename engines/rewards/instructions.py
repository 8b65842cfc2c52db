"""IFEval's verifiable instructions: whether an answer follows one, by its id and arguments.

Ids, arguments and meaning are those of the benchmark (arXiv:2311.07911, table 4), so that its data can
be used as it is; nothing here needs a model or a word list. Where the original asks a library, verdicts
can differ at the edges: where sentences end, what a word in capitals is, and whether text in one case
is English, which is not looked at. ``language:response_language`` is refused: it needs a detector.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+[\"'”’)\]*_]*(?=\s|$)|\n\s*\n")
_TITLE = re.compile(r"\b(?:mr|mrs|ms|dr|prof|st|vs|fig|[a-z](?:\.[a-z])*)\.$", re.IGNORECASE)
_SHORTENED = re.compile(r"\b(?:etc|approx|jr|sr|inc|ltd|co|al)\.$", re.IGNORECASE)
_LONGEST_ABBREVIATION = 20
_WORD_WITH_INNER_MARKS = re.compile(r"\w+(?:[-.'’]\w+)*")
_EMPHASIS = re.compile(r"\*([^*\n]*)\*")
_STRONG = re.compile(r"\*\*([^*\n]*)\*\*")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def follows(instruction: str, arguments: Mapping[str, Any], text: str) -> bool:
    """Whether ``text`` follows the instruction; a blank text follows none.

    Arguments that are None are as if not given: tables of the benchmark name all arguments in each
    row. Raises ValueError for an unknown id, and for arguments that are missing or not its own.
    """
    check = CHECKS.get(instruction)
    if check is None:
        raise ValueError(_unknown(instruction))
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        inspect.signature(check).bind(text, **given)
    except TypeError as error:
        takes = ", ".join(list(inspect.signature(check).parameters)[1:]) or "no arguments"
        raise ValueError(f"instruction {instruction!r}: {error}; it takes {takes}") from None
    return bool(text.strip()) and check(text, **given)


def sentences(text: str) -> int:
    """How many sentences a text has: they end by ``.``, ``!``, ``?`` or an empty line.

    Not after titles and initials, nor after ``etc.`` and the like where a small letter follows, nor
    within numbers and names (``3.5``, ``a.b``).
    """
    start = count = 0
    for end in _SENTENCE_END.finditer(text):
        if _is_abbreviated(text, start, end.end()):
            continue
        count += _has_word(text[start : end.end()])
        start = end.end()
    return count + _has_word(text[start:])


def _is_abbreviated(text: str, start: int, end: int) -> bool:
    """Whether what stands before ``end`` is an abbreviation within a sentence."""
    rest = text[end : end + 2].lstrip()
    before = text[max(start, end - _LONGEST_ABBREVIATION) : end]
    if not rest:
        return False
    return bool(_TITLE.search(before) or (rest.islower() and _SHORTENED.search(before)))


def _has_word(text: str) -> bool:
    return re.search(r"\w", text) is not None


def _holds(count: int, relation: str, bound: float) -> bool:
    if relation == "at least":
        return count >= bound
    if relation == "less than":
        return count < bound
    raise ValueError(f"relation {relation!r}; give 'at least' or 'less than'")


def _existence(text: str, keywords: Sequence[str]) -> bool:
    return all(keyword.lower() in text.lower() for keyword in keywords)


def _frequency(text: str, keyword: str, frequency: float, relation: str) -> bool:
    return _holds(text.lower().count(keyword.strip().lower()), relation, frequency)


def _forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(
        re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words
    )


def _letter_frequency(text: str, letter: str, let_frequency: float, let_relation: str) -> bool:
    return _holds(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _number_sentences(text: str, num_sentences: float, relation: str) -> bool:
    return _holds(sentences(text), relation, num_sentences)


def _number_words(text: str, num_words: float, relation: str) -> bool:
    return _holds(len(re.findall(r"\w+", text)), relation, num_words)


def _number_paragraphs(text: str, num_paragraphs: float) -> bool:
    """Paragraphs are parted by ``***``; only the first and the last may be blank."""
    found = [part.strip() for part in text.split("***")]
    if not all(found[1:-1]):
        return False
    return sum(map(bool, found)) == num_paragraphs


def _first_word(text: str, num_paragraphs: float, nth_paragraph: float, first_word: str) -> bool:
    """Paragraphs are parted by an empty line; the n-th, from 1, begins with the word."""
    found = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(found) != num_paragraphs or not 1 <= nth_paragraph <= len(found):
        return False
    word = found[int(nth_paragraph) - 1].split()[0].lstrip("\"'")
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: float) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    """The marker begins a word somewhere; ``P.S.`` may be written with spaces after its stops."""
    marker = r"\.\s?".join(map(re.escape, postscript_marker.strip().split(".")))
    return re.search(rf"(?<!\w){marker}", text, re.IGNORECASE) is not None


def _bullets(text: str, num_bullets: float) -> bool:
    """Lines that begin with ``*`` (not ``**``) or ``-``; exactly so many."""
    return len(re.findall(r"^[^\S\n]*(?:\*(?!\*)|-)", text, re.MULTILINE)) == num_bullets


def _constrained_response(text: str) -> bool:
    return any(answer in text for answer in _ANSWERS)


def _highlights(text: str, num_highlights: float) -> bool:
    """``*...*`` and ``**...**`` that are not blank, paired from the left as IFEval does."""
    found = [*_EMPHASIS.findall(text), *_STRONG.findall(text)]
    return sum(bool(part.strip()) for part in found) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: float) -> bool:
    """Sections have a heading of the given word and a number, e.g. ``Section 1``."""
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


def _json_format(text: str) -> bool:
    """All of it is JSON, in a Markdown fence or not."""
    whole = text.strip()
    if whole.startswith("```"):
        whole = whole[3:].removesuffix("```")
        whole = whole[4:] if whole[:4].lower() == "json" else whole
    try:
        json.loads(whole)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    """A line holds ``<<...>>`` that is not blank."""
    lines = [line.partition("<<")[2].rpartition(">>")[0] for line in text.split("\n")]
    return any(line.strip("<> ") for line in lines)


def _two_responses(text: str) -> bool:
    """Two different answers, parted by ``******``."""
    found = [part.strip() for part in text.split("******")]
    whole = [part for part in found if part]
    return all(found[1:-1]) and len(whole) == 2 and whole[0] != whole[1]


def _repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    whole = text.strip()
    return len(whole) > 1 and whole[0] == whole[-1] == '"'


def _capital_words(text: str, capital_frequency: float, capital_relation: str) -> bool:
    found = [word for word in _WORD_WITH_INNER_MARKS.findall(text) if word.isupper()]
    return _holds(len(found), capital_relation, capital_frequency)


def _capital(text: str) -> bool:
    return text.isupper()


def _lowercase(text: str) -> bool:
    return text.islower()


def _no_comma(text: str) -> bool:
    return "," not in text


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_words": _number_words,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capital,
    "change_case:english_lowercase": _lowercase,
    "punctuation:no_comma": _no_comma,
}
"""IFEval's id -> its check; the names of its arguments are IFEval's."""


def _unknown(instruction: str) -> str:
    if instruction == "language:response_language":
        return (
            f"instruction {instruction!r} needs a language detector, which rollflow has not; "
            "leave such prompts out"
        )
    near = get_close_matches(instruction, CHECKS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(CHECKS)}"
    return f"instruction {instruction!r} is not known; {hint}"
