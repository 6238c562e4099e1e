"""The embedded default: text and tasks that need neither network nor files.

Held out whole are "description matching", "text selection" and "cloze", where what the held-in
tasks teach (find in the text what the question is about) can help a tiny model, and "state
tracking", where it should stay at chance. Every object falls into one split by the hash of its
text.
"""

import http
import re
import unicodedata
import zoneinfo
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from moekit.data import generators as g
from moekit.data.corruption import Corpus, Document
from moekit.data.embedded import Entry, entries, split_of
from moekit.data.tasks import Example, Task, Template, stable_random

SIZE = 1500  # objects of a real task before they are split
GENERATED = 5000  # of a generated one: fewer are learned by heart in the tour
ASKED = 250  # questions of a generated task in "valid" and "test" each
MIN_TEXT = 160  # characters of a document

# task: (cluster, ten wordings); {x} is what is asked about, {y} a second thing
_WORDINGS = {
    "addition": (
        "arithmetic",
        """What is {x}?|Calculate {x}.|{x} =|Add: {x}|Work out {x}.|Find the
        sum {x}.|How much is {x}?|Give the result of {x}.|The sum of {x} is|Compute {x}.""",
    ),
    "subtraction": (
        "arithmetic",
        """What is {x}?|Subtract: {x}|{x} =|Compute the difference
        {x}.|How much remains of {x}?|Evaluate {x}.|Work out {x}.|What does {x} give?|Find
        {x}.|The difference {x} is""",
    ),
    "word_problem": (
        "arithmetic",
        """{x} How many {y} are left?|{x} Count the {y} now.|{x} What
        number of {y} is that?|Solve: {x} How many {y}?|{x} How many {y} remain?|Story: {x} Number
        of {y} at the end?|{x} The {y} left over are|{x} Give the number of {y}.|Read this. {x} How
        many {y} now?|{x} Say how many {y} there are.""",
    ),
    "next_number": (
        "arithmetic",
        """Continue: {x}|What comes after {x}?|{x}, and then?|Which number
        follows {x}?|Complete the series {x}.|Find the next number: {x}|The series {x} goes on
        with|Next in line after {x}?|Extend {x} by one.|{x} ... what is next?""",
    ),
    "largest": (
        "comparison",
        """Which is the largest: {x}?|Pick the greatest of {x}.|Find the
        maximum of {x}.|{x}: which is most?|The biggest of {x} is|Name the highest number:
        {x}|Largest among {x}?|Of {x}, which is above the rest?|Choose the largest number. {x}|What
        is the top value in {x}?""",
    ),
    "parity": (
        "comparison",
        """Is {x} even or odd?|{x}: even or odd?|Tell the parity of {x}.|The
        number {x} is|Say if {x} is odd or even.|What parity has {x}?|Even or odd: {x}|Decide:
        {x} is even or odd.|Does {x} count as odd or even?|Classify {x} as even or odd.""",
    ),
    "divisible": (
        "comparison",
        """Is {x} divisible by {y}?|Does {y} divide {x}?|Can {x} be split
        into {y} equal parts?|Is {x} a multiple of {y}?|{x} / {y} leaves no rest?|Does {x} appear
        in the table of {y}?|Check: {y} divides {x}.|Is {y} a factor of {x}?|Will {x} over {y} be
        whole?|True division of {x} by {y}: whole?""",
    ),
    "boolean": (
        "logic",
        """Evaluate: {x}|{x} is|What is the value of {x}?|True or False: {x}|Decide
        {x}.|Give the truth value of {x}.|Simplify {x}.|The expression {x} gives|Is this true?
        {x}|Work out the logic: {x}""",
    ),
    "navigate": (
        "logic",
        """Facing one way: {x} Back at the start?|{x} Do you return?|Start here.
        {x} Are you where you began?|{x} Is that the starting point?|Walk: {x} Same place?|{x} Did
        you come back?|Follow this. {x} Home again?|{x} Do the moves cancel?|Moves: {x} Do you end
        at the start?|After this, are you back? {x}""",
    ),
    "longest_word": (
        "words",
        """Which word is longest: {x}?|Pick the longest of {x}.|The longest
        word in {x} is|{x}: which has most letters?|Find the word with most letters: {x}|Longest
        among {x}?|Name the longest. {x}|Of {x}, which word is longest?|Say the longest word here:
        {x}|Which has the greatest length: {x}?""",
    ),
    "last_word": (
        "words",
        """What is the last word: {x}|{x} - which word ends this?|Repeat the
        final word. {x}|The line "{x}" ends with|Give the last word of: {x}|Which word closes
        "{x}"?|Copy the word at the end: {x}|Find the final word in {x}|{x} Last word?|Say the word
        that comes last. {x}""",
    ),
    "first_word": (
        "words",
        """What is the first word: {x}|{x} - which word opens this?|Repeat the word at the start.
        {x}|The line "{x}" begins with|Give the first word of: {x}|Which word leads "{x}"?|Copy the
        word at the start: {x}|Find the opening word in {x}|{x} First word?|Say the word that comes
        first. {x}""",
    ),
    "word_after": (
        "words",
        """Which word follows {y}: {x}|{x} - what comes after {y}?|After {y} there is what? {x}|In
        "{x}", the word behind {y} is|Give the word right after {y}. {x}|{x} Next after {y}?|Find
        {y}, say the next word: {x}|What stands after {y} in {x}|Line: {x} Word following {y}?|Read
        on from {y}: {x}""",
    ),
    "repeated_word": (
        "words",
        """Which word occurs twice: {x}|Find the repeated word. {x}|{x} -
        what is said twice?|One word is there two times: {x}|The doubled word in "{x}" is|Spot the
        duplicate: {x}|What word repeats in {x}|{x} Which word comes again?|Name the word that
        appears twice. {x}|Find the word used two times: {x}""",
    ),
    "alphabetical": (
        "words",
        """Which comes first in the alphabet: {x}?|Sort {x}. Which is
        first?|First in a dictionary: {x}?|Of {x}, name the earliest by alphabet.|{x}: first in
        order?|Put {x} in order; say the first.|Alphabetically first among {x}?|Which leads a
        sorted list of {x}?|The first of {x} in ABC order is|Pick the one nearest to A: {x}""",
    ),
    "count_letter": (
        "words",
        """How many {y} are in "{x}"?|Count the letter {y}: {x}|{x} - number
        of {y}?|How often does {y} occur in {x}?|In "{x}", count {y}.|The letter {y} is in "{x}"
        how often?|Find the count of {y} in {x}.|Tally {y} in: {x}|Number of times {y} is in
        "{x}"|How many times is {y} written in {x}?""",
    ),
    "mentioned": (
        "matching",
        """Which word is in this line? {x}|{x} - which of these is said?|Find
        the word that occurs in: {x}|What word appears here? {x}|Line: {x}. Which word is in
        it?|Read: {x}. Which one was there?|{x} Choose the word from the line.|One of the words is
        in "{x}". Which?|Spot the word from this text: {x}|Which one is part of "{x}"?""",
    ),
    "text_word": (
        "matching",
        """Which word is in this text? {x}|{x} Which of these words was there?|Find a word of this
        text: {x}|Documentation: {x} Which word is in it?|{x} Name a word from it.|Which word does
        this use? {x}|Say a word that this has: {x}|Text: {x} One of its words?|{x} Choose the word
        from the text.|Spot a word of the sentence: {x}""",
    ),
    "owned": (
        "matching",
        """{x} What has {y}?|{x} {y} has the|Read: {x} What is with {y}?|{x} Name the thing of
        {y}.|Who has what? {x} And {y}?|{x} Which thing is {y}'s?|Look it up: {x} {y} has|{x} And
        {y}, what is there?|List: {x} Thing of {y}?|{x} Say what {y} has.""",
    ),
    "prefix": (
        "matching",
        """Which word starts with {x}?|Find the word beginning with {x}.|{x}...
        is the start of|Complete {x} to a word.|Word that opens with {x}?|What begins {x}-?|A word
        with the first letters {x} is|Pick the word whose start is {x}.|"{x}" are the first
        letters of|Start: {x}. Word?""",
    ),
    "suffix": (
        "matching",
        """Which word ends with {x}?|Find the word ending in {x}.|...{x} is the
        end of|What word finishes with {x}?|Word that closes with {x}?|A word with the last letters
        {x} is|Pick the word whose end is {x}.|"{x}" are the last letters of|End: {x}. Word?|What
        ends -{x}?""",
    ),
    "topic_title": (
        "reference",
        """Title of this text? {x}|{x} What is this about?|Name the topic:
        {x}|Which heading fits? {x}|This passage explains: {x} Its title?|{x} Choose a title.|Find
        the headline for: {x}|What would you call this section? {x}|Text: {x} Topic?|Under which
        title stands this? {x}""",
    ),
    "module_name": (
        "reference",
        """Which module says: {x}|{x} Name the module.|Module described as
        "{x}"?|What module is this? {x}|A module's text: {x} Which one?|Find the module: {x}|"{x}"
        describes the module|Name what is described: {x}|Guess the module. {x}|Documentation: {x}
        Module?""",
    ),
    "owner_package": (
        "reference",
        """Which package has {x}?|{x} belongs to|In what package is
        {x}?|Name the package of {x}.|Where does {x} live?|{x} is part of which package?|Find the
        home of {x}.|Which library offers {x}?|Package with {x}?|Who provides {x}?""",
    ),
    "http_status": (
        "codes",
        """What does HTTP {x} mean?|Status {x}?|Name the HTTP status {x}.|HTTP
        code {x} stands for|A server answers {x}. Meaning?|Explain status code {x}.|{x} in HTTP
        is|Give the phrase for HTTP {x}.|What phrase goes with {x}?|Web status {x}:""",
    ),
    "unicode_name": (
        "codes",
        """Which character is {x}?|Write {x}.|Show the sign called {x}.|{x}
        looks like|The symbol named {x} is|Give the character {x}.|Unicode {x}:|Draw {x}.|Sign for
        {x}?|What is written for {x}?""",
    ),
    "zone_region": (
        "codes",
        """In which region is the zone of {x}?|{x} lies in|Region of the time
        zone {x}?|Where is {x}?|The zone of {x} belongs to|Name the region of {x}.|Which part of
        the world is {x} in?|Place {x}: region?|Find the region for {x}.|Time zone of {x}: which
        region?""",
    ),
    "function_name": (
        "description matching",
        """Which function does this? {x}|{x} Name the
        function.|A function documented as "{x}" is called|What is the function that does this:
        {x}|Function for: {x}|"{x}" describes|Find the name. {x}|What would this be called? {x}|Doc:
        {x} Function name?|Pick the function described by: {x}""",
    ),
    "class_name": (
        "description matching",
        """Which class is this? {x}|{x} Name the class.|A class
        documented as "{x}" is called|What class fits: {x}|Class for: {x}|"{x}" describes the
        class|Find the class. {x}|How is this class called? {x}|Doc: {x} Class name?|Pick the class
        described by: {x}""",
    ),
    "phrase_with": (
        "text selection",
        """Which phrase has the word {x}?|Find the phrase with {x} in
        it.|{x} is part of which phrase?|Select the line containing {x}.|Where does {x} occur?|Which
        line says {x}?|Look for {x}. Which phrase?|The phrase with {x} is|Search {x}:|Pick the text
        that mentions {x}.""",
    ),
    "sentence_with": (
        "text selection",
        """Which sentence mentions {x}?|Find the sentence about {x}.|{x} is said in which
        sentence?|Select the sentence containing {x}.|Where is {x} mentioned?|Which line of
        documentation has {x}?|Look for {x}. Which sentence?|The sentence with {x} is|Search the
        text for {x}:|Pick the sentence that names {x}.""",
    ),
    "gap_word": (
        "cloze",
        """{x} What fills the gap?|Fill in ___: {x}|{x} The missing word is|Which word is left
        out? {x}|Text: {x} What stands for ___?|{x} Replace ___ by|Complete the text. {x}|What
        belongs at ___? {x}|Read: {x} The word at ___ is|Say the word that is missing. {x}""",
    ),
    "missing_item": (
        "cloze",
        """{x} What is missing the second time?|Two lists, one word lost: {x}|{x} Which word was
        left out?|Compare: {x} What is gone?|The lists {x} differ by|Find the absent word: {x}|{x}
        Name what was forgotten.|Which one is no longer there? {x}|Lost from the second list:
        {x}|{x} Which is not repeated?""",
    ),
    "spelled": (
        "words",
        """What word is spelled {x}?|Join the letters {x}.|{x} makes|Read {x} as
        a word.|Put together: {x}|Which word is {x}?|Letters {x} give the word|Spell out: {x}|Write
        {x} as one word.|Without dashes, {x} is""",
    ),
    "swaps": (
        "state tracking",
        """{x} What does {y} have?|{x} {y} now has the|Follow the swaps. {x}
        {y} has|{x} In the end, {y} holds the|Who has what? {x} And {y}?|Track: {x} What is with
        {y}?|{x} Name the thing of {y}.|After this, what has {y}? {x}|{x} Which thing is
        {y}'s?|Things move: {x} {y} ends with the""",
    ),
    "weekday": (
        "state tracking",
        """Today is {x}. What day is it in {y} days?|It is {x}; {y} days
        later it is|{y} days after {x}?|Add {y} days to {x}.|From {x}, go {y} days on: which
        day?|If now is {x}, name the day {y} days ahead.|{x} plus {y} days is|Count {y} days from
        {x}.|Which weekday follows {x} by {y} days?|In {y} days from {x} it will be""",
    ),
    "dyck": (
        "state tracking",
        """Close the brackets: {x}|{x} needs|Complete {x}|What closes
        {x}?|Finish the sequence {x}|Which brackets end {x}?|Balance {x} with|The rest of {x}
        is|Add what is missing: {x}|End {x} properly:""",
    ),
}
HELD_OUT = ("description matching", "text selection", "cloze", "state tracking")
_INVERTED = (
    Template("The answer is {answer}. Write a question for it.", "{x}"),
    Template("Make up a task whose answer is {answer}.", "{x}"),
    Template("{answer} - what could have been asked?", "{x}"),
)
Objects = list[tuple[str, Example]]  # with the key whose hash decides the split


