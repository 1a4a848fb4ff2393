"""The counting model that pycode has to beat is itself right: proper distributions, and the textbook's numbers."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from weft.builtin._ngram import KneserNey

VOCABULARY, START = 200, 0


def documents(count=200, seed=0):
    """Tokens by Zipf's law, so that some n-grams are frequent, many are rare and most are never seen."""
    random = np.random.default_rng(seed)
    return [random.zipf(1.6, size=random.integers(1, 60)).clip(max=VOCABULARY - 1) for _ in range(count)]


class Textbook:
    """Modified Kneser-Ney by Chen and Goodman's recursion, with dictionaries and one n-gram at a time."""

    def __init__(self, texts, order):
        counts = Counter()
        for text in texts:
            padded = [START] * (order - 1) + text.tolist()
            counts.update(tuple(padded[i : i + order]) for i in range(len(text)))
        self.counts = {order: counts}
        for length in range(order - 1, 0, -1):
            self.counts[length] = Counter(gram[1:] for gram in self.counts[length + 1])
        self.after = {length: defaultdict(dict) for length in self.counts}
        for length, grams in self.counts.items():
            for gram, count in grams.items():
                self.after[length][gram[:-1]][gram[-1]] = count

    def discount(self, length, count):
        once, twice, thrice, four = (sum(c == k for c in self.counts[length].values()) for k in (1, 2, 3, 4))
        share = once / (once + 2 * twice)
        return {0: 0, 1: 1 - 2 * share * twice / once, 2: 2 - 3 * share * thrice / twice}.get(
            count, 3 - 4 * share * four / thrice if thrice else 0
        )

    def probability(self, context, token):
        length = len(context) + 1
        lower = self.probability(context[1:], token) if context else 1 / VOCABULARY
        seen = self.after[length].get(context)
        if not seen:
            return lower
        count, total = seen.get(token, 0), sum(seen.values())
        freed = sum(self.discount(length, c) for c in seen.values())
        return (max(count - self.discount(length, count), 0) + freed * lower) / total


@pytest.mark.parametrize("order", [2, 3, 5])
def test_probabilities_sum_to_one_in_every_context(order):
    model = KneserNey(documents(), VOCABULARY, order, START)
    random = np.random.default_rng(1)
    for length in (0, 1, order - 1, 9):
        for _ in range(20):
            distribution = model.distribution(random.integers(VOCABULARY, size=length))
            assert distribution.min() > 0 and abs(distribution.sum() - 1) < 1e-12


@pytest.mark.parametrize("order", [2, 3])
def test_agrees_with_the_textbook(order):
    texts, new = documents(), documents(count=1, seed=7)[0]
    padded = [START] * (order - 1) + new.tolist()
    textbook = Textbook(texts, order)
    expected = [textbook.probability(tuple(padded[i : i + order - 1]), token) for i, token in enumerate(new.tolist())]
    np.testing.assert_allclose(KneserNey(texts, VOCABULARY, order, START).nats(new), -np.log(expected), rtol=1e-10)


def test_longer_contexts_help_where_text_repeats():
    text = np.tile(np.array([3, 1, 4, 1, 5, 9, 2, 6]), 30)
    short, long = (KneserNey([text], VOCABULARY, order, START).nats(text).mean() for order in (1, 4))
    assert long < 0.3 * short


def test_grams_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="5-grams of 50000 tokens do not fit"):
        KneserNey(documents(), 50_000, 5)
