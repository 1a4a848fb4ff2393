"""Bayesian-LoRA, its accuracy and its bits, against LoRA of the rank that it starts with."""

import copy

import peft
import torch
from contest import Problem, Split, accuracy, tuned
from ledger import Close, Order
from torch import Tensor, nn

import weft
from weft.adapters.bayesian_lora import precision

CLAIM = "Learning rank and bits of every factor keeps LoRA's accuracy with about 70 % fewer bit operations."
TARGETS = ["v_proj", "up_proj"]
R, WIDTH, CLASSES, VOCABULARY, LENGTH = 8, 32, 10, 16, 8
ROWS, STEPS, BATCH, GATES_LR, SIZE = 2048, 300, 64, 0.3, 4.0  # SIZE: of the update's singular values
SETTING = (
    f"A transformer block of width {WIDTH} with a frozen head for {CLASSES} classes; labels of one whose value and up "
    f"projections have moved by an update of rank 2, one in ten drawn at random; {ROWS} rows of {LENGTH} tokens, "
    f"{STEPS} steps of {BATCH} rows. r = {R}, λ_q = λ_r = 1e-3, gates_lr = {GATES_LR}: the gates can move as far as in "
    f"{round(GATES_LR / 0.01) * STEPS} steps at its default. Test accuracies, mean ranks, and bit operations of the "
    "adapters as a share of a float32 LoRA's, and as a share of those with all gates open, that is with 16-bit factors."
)
NOT_HERE = "DeBERTa and GLUE; nor energy, since the bits are learned and counted but not packed."
EXPECTED = [
    Close("Bayesian-LoRA", "LoRA", higher=True),
    Order("bits, of float32", 0.3),
    Order("bits, of open gates", 0.3),
    Order("mean rank", float(R)),
]


class Classifier(nn.Module):
    """One block of attention and an MLP, and logits at the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Parameter(torch.randn(LENGTH, WIDTH))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place
        heads = (m(x).unflatten(-1, (4, -1)).transpose(1, 2) for m in (self.q_proj, self.k_proj, self.v_proj))
        mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)
        x = nn.functional.layer_norm(x + self.o_proj(mixed), [WIDTH])[:, -1]
        return self.head(x + self.down_proj(nn.functional.gelu(self.up_proj(x))))


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    base = Classifier().eval()
    wanted = copy.deepcopy(base).requires_grad_(False)
    for name, layer in wanted.named_modules():
        if name.endswith(tuple(TARGETS)):
            u, v = (torch.linalg.qr(torch.randn(side, 2)).Q for side in layer.weight.shape)
            layer.weight += SIZE * u @ v.mT

    def split(rows: int, noise: float = 0.1) -> Split:
        ids = torch.randint(VOCABULARY, (rows, LENGTH))
        y = wanted(ids).argmax(-1)
        return ids, torch.where(torch.rand(rows) < noise, torch.randint(CLASSES, (rows,)), y)

    problem = Problem(base, split(ROWS), split(512), split(1024), nn.functional.cross_entropy, accuracy)
    contenders = {
        "Bayesian-LoRA": weft.BayesianLoraConfig(r=R, lora_alpha=R, gates_lr=GATES_LR, target_modules=TARGETS),
        "LoRA": peft.LoraConfig(r=R, lora_alpha=R, target_modules=TARGETS),
    }
    outcomes = {
        name: tuned(problem, config, steps=STEPS, batch_size=BATCH, seed=seed) for name, config in contenders.items()
    }
    learned = precision(outcomes["Bayesian-LoRA"].model).values()
    open_bits = sum(16 * R * (p.in_ + p.out + 1) for p in learned)
    lora_bits = sum(32 * R * (p.in_ + p.out) for p in learned)
    bits = sum(p.bits() for p in learned)
    return {
        **{name: outcome.score for name, outcome in outcomes.items()},
        "bits, of float32": bits / lora_bits,
        "bits, of open gates": bits / open_bits,
        "mean rank": sum(p.rank for p in learned) / len(learned),
    }