def _example(name: str, key: str, fields: dict, answer: str, wrong: Sequence[str], **kw) -> Example:
    options = [answer, *wrong]
    stable_random(name, key, "options").shuffle(options)
    return Example(f"{name}/{key}", fields, answer, options=tuple(options), **kw)


def _generated(name: str, make: Callable) -> Objects:
    objects = {}
    for i in range(GENERATED):
        fields, answer, wrong, rationale = make(stable_random(name, i))
        key = " ".join(fields.values())
        objects[key] = _example(
            name, key, fields, answer, wrong, rationale=rationale, domain="generated"
        )
    return list(objects.items())


def _choices(name: str, pairs: Sequence[tuple[str, str, str, str]], wrong: int = 3) -> Objects:
    """Pairs (key, question, answer, domain); wrong options are other answers of the same split."""
    by_split: dict[str, list[str]] = {}
    for key, _, answer, _ in pairs:
        by_split.setdefault(split_of(key), []).append(answer)
    pools = {split: sorted(set(answers)) for split, answers in by_split.items()}
    objects = []
    for key, question, answer, domain in pairs:
        others = [a for a in pools[split_of(key)] if a != answer]
        if len(others) >= wrong:
            rng, fields = stable_random(name, question), {"x": question}
            drawn = rng.sample(others, min(len(others), 4 * wrong))
            apart = [a for a in drawn if a not in question and question not in a][:wrong]
            if len(apart) == wrong:
                objects.append(
                    (key, _example(name, question, fields, answer, apart, domain=domain))
                )
    return objects


