"""What experts specialise in: domains, tasks and tokens of each expert, beside chance.

Y MoE layers, N tokens, K choices per token, E experts, P labels (domains, tasks or clusters), X
examples. Specialization counts the router's choices, dropped or not. Token frequency, templates
and first positions confound topic; a small sample looks specialised (hence the permutation test);
and the balance loss itself suppresses specialization.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from moekit.analysis.trace import RouterTrace, StackTrace

PERCENTILES = (0.025, 0.975)


@dataclass(frozen=True)
class Specialization:
    """Share of each label's tokens that chose each expert, N(e, p) / N(p) (Muennighoff 2024).

    Args:
      share: N(e, p) / N(p).
      low, high: 95 % interval of `share` over examples.
      chance: k / E, with k the mean number of choices of a token.
      p_value: of shuffled labels, the share whose largest deviation from the layer's load is at
        least the observed one.
    """

    labels: tuple[str, ...]
    share: Float[ndarray, "Y E P"]
    low: Float[ndarray, "Y E P"]
    high: Float[ndarray, "Y E P"]
    chance: Float[ndarray, "Y"]
    p_value: Float[ndarray, "Y"]


def specialization(
    trace: RouterTrace,
    by: str = "domain",
    stack: str = "encoder",
    *,
    resamples: int = 200,
    seed: int = 0,
) -> Specialization:
    """Expert use by label.

    Args:
      by: "domain", "task" or "cluster".
      resamples: bootstrap samples of the examples, and shuffles of their labels.
    """
    label_of_example = np.array(trace.labels(by))
    labels = tuple(sorted(set(label_of_example)))
    is_member = [label_of_example == label for label in labels]
    membership = np.array(is_member, float)  # [P X]
    counts, tokens = _choices_by_example(trace, stack)
    share = _shares(counts, tokens, membership)
    overall = counts.sum(1) / max(tokens.sum(), 1)  # [Y E]
    observed = _deviation(share, overall)

    generator = np.random.default_rng(seed)
    resampled_shares = []
    at_least_observed = np.zeros(len(share))
    for _ in range(resamples):
        resampled = membership * _resampled_counts(membership, generator)
        resampled_shares.append(_shares(counts, tokens, resampled))
        shuffled = membership[:, generator.permutation(membership.shape[1])]
        deviation = _deviation(_shares(counts, tokens, shuffled), overall)
        at_least_observed += deviation >= observed
    low, high = np.quantile(resampled_shares, PERCENTILES, axis=0)
    return Specialization(
        labels=labels,
        share=share,
        low=low,
        high=high,
        chance=overall.sum(-1) / trace.num_experts,
        # + 1: the observed labelling is one of the possible ones
        p_value=(at_least_observed + 1) / (resamples + 1),
    )


def domain_specialization(
    trace: RouterTrace, stack: str = "encoder", *, resamples: int = 200, seed: int = 0
) -> Specialization:
    """`specialization` by domain."""
    return specialization(trace, "domain", stack, resamples=resamples, seed=seed)


def task_specialization(
    trace: RouterTrace, stack: str = "encoder", *, resamples: int = 200, seed: int = 0
) -> Specialization:
    """`specialization` by task."""
    return specialization(trace, "task", stack, resamples=resamples, seed=seed)


def _count_choices(
    routing: StackTrace, owner: Int[ndarray, "N"], num_owners: int, num_experts: int
) -> Float[ndarray, "Y E owners"]:
    """Choices of each expert by the tokens of each owner, such as an example or a vocabulary id."""
    counts = np.zeros((len(routing.expert), num_experts, num_owners))
    for layer, choices in enumerate(routing.expert):
        for expert_of_token in choices.T:  # one for each of the K choices
            is_choice = expert_of_token >= 0
            cells = (expert_of_token[is_choice], owner[is_choice])
            np.add.at(counts[layer], cells, 1)
    return counts


def _choices_by_example(
    trace: RouterTrace, stack: str
) -> tuple[Float[ndarray, "Y X E"], Float[ndarray, "X"]]:
    """Choices of each expert by each example, and the number of tokens of each example."""
    routing = trace.stack(stack)
    num_examples = len(trace.tasks)
    counts = _count_choices(routing, routing.example, num_examples, trace.num_experts)
    tokens = np.bincount(routing.example, minlength=num_examples)
    return counts.swapaxes(1, 2), tokens.astype(float)


def _shares(
    counts: Float[ndarray, "Y X E"],
    tokens: Float[ndarray, "X"],
    membership: Float[ndarray, "P X"],
) -> Float[ndarray, "Y E P"]:
    """N(e, p) / N(p), where each example counts for a label by its membership."""
    tokens_of_label = np.maximum(membership @ tokens, 1)
    return np.einsum("yxe,px->yep", counts, membership) / tokens_of_label


def _resampled_counts(
    membership: Float[ndarray, "P X"], generator: np.random.Generator
) -> Float[ndarray, "P X"]:
    """How often each example is drawn when every label's examples are drawn with replacement."""
    times = np.zeros_like(membership)
    for label, is_member in enumerate(membership):
        examples = np.flatnonzero(is_member)
        drawn = generator.choice(examples, len(examples))
        np.add.at(times[label], drawn, 1)
    return times


def _deviation(
    share: Float[ndarray, "Y E P"], overall: Float[ndarray, "Y E"]
) -> Float[ndarray, "Y"]:
    """Largest deviation of a label's use of an expert from the layer's load."""
    return np.abs(share - overall[:, :, None]).max((1, 2))


