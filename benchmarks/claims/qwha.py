"""QWHA's start on a language model in two bits, beside random places and low-rank corrections of as many numbers."""

import copy

import peft
import torch
from ledger import Close, Order
from problem_pycode import windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import weft
from weft import builtin
from weft.adapters.qwha import QwhaDelta, calibrated

CLAIM = (
    "Sparse Walsh-Hadamard coefficients, placed and fitted by AdaAlloc, cancel more of a quantisation error than "
    "random places or a low-rank correction of the same size, and have a higher rank than the largest coefficients do."
)
R, BITS, GROUP, WINDOW, ROWS = 4, 2, 64, 256, 32
SETTING = (
    f"builtin:pycode (2.3 M parameters), every linear layer rounded to nearest in {BITS} bits, groups of {GROUP}; a "
    f"correction of r·(in + out) numbers a layer, r = {R}, found on {ROWS} windows of {WINDOW} tokens; then, without "
    f"training, on {ROWS} others of unseen modules: the loss in nats a token, and the mean over layers of the error of "
    "a layer's output, relative to that of the quantised layer. LoRA is the best correction of rank r of that output, "
    "in closed form, SVD that of the weight. A seed draws the windows and the random places."
)
NOT_HERE = "fine-tuning after the start, GPTQ as the quantiser, models of 3 B parameters and more, and speed."
EXPECTED = [
    Order("random places, loss", "no correction, loss"),
    Order("AdaAlloc, loss", "random places, loss"),
    Order("AdaAlloc, error", "random places, error", ratio=True),
    Order("AdaAlloc, error", "LoRA, error", ratio=True),
    Order("AdaAlloc, loss", "LoRA, loss"),
    Close("AdaAlloc, error", "largest coefficients, error"),
    Order("AdaAlloc, rank", "largest coefficients, rank", higher=True, ratio=True),
]


def rounded(w: Tensor) -> Tensor:
    """Round to nearest: each group of inputs has a step and an offset of its own."""
    parts = w.unflatten(1, (-1, GROUP))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = ((high - low) / (2**BITS - 1)).clamp_min(1e-12)
    return (((parts - low) / step).round() * step + low).flatten(1)


def low_rank(error: Tensor, g: Tensor | None) -> Tensor:
    """The best correction of rank R of error·G^½, or of the error itself."""
    root = torch.eye(error.shape[1], dtype=torch.float64)
    if g is not None:
        s, u = torch.linalg.eigh(g + 1e-4 * g.diagonal().mean() * root)
        root = u * s.sqrt()
    u, s, vh = torch.linalg.svd(error @ root, full_matrices=False)
    return torch.linalg.solve(root, (u[:, :R] * s[:R]) @ vh[:R], left=False)


@torch.no_grad()
def measure(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    full = AutoModelForCausalLM.from_pretrained(builtin.model_path("pycode"), dtype=torch.float32).eval()
    seen, unseen = (
        {"input_ids": ids, "labels": ids}
        for ids in (windows("train", ROWS, WINDOW, seed), windows("test", ROWS, WINDOW, seed))
    )
    names = [name for name, m in full.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    base = copy.deepcopy(full)
    for name in names:
        base.get_submodule(name).weight.copy_(rounded(base.get_submodule(name).weight))
    errors = {n: (full.get_submodule(n).weight - base.get_submodule(n).weight).double() for n in names}
    moments, judged = (calibrated(full, set(names), [batch]) for batch in (seen, unseen))
    corrections: dict[str, dict[str, Tensor]] = {
        "no correction": {n: torch.zeros_like(e) for n, e in errors.items()},
        "SVD": {n: low_rank(e, None) for n, e in errors.items()},
        "LoRA": {n: low_rank(e, moments[n]) for n, e in errors.items()},
    }
    kinds = {"random places": "random", "largest coefficients": "magnitude", "AdaAlloc": "adaalloc"}
    for label, allocation in kinds.items():
        config = weft.QwhaConfig(r=R, allocation=allocation, target_modules=names, seed=seed)
        weft.prepare(base, config, original_weights=full, batches=[seen])
        model = peft.get_peft_model(copy.deepcopy(base), config)
        corrections[label] = {d.name: d.delta().double() for d in model.modules() if isinstance(d, QwhaDelta)}
    figures = {"full precision, loss": float(full(**unseen).loss)}
    for label, found in corrections.items():
        corrected = copy.deepcopy(base)
        left = []
        for n, update in found.items():
            corrected.get_submodule(n).weight.add_(update.float())
            before, after = (((e @ judged[n]) * e).sum().sqrt() for e in (errors[n], errors[n] - update))
            left.append(float(after / before))
        figures[f"{label}, loss"] = float(corrected(**unseen).loss)
        figures[f"{label}, error"] = sum(left) / len(left)
        if label in kinds:
            ranks = [float(torch.linalg.matrix_rank(update)) for update in found.values()]
            figures[f"{label}, rank"] = sum(ranks) / len(ranks)
    return figures