def _documented(kind: str, low: int = 20, high: int = 100) -> list[Entry]:
    """Objects of a kind with a short summary that does not give the name away whole."""
    found, names = [], set()
    for entry in entries():
        fits = low <= len(entry.summary) <= high and 3 < len(entry.name) <= 24
        given = entry.name.lower() in entry.summary.lower()
        if entry.kind == kind and fits and not given and entry.name not in names:
            names.add(entry.name)
            found.append(entry)
    return sorted(found, key=lambda e: stable_random(e.text).random())[:SIZE]


def _by_summary(kind: str) -> Callable[[str], Objects]:
    def make(name: str) -> Objects:
        return _choices(name, [(e.text, e.summary, e.name, e.domain) for e in _documented(kind)])

    return make


def _module_names(name: str) -> Objects:
    modules = [e for e in entries() if e.kind == "module" and 15 <= len(e.summary) <= 100]
    return _choices(name, [(e.text, e.summary, e.name, e.domain) for e in modules[:SIZE]])


def _topic_titles(name: str) -> Objects:
    """Paragraphs fall where their topic does; those of several topics are left out."""
    topics = [entry for entry in entries() if entry.kind == "topic"]
    paragraphs = [[" ".join(p.split())[:120] for p in e.text.split("\n\n")] for e in topics]
    count = Counter(text for texts in paragraphs for text in set(texts))
    pairs = []
    for entry, texts in zip(topics, paragraphs, strict=True):
        own = [text for text in texts if len(text) >= 40 and count[text] == 1]
        for text in own[:10]:  # alike for all, or a few long topics would dominate
            pairs.append((entry.text, text, entry.name[:40], entry.domain))
    return _choices(name, pairs)