@dataclass(frozen=True)
class TokenSpecialization:
    """Share of each frequent token's occurrences that chose each expert, N(x, e) / N(x).

    Args:
      tokens: vocabulary ids.
      count: occurrences of each.
      chance: k / E, with k the mean number of choices of a token.
    """

    tokens: Int[ndarray, "X"]
    count: Int[ndarray, "X"]
    share: Float[ndarray, "Y E X"]
    chance: Float[ndarray, "Y"]

    def top(self, layer: int, expert: int, n: int = 8) -> list[tuple[int, float]]:
        """The tokens (id, share) that chose the expert most often, more frequent ones first among
        equals."""
        share = self.share[layer, expert]
        order = np.lexsort((-self.count, -share))[:n]
        return [(int(self.tokens[index]), float(share[index])) for index in order]


def token_specialization(
    trace: RouterTrace, stack: str = "encoder", *, min_count: int = 20
) -> TokenSpecialization:
    """Expert use by input token.

    Args:
      min_count: tokens that occur less often are left out.

    Raises:
      ValueError: no token occurs that often.
    """
    routing = trace.stack(stack)
    tokens, token_index, count = np.unique(routing.token, return_inverse=True, return_counts=True)
    counts = _count_choices(routing, token_index, len(tokens), trace.num_experts)
    is_frequent = count >= min_count
    if not is_frequent.any():
        raise ValueError(f"no token occurs {min_count} times: trace more text or lower min_count")
    choices_per_token = counts.sum((1, 2)) / len(routing.token)
    return TokenSpecialization(
        tokens=tokens[is_frequent],
        count=count[is_frequent],
        share=(counts / count)[..., is_frequent],
        chance=choices_per_token / trace.num_experts,
    )


def label_distance(result: Specialization) -> Float[ndarray, "Y P P"]:
    """Jensen-Shannon distance between the labels' loads: 0 equal, 1 disjoint (base 2)."""
    total = result.share.sum(1, keepdims=True)
    load = result.share / np.maximum(total, 1e-12)
    first, second = load[:, :, :, None], load[:, :, None, :]
    middle = (first + second) / 2
    divergence = (_divergence(first, middle) + _divergence(second, middle)) / 2
    return np.sqrt(np.maximum(divergence, 0))


def _divergence(
    load: Float[ndarray, "Y E ..."], middle: Float[ndarray, "Y E ..."]
) -> Float[ndarray, "Y ..."]:
    """Kullback-Leibler divergence of the load from the middle, in bits."""
    nonzero_middle = np.where(middle > 0, middle, 1)
    ratio = np.where(load > 0, load / nonzero_middle, 1)
    return (load * np.log2(ratio)).sum(1)


def coactivation(trace: RouterTrace, stack: str = "encoder") -> Float[ndarray, "Y E E"]:
    """N(i, j) / N(i): the share of expert i's tokens that also chose expert j.

    All pairs of choices count, whatever their rank. The diagonal is 0.
    """
    expert = trace.stack(stack).expert
    layers, tokens, num_choices = expert.shape
    chosen: Bool[ndarray, "Y N E"] = np.zeros((layers, tokens, trace.num_experts), bool)
    for choice in range(num_choices):
        layer, token = np.nonzero(expert[:, :, choice] >= 0)
        chosen[layer, token, expert[layer, token, choice]] = True
    pairs = np.einsum("yni,ynj->yij", chosen, chosen, dtype=float)
    tokens_of_expert = np.einsum("yii->yi", pairs).copy()
    diagonal = range(trace.num_experts)
    pairs[:, diagonal, diagonal] = 0
    return pairs / np.maximum(tokens_of_expert, 1)[:, :, None]


def saturation(
    early: RouterTrace, late: RouterTrace, stack: str = "encoder"
) -> Float[ndarray, "Y"]:
    """Share of the late trace's choices that the early one made as well, |E_t & E_T| / |E_T|
    (Muennighoff 2024); 1 when routing has settled.

    Raises:
      ValueError: the traces are not of the same prompts.
    """
    first, last = early.stack(stack), late.stack(stack)
    if not np.array_equal(first.token, last.token):
        raise ValueError("the two traces are of different prompts: trace the same ones twice")
    is_choice = last.expert >= 0
    pairs_agree = first.expert[:, :, :, None] == last.expert[:, :, None, :]
    agrees = pairs_agree.any(2) & is_choice
    return agrees.sum((1, 2)) / np.maximum(is_choice.sum((1, 2)), 1)


def repetition(
    trace: RouterTrace, stack: str = "encoder"
) -> tuple[Float[ndarray, "Y"], Float[ndarray, "Y"]]:
    """Share of neighbouring tokens with the same first choice, and its chance sum_e load_e^2."""
    routing = trace.stack(stack)
    order = np.lexsort((routing.position, routing.example))
    example, position = routing.example[order], routing.position[order]
    first_choice = routing.expert[:, order, 0]
    is_neighbour = (np.diff(example) == 0) & (np.diff(position) == 1)
    left, right = first_choice[:, :-1], first_choice[:, 1:]
    is_pair = (left >= 0) & (right >= 0) & is_neighbour
    same = (left == right) & is_pair

    chance = np.zeros(len(first_choice))
    for layer, choices in enumerate(first_choice):
        counts = np.bincount(choices[choices >= 0], minlength=trace.num_experts)
        load = counts / max(counts.sum(), 1)
        chance[layer] = (load**2).sum()
    return same.sum(1) / np.maximum(is_pair.sum(1), 1), chance
