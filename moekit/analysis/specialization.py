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
    distinct_labels = set(label_of_example)
    labels = tuple(sorted(distinct_labels))
    is_member = [label_of_example == label for label in labels]
    membership = np.array(is_member, float)  # [P X]
    counts, tokens = _choices_by_example(trace, stack)
    share = _shares(counts, tokens, membership)
    num_tokens = max(tokens.sum(), 1)
    overall = counts.sum(1) / num_tokens  # [Y E]
    observed = _deviation(share, overall)

    generator = np.random.default_rng(seed)
    resampled_shares = []
    at_least_observed = np.zeros(len(share))
    for _ in range(resamples):
        resampled = _resampled_membership(membership, generator)
        resampled_shares.append(_shares(counts, tokens, resampled))
        shuffled = _shuffled_membership(membership, generator)
        shuffled_share = _shares(counts, tokens, shuffled)
        deviation = _deviation(shuffled_share, overall)
        at_least_observed += deviation >= observed
    low, high = np.quantile(resampled_shares, PERCENTILES, axis=0)
    choices_per_token = overall.sum(-1)
    return Specialization(
        labels=labels,
        share=share,
        low=low,
        high=high,
        chance=choices_per_token / trace.num_experts,
        # + 1: the observed labelling is one of the possible ones
        p_value=(at_least_observed + 1) / (resamples + 1),
    )


def domain_specialization(
    trace: RouterTrace,
    stack: str = "encoder",
    *,
    resamples: int = 200,
    seed: int = 0,
) -> Specialization:
    """`specialization` by domain."""
    return specialization(trace, "domain", stack, resamples=resamples, seed=seed)


def task_specialization(
    trace: RouterTrace,
    stack: str = "encoder",
    *,
    resamples: int = 200,
    seed: int = 0,
) -> Specialization:
    """`specialization` by task."""
    return specialization(trace, "task", stack, resamples=resamples, seed=seed)


def _count_choices(
    routing: StackTrace,
    owner: Int[ndarray, "N"],
    num_owners: int,
    num_experts: int,
) -> Float[ndarray, "Y E owners"]:
    """Choices of each expert by the tokens of each owner, such as an example or a vocabulary id."""
    num_layers = len(routing.expert)
    counts = np.zeros((num_layers, num_experts, num_owners))
    for layer, choices in enumerate(routing.expert):
        for expert_of_token in choices.T:  # one for each of the K choices
            is_choice = expert_of_token >= 0
            expert_of_choice = expert_of_token[is_choice]
            owner_of_choice = owner[is_choice]
            np.add.at(counts[layer], (expert_of_choice, owner_of_choice), 1)
    return counts


def _choices_by_example(
    trace: RouterTrace, stack: str
) -> tuple[Float[ndarray, "Y X E"], Float[ndarray, "X"]]:
    """Choices of each expert by each example, and the number of tokens of each example."""
    routing = trace.stack(stack)
    num_examples = len(trace.tasks)
    counts = _count_choices(routing, routing.example, num_examples, trace.num_experts)
    tokens = np.bincount(routing.example, minlength=num_examples)
    counts_by_example = counts.swapaxes(1, 2)
    return counts_by_example, tokens.astype(float)


def _shares(
    counts: Float[ndarray, "Y X E"],
    tokens: Float[ndarray, "X"],
    membership: Float[ndarray, "P X"],
) -> Float[ndarray, "Y E P"]:
    """N(e, p) / N(p), where each example counts for a label by its membership."""
    choices_of_label = np.einsum("yxe,px->yep", counts, membership)
    tokens_of_label = membership @ tokens
    at_least_one = np.maximum(tokens_of_label, 1)
    return choices_of_label / at_least_one


def _resampled_membership(
    membership: Float[ndarray, "P X"], generator: np.random.Generator
) -> Float[ndarray, "P X"]:
    """How often each example is drawn when every label's examples are drawn with replacement."""
    times_drawn = np.zeros_like(membership)
    for label, is_member in enumerate(membership):
        examples = np.flatnonzero(is_member)
        drawn = generator.choice(examples, len(examples))
        np.add.at(times_drawn[label], drawn, 1)
    return times_drawn


def _shuffled_membership(
    membership: Float[ndarray, "P X"], generator: np.random.Generator
) -> Float[ndarray, "P X"]:
    """Membership after the labels are permuted among the examples."""
    num_examples = membership.shape[1]
    order = generator.permutation(num_examples)
    return membership[:, order]


def _deviation(
    share: Float[ndarray, "Y E P"], overall: Float[ndarray, "Y E"]
) -> Float[ndarray, "Y"]:
    """Largest deviation of a label's use of an expert from the layer's load."""
    deviation = np.abs(share - overall[:, :, None])
    return deviation.max((1, 2))


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
        order = np.lexsort((-self.count, -share))
        top_tokens = []
        for index in order[:n]:
            token = int(self.tokens[index])
            top_tokens.append((token, float(share[index])))
        return top_tokens


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
    share = counts / count
    num_occurrences = len(routing.token)
    choices_per_token = counts.sum((1, 2)) / num_occurrences
    return TokenSpecialization(
        tokens=tokens[is_frequent],
        count=count[is_frequent],
        share=share[..., is_frequent],
        chance=choices_per_token / trace.num_experts,
    )


