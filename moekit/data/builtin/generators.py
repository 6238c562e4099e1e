"""Seeded exercises with worked rationales: arithmetic, logic, order, letters, moving things.

Each generator takes a random generator and returns an `Exercise`.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gus", "Hana")
THINGS = ("apples", "books", "coins", "eggs", "pens", "keys", "cups", "hats")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WORDS = """
    river stone cloud garden window yellow market castle bridge winter silver forest pencil
    orange rabbit planet summer button candle doctor engine farmer guitar hammer island jacket
    kitten ladder mirror needle office palace ribbon saddle tunnel valley wagon zebra anchor
    basket camel dragon eagle flower goblet honey iron jungle kettle lemon maple nest olive
    pepper quilt rocket sugar tiger uncle velvet wheel yarn acorn bottle copper desert ember
    fabric gravel hollow insect jewel knight lantern magnet napkin oyster parrot quarry raven
    salmon temple umpire violin walnut yogurt zipper almond beacon cactus donkey eleven feather
    glacier harbor igloo jigsaw kidney lobster meadow nickel orchid puzzle quiver rabble shovel
    turtle urchin vessel willow yonder zigzag apron blanket cinema dollar easel fossil goblin
    hermit ivory jockey kernel lizard marble noodle otter pigeon quartz riddle spider thunder
    utopia vacuum whisper yeoman author barrel cherry dinner estate famous gentle humble invent
    juggle keeper laptop method normal object picnic rescue simple travel update vision wonder
