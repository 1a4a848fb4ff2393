"""Interpolated modified Kneser-Ney: the counting model that `builtin:pycode` has to beat.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 3. An n-gram is one
int64, its last token in the lowest bits: shorter suffixes are masks, contexts are shifts, tables are sorted arrays.
"""

import numpy as np


class _Order:
    """Counts of the n-grams of one order, and of the contexts that they share."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray, bits: int):
        """`keys`: sorted distinct packed n-grams, m; `counts`: how often each was seen, or in how many contexts, m."""
        of = [max(1, int((counts == times).sum())) for times in (1, 2, 3, 4)]
        base = of[0] / (of[0] + 2 * of[1])
        raw = [times - (times + 1) * base * of[times] / of[times - 1] for times in (1, 2, 3)]
        discounts = np.clip([0.0, *raw], 0.0, [0.0, 1.0, 2.0, 3.0])
        taken = discounts[np.minimum(counts, 3)]
        self.keys, self.kept = keys, counts - taken
        contexts = keys >> bits  # sorted, because the keys are
        first = np.flatnonzero(np.diff(contexts, prepend=-1))
        self.contexts = contexts[first]
        self.totals = np.add.reduceat(counts, first).astype(np.float64)
        self.freed = np.add.reduceat(taken, first) / self.totals  # the share that every context hands to lower orders

    def interpolate(self, keys: np.ndarray, bits: int, lower: np.ndarray) -> np.ndarray:
        """Probability of the last token of each packed n-gram, given those of one order lower.

        After a context that was never seen the lower order stands.
        """
        at, seen = _find(self.contexts, keys >> bits)
        row, known = _find(self.keys, keys)
        kept = np.where(known, self.kept[row], 0.0)
        return np.where(seen, kept / self.totals[at] + self.freed[at] * lower, lower)


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index into a sorted table for each key, and whether the key is there."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys


class KneserNey:
    """An n-gram model of token ids below `vocabulary`; every document starts after `order` - 1 times `start`."""

    def __init__(self, documents: list[np.ndarray], vocabulary: int, order: int = 5, start: int = 0):
        self.vocabulary, self.order, self.start = vocabulary, order, start
        self.bits = (vocabulary - 1).bit_length()
        if self.bits * order > 63:
            raise ValueError(f"{order}-grams of {vocabulary} tokens do not fit into 63 bits; use a lower order.")
        keys, counts = np.unique(np.concatenate([self._pack(d) for d in documents]), return_counts=True)
        self.orders = [_Order(keys, counts, self.bits)]
        for length in range(order - 1, 0, -1):  # below the top, a count is the number of distinct tokens in front
            keys, counts = np.unique(keys & self._mask(length), return_counts=True)
            self.orders.insert(0, _Order(keys, counts, self.bits))

    def _mask(self, length: int) -> int:
        return (1 << (self.bits * length)) - 1

    def _pack(self, document: np.ndarray) -> np.ndarray:
        """The `order`-gram that ends at each token of a document, n."""
        padded = np.concatenate([np.full(self.order - 1, self.start), document]).astype(np.int64)
        keys = np.zeros(len(document), dtype=np.int64)
        for offset in range(self.order):
            keys = (keys << self.bits) | padded[offset : offset + len(document)]
        return keys

    def _probabilities(self, keys: np.ndarray) -> np.ndarray:
        """Probability of the last token of each packed `order`-gram given the tokens before it."""
        probabilities = np.full(len(keys), 1 / self.vocabulary)
        for length, order in enumerate(self.orders, start=1):
            probabilities = order.interpolate(keys & self._mask(length), self.bits, probabilities)
        return probabilities

    def nats(self, document: np.ndarray) -> np.ndarray:
        """Negative log-probability, in nats, of each token of a document, n."""
        return -np.log(self._probabilities(self._pack(document)))

    def distribution(self, context: np.ndarray) -> np.ndarray:
        """Probability of every token after `context`, of which the last `order` - 1 tokens count; `vocabulary`."""
        last = self._pack(np.append(context, 0))[-1]
        return self._probabilities(last + np.arange(self.vocabulary))
