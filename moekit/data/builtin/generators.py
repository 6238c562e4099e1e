"""Seeded exercises with worked rationales: arithmetic, logic, order, letters, moving things.

Each generator takes a random generator and returns (fields, answer, wrong options, rationale).
"""

import datetime
import random
from collections.abc import Sequence

Made = tuple[dict[str, str], str, Sequence[str], str]
NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gus", "Hana")
THINGS = ("apples", "books", "coins", "eggs", "pens", "keys", "cups", "hats")
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


def _near(rng: random.Random, value: int, n: int = 3) -> list[str]:
    """Other numbers close by."""
    others = [v for v in range(max(0, value - 9), value + 10) if v != value]
    return [str(v) for v in rng.sample(others, n)]


def addition(rng: random.Random) -> Made:
    a, b = rng.randint(2, 60), rng.randint(2, 39)
    tens, ones = b // 10 * 10, b % 10
    steps = f"{a} + {tens} = {a + tens} and {a + tens} + {ones} = {a + b}."
    return {"x": f"{a} + {b}"}, str(a + b), _near(rng, a + b), steps


def subtraction(rng: random.Random) -> Made:
    a, b = rng.randint(30, 99), rng.randint(2, 29)
    tens, ones = b // 10 * 10, b % 10
    steps = f"{a} - {tens} = {a - tens} and {a - tens} - {ones} = {a - b}."
    return {"x": f"{a} - {b}"}, str(a - b), _near(rng, a - b), steps


def word_problem(rng: random.Random) -> Made:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c = rng.randint(5, 30), rng.randint(2, 20), rng.randint(1, 5)
    text = f"{name} has {a} {thing}, gets {b} more and gives {c} away."
    steps = f"{a} + {b} = {a + b} and {a + b} - {c} = {a + b - c}."
    return {"x": text, "y": thing}, str(a + b - c), _near(rng, a + b - c), steps


def largest(rng: random.Random) -> Made:
    numbers = rng.sample(range(1, 999), 4)
    best = max(numbers)
    fields = {"x": ", ".join(map(str, numbers))}
    return fields, str(best), [str(n) for n in numbers if n != best], f"{best} is above the others."


def _boolean(rng: random.Random, depth: int) -> tuple[str, bool]:
    if depth == 0:
        value = rng.random() < 0.5
        return str(value), value
    if rng.random() < 0.3:
        text, value = _boolean(rng, depth - 1)
        return f"not ( {text} )", not value
    (left, a), (right, b) = _boolean(rng, depth - 1), _boolean(rng, 0)
    if rng.random() < 0.5:
        return f"{left} and {right}", a and b
    return f"( {left} ) or {right}", a or b


def boolean(rng: random.Random) -> Made:
    value = rng.random() < 0.5
    while True:
        text, found = _boolean(rng, 4)
        if found == value:
            return {"x": text}, str(value), [str(not value)], f"{text} is {value}."


def parity(rng: random.Random) -> Made:
    n = rng.randint(10, 9999)
    answer, other = ("even", "odd") if n % 2 == 0 else ("odd", "even")
    return {"x": str(n)}, answer, [other], f"The last digit of {n} is {n % 10}, which is {answer}."


def divisible(rng: random.Random) -> Made:
    d, yes = rng.choice((3, 4, 5)), rng.random() < 0.5
    n = d * rng.randint(3, 1900) + (0 if yes else rng.randint(1, d - 1))
    rest = f"{n} = {n // d} x {d} + {n % d}."
    return {"x": str(n), "y": str(d)}, "yes" if yes else "no", ["no" if yes else "yes"], rest


def longest_word(rng: random.Random) -> Made:
    while True:
        words = rng.sample(WORDS, 4)
        lengths = sorted(map(len, words))
        if lengths[-1] > lengths[-2]:
            best = max(words, key=len)
            rest = [w for w in words if w != best]
            return {"x": ", ".join(words)}, best, rest, f"{best} has {len(best)} letters."


def last_word(rng: random.Random) -> Made:
    words = rng.sample(WORDS, 4)
    return {"x": " ".join(words)}, words[-1], words[:-1], f"The list ends with {words[-1]}."


def first_word(rng: random.Random) -> Made:
    words = rng.sample(WORDS, 4)
    return {"x": " ".join(words)}, words[0], words[1:], f"The list begins with {words[0]}."


def word_after(rng: random.Random) -> Made:
    words, i = rng.sample(WORDS, 5), rng.randrange(4)
    asked, answer = words[i], words[i + 1]
    rest = [w for w in words if w not in (asked, answer)]
    return {"x": " ".join(words), "y": asked}, answer, rest, f"{asked} is before {answer}."


def repeated_word(rng: random.Random) -> Made:
    words = rng.sample(WORDS, 4)
    line = [*words, words[0]]
    rng.shuffle(line)
    return {"x": " ".join(line)}, words[0], words[1:], f"{words[0]} stands there twice."


def mentioned(rng: random.Random) -> Made:
    words = rng.sample(WORDS, 8)
    text, said = words[:5], rng.choice(words[:5])
    return {"x": " ".join(text)}, said, words[5:], f"{said} is in the line."


def owned(rng: random.Random) -> Made:
    people, things = rng.sample(NAMES, 4), rng.sample(WORDS, 4)
    text = ". ".join(f"{p} has the {t}" for p, t in zip(people, things, strict=True)) + "."
    i = rng.randrange(4)
    rest = [t for t in things if t != things[i]]
    return {"x": text, "y": people[i]}, things[i], rest, f"{people[i]} has the {things[i]}."