""".split()  # noqa: SIM905  the list would be a line a word


class Exercise(NamedTuple):
    """A question {"x", perhaps "y"}, its answer, wrong options, and how to find the answer."""

    fields: dict[str, str]
    answer: str
    wrong: Sequence[str]
    rationale: str


def _numbers_near(rng: Random, value: int) -> list[str]:
    """Three other numbers close by."""
    smallest = max(0, value - 9)
    others = []
    for number in range(smallest, value + 10):
        if number != value:
            others.append(number)
    chosen = rng.sample(others, 3)
    return [str(number) for number in chosen]


def _without(items: Sequence[str], *left_out: str) -> list[str]:
    return [item for item in items if item not in left_out]


def addition(rng: Random) -> Exercise:
    first = rng.randint(2, 60)
    second = rng.randint(2, 39)
    total = first + second
    ones = second % 10
    tens = second - ones
    partial = first + tens
    rationale = f"{first} + {tens} = {partial} and {partial} + {ones} = {total}."
    fields = {"x": f"{first} + {second}"}
    wrong = _numbers_near(rng, total)
    return Exercise(fields, str(total), wrong, rationale)


def subtraction(rng: Random) -> Exercise:
    first = rng.randint(30, 99)
    second = rng.randint(2, 29)
    difference = first - second
    ones = second % 10
    tens = second - ones
    partial = first - tens
    rationale = f"{first} - {tens} = {partial} and {partial} - {ones} = {difference}."
    fields = {"x": f"{first} - {second}"}
    wrong = _numbers_near(rng, difference)
    return Exercise(fields, str(difference), wrong, rationale)


def word_problem(rng: Random) -> Exercise:
    name = rng.choice(NAMES)
    thing = rng.choice(THINGS)
    start = rng.randint(5, 30)
    received = rng.randint(2, 20)
    given = rng.randint(1, 5)
    total = start + received
    left = total - given
    text = f"{name} has {start} {thing}, gets {received} more and gives {given} away."
    rationale = f"{start} + {received} = {total} and {total} - {given} = {left}."
    fields = {"x": text, "y": thing}
    wrong = _numbers_near(rng, left)
    return Exercise(fields, str(left), wrong, rationale)


def largest(rng: Random) -> Exercise:
    numbers = rng.sample(range(1, 999), 4)
    answer = str(max(numbers))
    texts = [str(number) for number in numbers]
    wrong = _without(texts, answer)
    rationale = f"{answer} is above the others."
    fields = {"x": ", ".join(texts)}
    return Exercise(fields, answer, wrong, rationale)


def _boolean(rng: Random, depth: int) -> tuple[str, bool]:
    """A random expression and its value."""
    if depth == 0:
        value = rng.random() < 0.5
        return str(value), value
    if rng.random() < 0.3:
        text, value = _boolean(rng, depth - 1)
        return f"not ( {text} )", not value
    left, left_value = _boolean(rng, depth - 1)
    right, right_value = _boolean(rng, 0)
    if rng.random() < 0.5:
        both = left_value and right_value
        return f"{left} and {right}", both
    either = left_value or right_value
    return f"( {left} ) or {right}", either


def boolean(rng: Random) -> Exercise:
    wanted = rng.random() < 0.5
    text, value = _boolean(rng, 4)
    while value != wanted:
        text, value = _boolean(rng, 4)
    rationale = f"{text} is {value}."
    wrong = [str(not value)]
    fields = {"x": text}
    return Exercise(fields, str(value), wrong, rationale)


def parity(rng: Random) -> Exercise:
    number = rng.randint(10, 9999)
    last_digit = number % 10
    is_even = number % 2 == 0
    answer = "even" if is_even else "odd"
    wrong = "odd" if is_even else "even"
    rationale = f"The last digit of {number} is {last_digit}, which is {answer}."
    fields = {"x": str(number)}
    return Exercise(fields, answer, [wrong], rationale)


def divisible(rng: Random) -> Exercise:
    divisor = rng.choice((3, 4, 5))
    divides = rng.random() < 0.5
    number = divisor * rng.randint(3, 1900)
    if not divides:
        number += rng.randint(1, divisor - 1)
    quotient, remainder = divmod(number, divisor)
    answer = "yes" if divides else "no"
    wrong = "no" if divides else "yes"
    rationale = f"{number} = {quotient} x {divisor} + {remainder}."
    fields = {"x": str(number), "y": str(divisor)}
    return Exercise(fields, answer, [wrong], rationale)


def longest_word(rng: Random) -> Exercise:
    while True:
        words = rng.sample(WORDS, 4)
        lengths = [len(word) for word in words]
        *_, second, first = sorted(lengths)
        if first > second:
            break
    answer = max(words, key=len)
    wrong = _without(words, answer)
    rationale = f"{answer} has {len(answer)} letters."
    fields = {"x": ", ".join(words)}
    return Exercise(fields, answer, wrong, rationale)


def last_word(rng: Random) -> Exercise:
    words = rng.sample(WORDS, 4)
    *wrong, answer = words
    rationale = f"The list ends with {answer}."
    fields = {"x": " ".join(words)}
    return Exercise(fields, answer, wrong, rationale)


def first_word(rng: Random) -> Exercise:
    words = rng.sample(WORDS, 4)
    answer, *wrong = words
    rationale = f"The list begins with {answer}."
    fields = {"x": " ".join(words)}
    return Exercise(fields, answer, wrong, rationale)


def word_after(rng: Random) -> Exercise:
    words = rng.sample(WORDS, 5)
    index = rng.randrange(4)
    word = words[index]
    answer = words[index + 1]
    wrong = _without(words, word, answer)
    rationale = f"{word} is before {answer}."
    fields = {"x": " ".join(words), "y": word}
    return Exercise(fields, answer, wrong, rationale)


def repeated_word(rng: Random) -> Exercise:
    answer, *wrong = rng.sample(WORDS, 4)
    line = [answer, *wrong, answer]
    rng.shuffle(line)
    rationale = f"{answer} stands there twice."
    fields = {"x": " ".join(line)}
    return Exercise(fields, answer, wrong, rationale)


def mentioned(rng: Random) -> Exercise:
    words = rng.sample(WORDS, 8)
    shown = words[:5]
    wrong = words[5:]
    answer = rng.choice(shown)
    rationale = f"{answer} is in the line."
    fields = {"x": " ".join(shown)}
    return Exercise(fields, answer, wrong, rationale)


def owned(rng: Random) -> Exercise:
    people = rng.sample(NAMES, 4)
    things = rng.sample(WORDS, 4)
    owned_by = dict(zip(people, things, strict=True))
    text = ". ".join(_owners(owned_by))
    index = rng.randrange(4)
    person = people[index]
    answer = things[index]
    wrong = _without(things, answer)
    rationale = f"{person} has the {answer}."
    fields = {"x": f"{text}.", "y": person}
    return Exercise(fields, answer, wrong, rationale)


def prefix(rng: Random) -> Exercise:
    while True:
        answer, *wrong = rng.sample(WORDS, 4)
        length = rng.randint(2, 4)
        start = answer[:length]
        first_letters = [word[0] for word in wrong]
        if start[0] not in first_letters:
            break
    rationale = f"{answer} starts with {start}."
    return Exercise({"x": start}, answer, wrong, rationale)


def suffix(rng: Random) -> Exercise:
    while True:
        answer, *wrong = rng.sample(WORDS, 4)
        length = rng.randint(2, 4)
        end = answer[-length:]
        if not any(word.endswith(end) for word in wrong):
            break
    rationale = f"{answer} ends with {end}."
    return Exercise({"x": end}, answer, wrong, rationale)


def alphabetical(rng: Random) -> Exercise:
    words = rng.sample(WORDS, 4)
    in_order = sorted(words)
    answer = in_order[0]
    wrong = _without(words, answer)
    rationale = f"In order: {', '.join(in_order)}."
    fields = {"x": ", ".join(words)}
    return Exercise(fields, answer, wrong, rationale)


def count_letter(rng: Random) -> Exercise:
    wanted = rng.randint(1, 4)
    while True:
        words = rng.sample(WORDS, 3)
        letters = "".join(words)
        letter = rng.choice(letters)
        if letters.count(letter) == wanted:
            break
    answer = str(wanted)
    wrong = _without(("1", "2", "3", "4"), answer)
    found = " ".join([letter] * wanted)
    rationale = f"Found {found}: {wanted}."
    fields = {"x": " ".join(words), "y": letter}
    return Exercise(fields, answer, wrong, rationale)


def next_number(rng: Random) -> Exercise:
    start = rng.randint(1, 300)
    step = rng.randint(2, 9)
    answer = start + 4 * step
    shown = [str(number) for number in range(start, answer, step)]
    wrong = _numbers_near(rng, answer)
    rationale = f"Each is {step} more than the former."
    fields = {"x": ", ".join(shown)}
    return Exercise(fields, str(answer), wrong, rationale)


def spelled(rng: Random) -> Exercise:
    answer, *wrong = rng.sample(WORDS, 4)
    separator = rng.choice("-./+")
    rationale = f"Joined, the letters are {answer}."
    fields = {"x": separator.join(answer)}
    return Exercise(fields, answer, wrong, rationale)


def phrase_with(rng: Random) -> Exercise:
    words = rng.sample(WORDS, 10)
    answer = " ".join(words[:3])
    second = " ".join(words[3:6])
    third = " ".join(words[6:9])
    word = rng.choice(words[:3])
    rationale = f"{word} is in {answer}."
    fields = {"x": word}
    return Exercise(fields, answer, [second, third], rationale)


def shared_word(rng: Random) -> Exercise:
    words = rng.sample(WORDS, 8)
    answer = words[0]
    left = words[:3]
    right = [answer, *words[3:5]]
    wrong = words[5:]
    rng.shuffle(left)
    rng.shuffle(right)
    text = f"{' '.join(left)}; {' '.join(right)}."
    rationale = f"{answer} is in both."
    fields = {"x": text}
    return Exercise(fields, answer, wrong, rationale)


def missing_item(rng: Random) -> Exercise:
    words = rng.sample(WORDS, 7)
    first = words[:4]
    wrong = words[4:]
    answer = rng.choice(first)
    second = _without(first, answer)
    rng.shuffle(second)
    text = f"{' '.join(first)}; {' '.join(second)}."
    rationale = f"{answer} is in the first list only."
    fields = {"x": text}
    return Exercise(fields, answer, wrong, rationale)


def swaps(rng: Random) -> Exercise:
    people = rng.sample(NAMES, 3)
    things = rng.sample(WORDS, 3)
    owned_by = dict(zip(people, things, strict=True))
    sentences = _owners(owned_by)
    for _ in range(2):
        first, second = rng.sample(people, 2)
        owned_by[first], owned_by[second] = owned_by[second], owned_by[first]
        sentences.append(f"{first} and {second} swap")
    person = rng.choice(people)
    answer = owned_by[person]
    wrong = _without(things, answer)
    at_last = ", ".join(_owners(owned_by))
    rationale = f"At last {at_last}."
    text = ". ".join(sentences)
    fields = {"x": f"{text}.", "y": person}
    return Exercise(fields, answer, wrong, rationale)


def _owners(owned_by: dict[str, str]) -> list[str]:
    return [f"{person} has the {thing}" for person, thing in owned_by.items()]


def weekday(rng: Random) -> Exercise:
    today = rng.randrange(7)
    days_ahead = rng.randint(2, 60)
    index = (today + days_ahead) % 7
    answer = WEEKDAYS[index]
    other_days = _without(WEEKDAYS, answer)
    wrong = rng.sample(other_days, 3)
    weeks, days = divmod(days_ahead, 7)
    rationale = f"{days_ahead} days are {weeks} weeks and {days} days."
    fields = {"x": WEEKDAYS[today], "y": str(days_ahead)}
    return Exercise(fields, answer, wrong, rationale)


def navigate(rng: Random) -> Exercise:
    returns = rng.random() < 0.5
    length = rng.randint(1, 30)
    width = rng.randint(1, 30)
    steps = {"forward": length, "left": width, "back": length, "right": width}
    moves = list(steps)
    if not returns:
        changed = rng.choice(moves)
        steps[changed] += rng.randint(1, 3)
    rng.shuffle(moves)
    sentences = [f"Take {steps[move]} steps {move}" for move in moves]
    rationale = (
        f"Forward {steps['forward']}, back {steps['back']}, "
        f"left {steps['left']}, right {steps['right']}."
    )
    answer = "yes" if returns else "no"
    wrong = "no" if returns else "yes"
    text = ". ".join(sentences)
    fields = {"x": f"{text}."}
    return Exercise(fields, answer, [wrong], rationale)


def dyck(rng: Random) -> Exercise:
    closing = {"(": ")", "[": "]", "{": "}"}
    depth = rng.randint(2, 5)
    opened = [rng.choice("([{") for _ in range(depth)]
    closed = [closing[bracket] for bracket in reversed(opened)]
    answer = " ".join(closed)
    wrong: set[str] = set()
    while len(wrong) < 3:
        brackets = [rng.choice(")]}") for _ in opened]
        other = " ".join(brackets)
        if other != answer:
            wrong.add(other)
    rationale = f"The last opened, {opened[-1]}, closes first."
    fields = {"x": " ".join(opened)}
    return Exercise(fields, answer, sorted(wrong), rationale)
