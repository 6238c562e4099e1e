"""Texts coloured by expert: nothing is lost, and nothing in a text becomes markup."""

import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

import moekit as mk
from moekit.analysis.token_view import token_texts
from moekit.analysis.trace import RouterTrace, StackTrace
from moekit.data.tokenizer import EOS, load_tokenizer

BYTES = load_tokenizer("byte")
HOSTILE = (
    '<script>alert("x")</script> & <b onmouseover=1>\u202egnp.exe\x1b[31m $\\frac$ 日本語\nend'
)


def trace_of(texts: list[str], experts: int = 4, seed: int = 0, **changes: object) -> RouterTrace:
    """Random routing of texts: two layers, two choices."""
    generator = np.random.default_rng(seed)
    ids = [[*BYTES.encode(text), EOS] for text in texts]
    example = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
    shape = (2, len(example), 2)
    weight = generator.random(shape).astype(np.float32)
    kept = generator.random(shape) < 0.7
    stack = StackTrace(
        token=np.concatenate([np.array(each) for each in ids]),
        example=example,
        position=np.concatenate([np.arange(len(each)) for each in ids]),
        expert=generator.integers(0, experts, shape),
        weight=np.where(kept, weight, 0),
        kept=kept,
        entropy=generator.random(shape[:2]),
    )
    labels = tuple(f"task {index}" for index in range(len(texts)))
    fields = {"tasks": labels, "clusters": labels, "domains": ("",) * len(texts)}
    return RouterTrace(
        model="m", num_experts=experts, stacks={"encoder": stack}, **(fields | changes)
    )


class Page(HTMLParser):
    """The tags of a page, and the texts of its tokens."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.tokens = set(), set(), []
        self.in_token = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "span":
            self.in_token = any(name == "title" for name, _ in attrs)
            if self.in_token:
                self.tokens.append("")

    def handle_data(self, data):
        if self.in_token:
            self.tokens[-1] += data

    def handle_endtag(self, tag):
        self.in_token = False if tag == "span" else self.in_token


@pytest.mark.parametrize("text", ["What is 3 + 4?", HOSTILE, "", "a" * 3000])
def test_every_token_is_shown_and_none_is_markup(text):
    page = Page(mk.plot_tokens(trace_of([text]), BYTES, layers=[1])._repr_html_())
    assert page.tags <= {"div", "b", "span", "br"}
    assert page.attributes == {"style", "title"}
    assert len(page.tokens) == len(BYTES.encode(text)) + 1
    shown = "".join(page.tokens)
    expected = text.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b").replace("\n", "⏎")
    assert shown == expected + "</s>"


def test_labels_are_not_markup_either():
    trace = trace_of(["x"], tasks=("<img src=x>",), clusters=("",))
    page = Page(mk.plot_tokens({"<i>before": trace}, BYTES)._repr_html_())
    assert page.tags <= {"div", "b", "span", "br"}


def test_colours_shades_and_drops_follow_the_routing():
    trace = trace_of(["hello there"])
    view = mk.plot_tokens(trace, BYTES)
    assert [line.title for line in view.lines] == [
        f"example 0, task 0, MoE layer {layer}" for layer in (0, 1)
    ]
    stack = trace.stack("encoder")
    for layer, line in enumerate(view.lines):
        for token in range(len(line.texts)):
            kept, weight = stack.kept[layer, token], stack.weight[layer, token]
            assert line.is_dropped(token) == (not kept.any())
            shown = view._token(line, token)
            assert ("line-through" in shown) == (not kept.any())
            heaviest = int(np.argmax(weight))
            assert line.expert[token, 0] == stack.expert[layer, token, heaviest]
            for choice in range(2):
                name = f"expert {stack.expert[layer, token, choice]}"
                how = f"{weight[choice]:.2f}" if kept[choice] else "full"
                assert f"{name}: {how}" in shown


def test_a_character_of_several_tokens_belongs_to_the_last():
    ids = BYTES.encode("é日")
    assert token_texts([*ids, EOS], BYTES) == ("", "é", "", "", "日", "</s>")


def test_traces_are_compared_line_by_line():
    before, after = trace_of(["one", "two"], seed=1), trace_of(["one", "two"], seed=2)
    view = mk.plot_tokens({"before": before, "after": after}, BYTES, examples=[1], layers=[0])
    assert [line.title for line in view.lines] == [
        f"example 1, task 1, {name}, MoE layer 0" for name in ("before", "after")
    ]
    other = trace_of(["one", "six"])
    with pytest.raises(ValueError, match="other tokens than the first"):
        mk.plot_tokens({"before": before, "after": other}, BYTES, examples=[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": [3]}, "the trace has examples 0 to 0"),
        ({"layers": [2]}, "the encoder has MoE layers 0 to 1"),
        ({"stack": "decoder"}, "this trace has no decoder"),
        ({"examples": 0}, "no examples to show"),
    ],
)
def test_what_a_trace_lacks_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        mk.plot_tokens(trace_of(["x"]), BYTES, **settings)


def test_a_figure_is_the_same_for_the_same_trace(tmp_path):
    for experts in (4, 20):
        view = mk.plot_tokens(trace_of([HOSTILE, "a longer text. " * 20], experts), BYTES)
        first, second = (view.save(tmp_path / f"{name}.png") for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_shows_the_texts_and_runs_nothing(tmp_path):
    view = mk.plot_tokens(trace_of([HOSTILE]), BYTES)
    page = view.save(tmp_path / "tokens.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = Page(shown.partition("<body>")[2])
    assert found.tags <= {"div", "b", "span", "br"}
    assert "".join(found.tokens).count('<script>alert("x")</script>') == len(view.lines)