def label_distance(result: Specialization) -> Float[ndarray, "Y P P"]:
    """Jensen-Shannon distance between the labels' loads: 0 equal, 1 disjoint (base 2)."""
    total = result.share.sum(1, keepdims=True)
    nonzero_total = np.maximum(total, 1e-12)
    load = result.share / nonzero_total
    first = load[:, :, :, None]
    second = load[:, :, None, :]
    middle = (first + second) / 2
    first_divergence = _divergence(first, middle)
    second_divergence = _divergence(second, middle)
    divergence = (first_divergence + second_divergence) / 2
    nonnegative = np.maximum(divergence, 0)  # rounding may leave it just below 0
    return np.sqrt(nonnegative)


def _divergence(
    load: Float[ndarray, "Y E ..."], middle: Float[ndarray, "Y E ..."]
) -> Float[ndarray, "Y ..."]:
    """Kullback-Leibler divergence of the load from the middle, in bits."""
    nonzero_middle = np.where(middle > 0, middle, 1)
    ratio = load / nonzero_middle
    nonzero_ratio = np.where(load > 0, ratio, 1)
    bits = load * np.log2(nonzero_ratio)
    return bits.sum(1)


def coactivation(trace: RouterTrace, stack: str = "encoder") -> Float[ndarray, "Y E E"]:
    """N(i, j) / N(i): the share of expert i's tokens that also chose expert j.

    All pairs of choices count, whatever their rank. The diagonal is 0.
    """
    expert = trace.stack(stack).expert
    num_layers, num_tokens, num_choices = expert.shape
    shape = (num_layers, num_tokens, trace.num_experts)
    chosen: Bool[ndarray, "Y N E"] = np.zeros(shape, bool)
    for choice in range(num_choices):
        expert_of_token = expert[:, :, choice]
        layer, token = np.nonzero(expert_of_token >= 0)
        chosen_expert = expert_of_token[layer, token]
        chosen[layer, token, chosen_expert] = True
    pairs = np.einsum("yni,ynj->yij", chosen, chosen, dtype=float)
    tokens_of_expert = np.einsum("yii->yi", pairs).copy()
    diagonal = range(trace.num_experts)
    pairs[:, diagonal, diagonal] = 0
    at_least_one = np.maximum(tokens_of_expert, 1)
    return pairs / at_least_one[:, :, None]


def saturation(
    early: RouterTrace, late: RouterTrace, stack: str = "encoder"
) -> Float[ndarray, "Y"]:
    """Share of the late trace's choices that the early one made as well, |E_t & E_T| / |E_T|
    (Muennighoff 2024); 1 when routing has settled.

    Raises:
      ValueError: the traces are not of the same prompts.
    """
    first = early.stack(stack)
    last = late.stack(stack)
    if not np.array_equal(first.token, last.token):
        raise ValueError("the two traces are of different prompts: trace the same ones twice")
    is_choice = last.expert >= 0
    first_choices = first.expert[:, :, :, None]
    last_choices = last.expert[:, :, None, :]
    pairs_agree = first_choices == last_choices
    agrees = pairs_agree.any(2) & is_choice
    num_agreements = agrees.sum((1, 2))
    num_choices = is_choice.sum((1, 2))
    return num_agreements / np.maximum(num_choices, 1)


def repetition(
    trace: RouterTrace, stack: str = "encoder"
) -> tuple[Float[ndarray, "Y"], Float[ndarray, "Y"]]:
    """Share of neighbouring tokens with the same first choice, and its chance sum_e load_e^2."""
    routing = trace.stack(stack)
    order = np.lexsort((routing.position, routing.example))
    example = routing.example[order]
    position = routing.position[order]
    same_example = np.diff(example) == 0
    next_position = np.diff(position) == 1
    is_neighbour = same_example & next_position

    first_choice = routing.expert[:, order, 0]
    left = first_choice[:, :-1]
    right = first_choice[:, 1:]
    left_chose = left >= 0
    right_chose = right >= 0
    is_pair = left_chose & right_chose & is_neighbour
    is_same = (left == right) & is_pair
    num_pairs = is_pair.sum(1)
    share = is_same.sum(1) / np.maximum(num_pairs, 1)

    chance = np.zeros(len(first_choice))
    for layer, choices in enumerate(first_choice):
        chosen = choices[choices >= 0]
        counts = np.bincount(chosen, minlength=trace.num_experts)
        num_choices = max(counts.sum(), 1)
        load = counts / num_choices
        chance[layer] = np.sum(load**2)
    return share, chance
