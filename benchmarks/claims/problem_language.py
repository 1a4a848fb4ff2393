"""A small decoder that knows one language and is to learn another like it."""

from __future__ import annotations

import torch
from contest import Problem
from torch import Tensor, nn

VOCABULARY = 24
LENGTH = 24
WIDTH = 32
LINEARS = ["qkv", "out", "up", "down"]
PRETRAINING = 300  # steps


class Decoder(nn.Module):
    """One layer with two causal heads: tokens to the logits of what follows each but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        read = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x))[:, 1:]


class Language:
    """The next token's logits are the sum of two table rows, one for each of the last two tokens."""

    def __init__(self, tables: Tensor) -> None:
        self.tables = tables

    def other(self, share: float) -> Language:
        """A language whose tables have this share of their variance anew."""
        return Language((1 - share) ** 0.5 * self.tables + share**0.5 * tables())

    def sample(self, rows: int) -> tuple[Tensor, Tensor]:
        """Texts of LENGTH + 1 tokens, and the probabilities that all but the first two were drawn from."""
        text = torch.randint(VOCABULARY, (rows, 2))
        chances = []
        while text.shape[1] <= LENGTH:
            chances.append((self.tables[0, text[:, -1]] + self.tables[1, text[:, -2]]).softmax(-1))
            text = torch.cat([text, torch.multinomial(chances[-1], 1)], dim=1)
        return text, torch.stack(chances, dim=1)


def tables() -> Tensor:
    return 1.5 * torch.randn(2, VOCABULARY, VOCABULARY)


def cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Of the model's distribution from the language's own: cross-entropy in excess of what no model can avoid."""
    return nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="none").sum(-1).mean()


def another_language(rows: int, share: float = 0.5) -> Problem:
    """A decoder pre-trained on one language, and texts of another. Draws from the global stream."""
    model, known = Decoder(), Language(tables())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, PRETRAINING)
    for _ in range(PRETRAINING):
        text, _ = known.sample(64)
        optimizer.zero_grad()
        cross_entropy(model(text[:, :-1]), text[:, 2:]).backward()
        optimizer.step()
        scheduler.step()
    new = known.other(share)
    (train, _), (validation, _), (test, chances) = new.sample(rows), new.sample(256), new.sample(512)
    pairs = ((text[:, :-1], text[:, 2:]) for text in (train, validation))
    return Problem(model, *pairs, (test[:, :-1], chances), cross_entropy, divergence)