def prefix(rng: random.Random) -> Made:
    while True:
        words = rng.sample(WORDS, 4)
        start = words[0][: rng.randint(2, 4)]
        if not any(w.startswith(start[0]) for w in words[1:]):
            return {"x": start}, words[0], words[1:], f"{words[0]} starts with {start}."


def suffix(rng: random.Random) -> Made:
    while True:
        words = rng.sample(WORDS, 4)
        end = words[0][-rng.randint(2, 4) :]
        if not any(w.endswith(end) for w in words[1:]):
            return {"x": end}, words[0], words[1:], f"{words[0]} ends with {end}."


def alphabetical(rng: random.Random) -> Made:
    words = rng.sample(WORDS, 4)
    best = min(words)
    rest = [w for w in words if w != best]
    return {"x": ", ".join(words)}, best, rest, f"In order: {', '.join(sorted(words))}."


def count_letter(rng: random.Random) -> Made:
    wanted = rng.randint(1, 4)
    while True:
        text = " ".join(rng.sample(WORDS, 3))
        letter = rng.choice(text.replace(" ", ""))
        if text.count(letter) == wanted:
            others = [str(n) for n in range(1, 5) if n != wanted]
            where = " ".join(c for c in text if c == letter)
            return {"x": text, "y": letter}, str(wanted), others, f"Found {where}: {wanted}."


def next_number(rng: random.Random) -> Made:
    start, step = rng.randint(1, 300), rng.randint(2, 9)
    line = [start + step * i for i in range(5)]
    text = ", ".join(map(str, line[:-1]))
    return {"x": text}, str(line[-1]), _near(rng, line[-1]), f"Each is {step} more than the former."


def spelled(rng: random.Random) -> Made:
    words = rng.sample(WORDS, 4)
    return (
        {"x": rng.choice("-./+").join(words[0])},
        words[0],
        words[1:],
        f"Joined, the letters are {words[0]}.",
    )


def phrase_with(rng: random.Random) -> Made:
    words = rng.sample(WORDS, 10)
    phrases = [" ".join(words[i : i + 3]) for i in (0, 3, 6)]
    key = rng.choice(words[:3])
    return {"x": key}, phrases[0], phrases[1:], f"{key} is in {phrases[0]}."


def shared_word(rng: random.Random) -> Made:
    words = rng.sample(WORDS, 8)
    shared, left, right = words[0], words[:3], [words[0], *words[3:5]]
    rng.shuffle(left)
    rng.shuffle(right)
    text = f"{' '.join(left)}; {' '.join(right)}."
    return {"x": text}, shared, words[5:], f"{shared} is in both."


def missing_item(rng: random.Random) -> Made:
    words = rng.sample(WORDS, 7)
    first, lost = words[:4], rng.choice(words[:4])
    second = [w for w in first if w != lost]
    rng.shuffle(second)
    text = f"{' '.join(first)}; {' '.join(second)}."
    return {"x": text}, lost, words[4:], f"{lost} is in the first list only."


def swaps(rng: random.Random) -> Made:
    people, things = rng.sample(NAMES, 3), rng.sample(WORDS, 3)
    has = dict(zip(people, things, strict=True))
    text = [f"{p} has the {t}" for p, t in has.items()]
    for _ in range(2):
        a, b = rng.sample(people, 2)
        has[a], has[b] = has[b], has[a]
        text.append(f"{a} and {b} swap")
    who = rng.choice(people)
    rest = [t for t in things if t != has[who]]
    steps = "At last " + ", ".join(f"{p} has the {t}" for p, t in has.items()) + "."
    return {"x": ". ".join(text) + ".", "y": who}, has[who], rest, steps


def weekday(rng: random.Random) -> Made:
    days = [f"{datetime.date(2024, 1, 1) + datetime.timedelta(i):%A}" for i in range(7)]
    today, ahead = rng.randrange(7), rng.randint(2, 60)
    answer = days[(today + ahead) % 7]
    others = rng.sample([d for d in days if d != answer], 3)
    steps = f"{ahead} days are {ahead // 7} weeks and {ahead % 7} days."
    return {"x": days[today], "y": str(ahead)}, answer, others, steps


def navigate(rng: random.Random) -> Made:
    back, moves = rng.random() < 0.5, []
    a, b = rng.randint(1, 30), rng.randint(1, 30)
    moves = [("forward", a), ("left", b), ("back", a), ("right", b)]
    if not back:
        i = rng.randrange(4)
        moves[i] = (moves[i][0], moves[i][1] + rng.randint(1, 3))
    rng.shuffle(moves)
    text = ". ".join(f"Take {n} steps {way}" for way, n in moves) + "."
    total = dict(moves)
    steps = (
        f"Forward {total['forward']}, back {total['back']}, "
        f"left {total['left']}, right {total['right']}."
    )
    return {"x": text}, "yes" if back else "no", ["no" if back else "yes"], steps


def dyck(rng: random.Random) -> Made:
    pairs = {"(": ")", "[": "]", "{": "}"}
    opened = [rng.choice("([{") for _ in range(rng.randint(2, 5))]
    text = " ".join(opened)
    close = " ".join(pairs[c] for c in reversed(opened))
    others: set[str] = set()
    while len(others) < 3:
        other = " ".join(rng.choice(")]}") for _ in opened)
        if other != close:
            others.add(other)
    return {"x": text}, close, sorted(others), f"The last opened, {opened[-1]}, closes first."
