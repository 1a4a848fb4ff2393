"""SALT against LoRA and against scaled and shifted singular values, on thin curves in noise."""

import peft
import torch
from contest import Problem, Split, pretrained, tuned
from ledger import Order
from torch import Tensor, nn

import weft

SIZE, PATCH, WIDTH = 24, 4, 48
IMAGES, STEPS, BATCH = 40, 120, 16
LORA, REST = 2, 3  # ranks, for equal counts
TOKENS = (SIZE // PATCH) ** 2
LAYERS = [(WIDTH, PATCH**2), (PATCH**2, WIDTH), *2 * [(TOKENS, TOKENS), (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH)]]
SMALLER = [min(sides) for sides in LAYERS]
COUNTS = {
    "SALT": sum(2 * (k // 10) + 2 * REST * (k - k // 10) for k in SMALLER),
    "LoRA": sum(LORA * sum(sides) for sides in LAYERS),
    "scale and shift": sum(2 * k for k in SMALLER),
}

CLAIM = "Scaling the top singular values beside a low-rank update of the rest does better than LoRA or values alone."
SETTING = (
    f"An MLP-mixer that finds bright discs in {SIZE} × {SIZE} images learns thin dark curves from {IMAGES} images, "
    f"{STEPS} steps of {BATCH}; Dice. SALT trains {COUNTS['SALT']} numbers (a tenth of the values, rank {REST}), LoRA "
    f"{COUNTS['LoRA']} (rank {LORA}), scale and shift of all values {COUNTS['scale and shift']}, which is all it has."
)
NOT_HERE = "SAM, and its medical benchmarks."
EXPECTED = [Order("SALT", "LoRA", higher=True), Order("SALT", "scale and shift", higher=True)]


class Mixer(nn.Module):
    """Logits of pixels, from two blocks that mix patches and then features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH**2, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.tokens = nn.ModuleList(nn.Linear(TOKENS, TOKENS) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, PATCH**2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(nn.functional.unfold(x[:, None], PATCH, stride=PATCH).mT)
        for i in range(2):
            h = h + self.tokens[i](self.norms[2 * i](h).mT).mT
            h = h + self.down[i](nn.functional.gelu(self.up[i](self.norms[2 * i + 1](h))))
        return nn.functional.fold(self.head(h).mT, SIZE, PATCH, stride=PATCH)[:, 0]


def discs(images: int) -> Split:
    """Bright discs in noise, and where they are."""
    y, x = torch.arange(SIZE).view(-1, 1), torch.arange(SIZE)
    middle, radius = SIZE * torch.rand(2, images, 3, 1, 1), 2 + 3 * torch.rand(images, 3, 1, 1)
    mask = ((x - middle[0]) ** 2 + (y - middle[1]) ** 2 < radius**2).any(1).float()
    return mask + 0.5 * torch.randn(mask.shape), mask


def curves(images: int) -> Split:
    """Two thin dark curves, one of them upright, in noise and a shading; and where they are."""
    x = torch.arange(SIZE)
    height, bend, frequency, phase = torch.rand(4, images, 2, 1)
    line = 6 + 12 * height + 4 * bend * torch.sin(x * (0.15 + 0.3 * frequency) + 6.28 * phase)
    hit = (x.view(-1, 1) - line[..., None, :]).abs() < 1
    mask = (hit[:, 0] | hit[:, 1].mT).float()
    shade = 0.5 * torch.sin(x / 7 + 6.28 * torch.rand(images, 1, 1))
    return shade - 0.9 * mask + 0.5 * torch.randn(mask.shape), mask


def loss(logits: Tensor, mask: Tensor) -> Tensor:
    p = logits.sigmoid()
    overlap = (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)
    return nn.functional.binary_cross_entropy_with_logits(logits, mask) + 1 - overlap


def dice(logits: Tensor, mask: Tensor) -> Tensor:
    found = (logits > 0).float()
    return (2 * (found * mask).sum((1, 2)) / (found.sum((1, 2)) + mask.sum((1, 2))).clamp(min=1)).mean()


def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    data = discs(1000)
    base = pretrained(Mixer(), loss, data, rate=5e-3, steps=300, batch_size=32)
    problem = Problem(base, curves(IMAGES), curves(100), curves(200), loss=loss, score=dice)
    targets = r"embed|head|(tokens|up|down)\.\d"
    contenders = {
        "SALT": weft.SaltConfig(r_lora=REST, target_modules=targets),
        "LoRA": peft.LoraConfig(r=LORA, lora_alpha=LORA, target_modules=targets),
        "scale and shift": weft.SaltConfig(ratio=1.0, target_modules=targets),
    }
    outcomes = {
        name: tuned(problem, config, steps=STEPS, batch_size=BATCH, seed=seed) for name, config in contenders.items()
    }
    assert {name: outcome.trainable for name, outcome in outcomes.items()} == COUNTS
    return {name: outcome.score for name, outcome in outcomes.items()}