def _sentences(name: str) -> Objects:
    """A rare word of a summary asks for the summary, among others that do not have it."""
    pairs = []
    for entry in _documented("function", 30, 90):
        words = re.findall(r"\b[a-z]{5,}\b", entry.summary)
        if words:
            pairs.append((entry.text, max(words, key=len), entry.summary, entry.domain))
    count = Counter(pair[1] for pair in pairs)
    return _choices(name, [pair for pair in pairs if count[pair[1]] == 1])


def _text_words(name: str) -> Objects:
    """A word of a summary; the others are words of other summaries."""
    pairs = []
    for entry in entries():
        words = re.findall(r"\b[a-z]{4,}\b", entry.summary[:150])
        if len(words) > 2:
            word = stable_random(name, entry.text).choice(words)
            pairs.append((entry.text, entry.summary[:150], word, entry.domain))
    pairs.sort(key=lambda pair: stable_random(pair[0]).random())
    return _choices(name, pairs[:GENERATED])


def _gaps(name: str) -> Objects:
    """A word that a text says twice, hidden the second time; the others do not occur in it."""
    pairs = []
    for entry in entries():
        text = " ".join(entry.text.split())[:200]
        words = re.findall(r"\b[a-z]{5,}\b", text)
        again = [w for w in dict.fromkeys(words) if words.count(w) == 2]
        if entry.kind in ("function", "class") and again:
            word = again[0]
            at = text.index(word, text.index(word) + len(word))
            hidden = f"{text[:at]}___{text[at + len(word) :]}".rpartition(" ")[0]
            pairs.append((entry.text, hidden, word, entry.domain))
    pairs.sort(key=lambda pair: stable_random(pair[0]).random())
    return _choices(name, pairs[:SIZE])


