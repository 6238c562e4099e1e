"""What experts are for: domains, tasks and tokens per expert, with their chance values.

Y MoE layers, N tokens, K choices per token, E experts, P labels (domains, tasks or clusters).
Specialization counts the router's choices, dropped or not. Beware: token frequency, templates and
first positions confound topic, a small sample looks specialised (hence the permutation null), and
the balance loss itself suppresses specialization.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from moekit.analysis.trace import RouterTrace


@dataclass(frozen=True)
class Specialization:
    """Share of each label's tokens that chose each expert, N(e, p) / N(p) (Muennighoff 2024).

    `chance` is k / E with k the choices a token makes on average. `low` and `high` are the 95 %
    interval over examples, `p_value` the share of label shuffles whose largest deviation from the
    layer's own load is at least as large as the observed one.
    """

    labels: tuple[str, ...]
    share: Float[np.ndarray, "Y E P"]
    low: Float[np.ndarray, "Y E P"]
    high: Float[np.ndarray, "Y E P"]
    chance: Float[np.ndarray, "Y"]
    p_value: Float[np.ndarray, "Y"]


def _counts_by_example(
    trace: RouterTrace, stack: str
) -> tuple[Float[np.ndarray, "Y X E"], Float[np.ndarray, "X"]]:
    """Choices of each expert by each example (X examples), and the examples' tokens."""
    s, examples = trace.stack(stack), len(trace.tasks)
    counts = np.zeros((len(s.expert), examples, trace.num_experts))
    for layer, chosen in enumerate(s.expert):
        for k in range(chosen.shape[1]):
            real = chosen[:, k] >= 0
            np.add.at(counts[layer], (s.example[real], chosen[real, k]), 1)
    return counts, np.bincount(s.example, minlength=examples).astype(float)


def _shares(counts, tokens, member) -> Float[np.ndarray, "Y E P"]:
    """N(e, p) / N(p) for membership weights `member` [P X] of the examples."""
    total = np.maximum(member @ tokens, 1)
    return np.einsum("yxe,px->yep", counts, member) / total


def specialization(
    trace: RouterTrace,
    by: str = "domain",
    stack: str = "encoder",
    *,
    resamples: int = 200,
    seed: int = 0,
) -> Specialization:
    """Expert use by label: "domain", "task" or "cluster"."""
    labels_of = np.array(trace.labels(by))
    labels = tuple(sorted(set(labels_of)))
    member = np.array([labels_of == label for label in labels], float)
    counts, tokens = _counts_by_example(trace, stack)
    share = _shares(counts, tokens, member)
    overall = counts.sum(1) / max(tokens.sum(), 1)  # [Y E]
    rng = np.random.default_rng(seed)
    boots, exceed = [], np.zeros(len(share))
    observed = _deviation(share, overall)
    for _ in range(resamples):
        boots.append(_shares(counts, tokens, member * _resample(member, rng)))
        shuffled = member[:, rng.permutation(member.shape[1])]
        exceed += _deviation(_shares(counts, tokens, shuffled), overall) >= observed
    low, high = np.quantile(boots, [0.025, 0.975], axis=0)
    chance = overall.sum(-1) / trace.num_experts
    # + 1: the observed labelling is one of the possible ones
    return Specialization(labels, share, low, high, chance, (exceed + 1) / (resamples + 1))


def _resample(member, rng) -> Float[np.ndarray, "P X"]:
    """How often each example is drawn when every label's examples are drawn with replacement."""
    times = np.zeros_like(member)
    for p, row in enumerate(member):
        own = np.flatnonzero(row)
        np.add.at(times[p], rng.choice(own, len(own)), 1)
    return times


def _deviation(share, overall) -> Float[np.ndarray, "Y"]:
    return np.abs(share - overall[:, :, None]).max((1, 2))


def domain_specialization(trace: RouterTrace, stack: str = "encoder", **kwargs) -> Specialization:
    """`specialization` by domain."""
    return specialization(trace, "domain", stack, **kwargs)


def task_specialization(trace: RouterTrace, stack: str = "encoder", **kwargs) -> Specialization:
    """`specialization` by task."""
    return specialization(trace, "task", stack, **kwargs)


@dataclass(frozen=True)
class TokenSpecialization:
    """Share of each frequent token's occurrences that chose each expert, N(x, e) / N(x)."""

    tokens: Int[np.ndarray, "X"]
    count: Int[np.ndarray, "X"]
    share: Float[np.ndarray, "Y E X"]
    chance: Float[np.ndarray, "Y"]

    def top(self, layer: int, expert: int, n: int = 8) -> list[tuple[int, float]]:
        """The expert's most faithful tokens as (id, share), the commoner first among equals."""
        share = self.share[layer, expert]
        order = np.lexsort((-self.count, -share))[:n]
        return [(int(self.tokens[i]), float(share[i])) for i in order]


