"""Text of an answer while it is decoded: where it stops, and what of it can be shown already."""

from collections.abc import Iterable, Iterator, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what undecodable bytes become
MAX_INCOMPLETE = 3  # bytes of a UTF-8 character whose last byte is missing


def stop_texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The texts that end an answer; one may be given as it is.

    Raises:
      ValueError: one of them is empty.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise ValueError("a stop text is empty, which would end every answer: leave it out")
    return stops


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the stop text that is complete first (of several, before the longest)."""
    found = []
    for stop in stops:
        start = text.find(stop)
        if start >= 0:
            found.append((start + len(stop), start))
    if not found:
        return text
    _, first_start = min(found)
    return text[:first_start]


def settled(text: str, stops: Sequence[str]) -> str:
    """The beginning of a text which later tokens cannot change.

    The last bytes may be the beginning of a UTF-8 character, and the last characters that of a stop
    text.
    """
    complete = text.rstrip(REPLACEMENT)
    # more replacement characters than an incomplete character has bytes are wrong bytes for good
    complete = text[: max(len(complete), len(text) - MAX_INCOMPLETE)]
    end = len(complete)
    for stop in stops:
        for length in range(1, len(stop)):
            if complete.endswith(stop[:length]):
                end = min(end, len(complete) - length)
    return complete[:end]


def text_pieces(texts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """What each of a series of growing texts adds; together the last text, up to a stop text."""
    answer = ""
    num_shown = 0
    for text in texts:
        answer = until_stop(text, stops)
        if len(answer) < len(text):
            break
        ready = settled(text, stops)
        if len(ready) > num_shown:
            yield ready[num_shown:]
            num_shown = len(ready)
    if len(answer) > num_shown:
        yield answer[num_shown:]