def _owners(name: str) -> Objects:
    packages: dict[str, list[Entry]] = {}
    for entry in entries():
        if entry.kind == "function" and len(entry.name) > 5:
            packages.setdefault(entry.domain, []).append(entry)
    pairs = [
        (entry.text, entry.name, package, package)
        for package, members in sorted(packages.items())
        for entry in members[: SIZE // 5]  # alike for all, so that no answer is the common one
    ]
    return _choices(name, pairs)


def _statuses(name: str) -> Objects:
    return _choices(name, [(str(s.value), str(s.value), s.phrase, "http") for s in http.HTTPStatus])


def _characters(name: str) -> Objects:
    pairs = []
    for code in (*range(0x21, 0x250), *range(0x370, 0x530), *range(0x2190, 0x2300)):
        title = unicodedata.name(chr(code), "")
        visible = unicodedata.category(chr(code))[0] in "LSP"
        if title and visible and len(title) < 60:
            pairs.append((title, title.lower(), chr(code), "unicode"))
    return _choices(name, pairs)


def _zones(name: str) -> Objects:
    regions = ("Africa", "America", "Asia", "Australia", "Europe", "Pacific")
    pairs = []
    for zone in sorted(zoneinfo.available_timezones()):
        region, _, place = zone.partition("/")
        if region in regions and place and "/" not in place:
            pairs.append((zone, place.replace("_", " "), region, "zones"))
    return _choices(name, pairs)


_REAL: dict[str, Callable[[str], Objects]] = {
    "topic_title": _topic_titles,
    "module_name": _module_names,
    "owner_package": _owners,
    "http_status": _statuses,
    "unicode_name": _characters,
    "zone_region": _zones,
    "function_name": _by_summary("function"),
    "class_name": _by_summary("class"),
    "text_word": _text_words,
    "sentence_with": _sentences,
    "gap_word": _gaps,
}


@lru_cache(maxsize=64)
def _objects(name: str) -> tuple[tuple[str, Example], ...]:
    make = _REAL.get(name)
    return tuple(make(name) if make else _generated(name, getattr(g, name)))


def _load(name: str, split: str) -> list[Example]:
    part, generated = split, name not in _REAL
    if generated and _WORDINGS[name][0] in HELD_OUT:
        # never trained on: few exemplars and many questions, so the two parts swap roles
        part = {"train": "test", "test": "train"}.get(split, split)
    found = [example for key, example in _objects(name) if split_of(key) == part]
    return found[:ASKED] if generated and split != "train" else found


@lru_cache(maxsize=1)
def builtin_tasks() -> dict[str, Task]:
    """All embedded tasks by name; `task.held_out` tells which clusters are never trained on."""
    tasks = {}
    for name, (cluster, wordings) in _WORDINGS.items():
        templates = tuple(Template(" ".join(text.split())) for text in wordings.split("|"))
        generated = name not in _REAL
        tasks[name] = Task(
            name,
            cluster,
            lambda split, name=name: _load(name, split),
            templates,
            inverted=_INVERTED if generated else (),
            held_out=cluster in HELD_OUT,
        )
    return tasks


def _documents(split: str) -> list[Document]:
    return [
        Document(entry.text, f"{entry.module}.{entry.name}", entry.domain)
        for entry in entries()
        if entry.split == split and len(entry.text) >= MIN_TEXT
    ]


@lru_cache(maxsize=1)
def builtin_corpus() -> Corpus:
    """The embedded text; its domains are the packages and the language reference."""
    return Corpus("builtin", _documents)