def token_specialization(
    trace: RouterTrace, stack: str = "encoder", *, min_count: int = 20
) -> TokenSpecialization:
    """Vocabulary specialization by input token; rarer tokens than min_count are left out."""
    s = trace.stack(stack)
    tokens, inverse, count = np.unique(s.token, return_inverse=True, return_counts=True)
    counts = np.zeros((len(s.expert), trace.num_experts, len(tokens)))
    for layer, chosen in enumerate(s.expert):
        for k in range(chosen.shape[1]):
            real = chosen[:, k] >= 0
            np.add.at(counts[layer], (chosen[real, k], inverse[real]), 1)
    often = count >= min_count
    if not often.any():
        raise ValueError(f"no token occurs {min_count} times: trace more text or lower min_count")
    chance = counts.sum((1, 2)) / len(s.token) / trace.num_experts
    return TokenSpecialization(tokens[often], count[often], (counts / count)[..., often], chance)


def label_distance(result: Specialization) -> Float[np.ndarray, "Y P P"]:
    """Jensen-Shannon distance of the labels' load vectors: 0 alike, 1 disjoint (base 2)."""
    load = result.share / np.maximum(result.share.sum(1, keepdims=True), 1e-12)
    p, q = load[:, :, :, None], load[:, :, None, :]
    middle = (p + q) / 2

    def divergence(a):
        ratio = np.where(a > 0, a / np.where(middle > 0, middle, 1), 1)
        return (a * np.log2(ratio)).sum(1)

    return np.sqrt(np.maximum((divergence(p) + divergence(q)) / 2, 0))


def coactivation(trace: RouterTrace, stack: str = "encoder") -> Float[np.ndarray, "Y E E"]:
    """N(i, j) / N(i): of the tokens that chose i, the share that chose j as well; all pairs of
    choices count, whatever their rank. Zero on the diagonal."""
    s, e = trace.stack(stack), trace.num_experts
    chosen: Bool[np.ndarray, "Y N E"] = np.zeros((*s.expert.shape[:2], e), bool)
    for k in range(s.expert.shape[2]):
        layer, token = np.nonzero(s.expert[:, :, k] >= 0)
        chosen[layer, token, s.expert[layer, token, k]] = True
    pairs = np.einsum("yni,ynj->yij", chosen, chosen, dtype=float)
    alone = np.einsum("yii->yi", pairs).copy()
    pairs[:, range(e), range(e)] = 0
    return pairs / np.maximum(alone, 1)[:, :, None]


def saturation(
    early: RouterTrace, late: RouterTrace, stack: str = "encoder"
) -> Float[np.ndarray, "Y"]:
    """Share of the late trace's choices that the early one made as well, |E_t & E_T| / |E_T|
    (Muennighoff 2024); 1 when routing has settled.

    Raises:
      ValueError: the traces are not of the same prompts.
    """
    a, b = early.stack(stack), late.stack(stack)
    if a.token.shape != b.token.shape or (a.token != b.token).any():
        raise ValueError("the two traces are of different prompts: trace the same ones twice")
    same = (a.expert[:, :, :, None] == b.expert[:, :, None, :]).any(2) & (b.expert >= 0)
    return same.sum((1, 2)) / np.maximum((b.expert >= 0).sum((1, 2)), 1)


def repetition(
    trace: RouterTrace, stack: str = "encoder"
) -> tuple[Float[np.ndarray, "Y"], Float[np.ndarray, "Y"]]:
    """Share of neighbouring tokens with the same first choice, and its chance sum_e load_e^2."""
    s = trace.stack(stack)
    order = np.lexsort((s.position, s.example))
    first, example, position = s.expert[:, order, 0], s.example[order], s.position[order]
    neighbours = (np.diff(example) == 0) & (np.diff(position) == 1)
    both = (first[:, 1:] >= 0) & (first[:, :-1] >= 0) & neighbours
    same = (first[:, 1:] == first[:, :-1]) & both
    loads = [np.bincount(f[f >= 0], minlength=trace.num_experts) for f in first]
    chance = np.array([((load / max(load.sum(), 1)) ** 2).sum() for load in loads])
    return same.sum(1) / np.maximum(both.sum(1), 1), chance
