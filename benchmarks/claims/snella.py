"""SNELLA against LoRA at equal parameters, and without its softmax or its learned budget, on turned digits."""

import peft
import torch
from contest import Problem, Split, accuracy, tuned
from ledger import Order
from sklearn.datasets import load_digits
from torch import Tensor, nn

import weft
from weft.adapters.snella import SnellaDelta

CLAIM = "A sparse update of high rank from a kernel, with a learned budget, does better than LoRA at equal parameters."
WIDTH, Q_DIM, STEPS, SHARE, NOISE = 32, 8, 100, 0.5, 0.1
BEFORE = 600  # rows of the pre-training
SETTING = (
    f"A one-block ViT of width {WIDTH} pre-trained on {BEFORE} of scikit-learn's digits (8 × 8, patches of 2 × 2), "
    f"then {STEPS} steps of 32 rows on 400 other digits, turned by 90 degrees, one label in ten drawn at random; the "
    f"head is frozen. SNELLA with q_dim = {Q_DIM} that removes {SHARE:.0%} of the entries, the same with a = 0 (no "
    "softmax), the same with a budget in proportion to the layers' sizes (uniform), and LoRA with "
    f"r = {Q_DIM}, which has 3 parameters a layer fewer. Test accuracies."
)
NOT_HERE = "ViT-B/16, FGVC and VTAB; memory; and a product PQᵀ in place of the kernel."
EXPECTED = [
    Order("SNELLA", "LoRA", higher=True),
    Order("SNELLA", "no softmax", higher=True),
    Order("SNELLA", "uniform", higher=True),
]
TARGETS = ["query", "key", "value", "proj", "fc1", "fc2"]


class Vit(nn.Module):
    """Images (8 × 8) to logits of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(4, WIDTH), nn.Parameter(0.5 * torch.randn(16, WIDTH))
        self.query, self.key, self.value, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2, self.head = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        x = self.embed(patches) + self.place
        h = nn.functional.layer_norm(x, [WIDTH])
        heads = (m(h).unflatten(-1, (4, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        x = x + self.proj(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2))
        x = x + self.fc2(nn.functional.gelu(self.fc1(nn.functional.layer_norm(x, [WIDTH]))))
        return self.head(nn.functional.layer_norm(x, [WIDTH]).mean(1))


def without(part: str):
    """Attaches SNELLA without the softmax or without the learned budget."""

    def attach(base: nn.Module) -> nn.Module:
        model = peft.get_peft_model(base, snella())
        deltas = [m for m in model.modules() if isinstance(m, SnellaDelta)]
        if part == "budget":
            controller = deltas[0].controller
            controller.scores = lambda: controller.sizes
            return model
        for d in deltas:
            d.a.requires_grad_(False).zero_()
            d.g.requires_grad_(False)  # a number of the softmax
        return model

    return attach


def snella() -> weft.SnellaConfig:
    return weft.SnellaConfig(q_dim=Q_DIM, target_ratio=SHARE, target_modules=TARGETS)


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    images = torch.tensor(images, dtype=torch.float32)[order].unflatten(1, (8, 8)) / 8 - 1
    labels = torch.tensor(labels)[order]
    base = Vit()
    optimizer = torch.optim.Adam(base.parameters(), lr=3e-3)
    for _ in range(400):
        rows = torch.randint(BEFORE, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(base(images[rows]), labels[rows]).backward()
        optimizer.step()

    def split(start: int, rows: int | None = None, noise: float = NOISE) -> Split:
        x, y = (t[BEFORE + start :][:rows] for t in (images, labels))
        drawn = torch.rand(len(y)) < noise
        return x.rot90(1, (1, 2)), torch.where(drawn, torch.randint(10, y.shape), y)

    splits = split(0, 400), split(400, 200), split(600, noise=0.0)
    problem = Problem(base, *splits, nn.functional.cross_entropy, accuracy)
    contenders = {
        "SNELLA": snella(),
        "no softmax": without("softmax"),
        "uniform": without("budget"),
        "LoRA": peft.LoraConfig(r=Q_DIM, lora_alpha=Q_DIM, target_modules=TARGETS),
    }
    return {
        name: tuned(problem, attach, steps=STEPS, batch_size=32, seed=seed).score for name, attach in contenders.items()
    }
