"""Train and judge `builtin:pycode`, a causal language model of Python code.

    python -m weft.builtin.train_pycode --out DIR [--resume] [--minutes 10]   # train, then write the folder to DIR
    python -m weft.builtin.train_pycode --evaluate [--out DIR]                # print the figures of the model card

The text is the standard library of the running interpreter, without the modules of `builtin:stdlib`. Each epoch shows a
module either whole or cut (a coin for each module): at first into its top-level blocks, in later epochs into its
functions, methods and small classes. So the model learns to write modules and also to begin and to finish a short piece
of code, which is all that fits into its context; every document ends with the eos token.
"""

import argparse
import ast
import json
import math
import re
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from weft.builtin import _corpus, _ngram
from weft.files import whole_file

VOCABULARY = 2048
CONTEXT = 256
EOS, PAD = "<|endoftext|>", "<|pad|>"
EOS_ID, PAD_ID = 0, 1

STEPS = 4000
WARM_UP = 200
BLOCK_EPOCHS = 3  # epochs that cut modules into top-level blocks; the later ones cut them into definitions
BATCH = 16  # windows of CONTEXT tokens a step
PEAK_RATE = 3e-3
WEIGHT_DECAY = 0.1  # of matrices only; norms go free
DROPOUT = 0.05  # on what each block adds to the residual stream

SAMPLES = 100
GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_new_tokens": 160}

# A line break stays with the indentation after it, and a word with the one space before it.
_PIECES = r"\n+ *| ?[A-Za-z_]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9_]+|\s+"


# --- text to tokens ---------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCABULARY entries; decoding gives back every text byte for byte."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def top_level_blocks(text: str) -> list[str]:
    """Blocks of a module that two or more blank lines separate, each ending with one line break."""
    return [block + "\n" for block in re.split(r"\n\n\n+(?=\S)", text.strip("\n"))]


def definitions(text: str) -> list[str]:
    """Source of every function, method and class of a module, at any depth, moved to the left margin."""
    lines, sources = text.split("\n"), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min(part.lineno for part in (node, *node.decorator_list))
            sources.append(textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])) + "\n")
    return sources


def encode_document(tokenizer, text: str) -> np.ndarray:
    """Token ids of one document, its closing eos included."""
    return np.array([*tokenizer.backend_tokenizer.encode(text).ids, EOS_ID], dtype=np.int64)


def epoch_windows(whole: list[np.ndarray], cut: list[list[np.ndarray]], seed: int, epoch: int) -> np.ndarray:
    """The windows of one epoch, n x (CONTEXT + 1), a function of seed and epoch alone."""
    random = np.random.default_rng((seed, epoch))
    documents = []
    for module, blocks in zip(whole, cut, strict=True):
        documents += [module] if random.random() < 0.5 else blocks
    order = random.permutation(len(documents))
    stream = np.concatenate([np.array([EOS_ID])] + [documents[i] for i in order])
    stream = stream[random.integers(CONTEXT) :]
    count = (len(stream) - 1) // CONTEXT
    windows = np.lib.stride_tricks.sliding_window_view(stream, CONTEXT + 1)[::CONTEXT][:count]
    return windows[random.permutation(count)]


def batches(
    whole: list[np.ndarray],
    blocks: list[list[np.ndarray]],
    short: list[list[np.ndarray]],
    seed: int,
    start: int,
) -> Iterator[np.ndarray]:
    """Batches, BATCH x (CONTEXT + 1), from step `start` on; the windows that fill no batch are left to later epochs."""
    step, epoch = 0, 0
    while True:
        windows = epoch_windows(whole, blocks if epoch < BLOCK_EPOCHS else short, seed, epoch)
        for first in range(0, len(windows) - BATCH + 1, BATCH):
            if step >= start:
                yield windows[first : first + BATCH]
            step += 1
        epoch += 1


# --- the model and its training ---------------------------------------------------------------------------------------


def new_model(seed: int) -> LlamaForCausalLM:
    """A fresh float32 model: three layers, four query heads on two key-value heads, tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    config._attn_implementation = "eager"  # at 256 tokens the compiler makes it faster than sdpa on a CPU
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM) -> list:
    """Drop a share of what attention and MLP add to the stream; returns the hooks, to be removed before saving."""

    def drop(module, _inputs, output):
        return F.dropout(output, DROPOUT, module.training)

    ends = [end for layer in model.model.layers for end in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    return [end.register_forward_hook(drop) for end in ends]


def rate_at(step: int, steps: int) -> float:
    """Learning rate of a step counted from zero: linear warm-up, then a cosine to zero."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def new_optimiser(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def save_checkpoint(path: Path, model, optimiser, step: int, seed: int) -> None:
    """Write weights and both moments to one safetensors file, by write-then-rename."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        state = optimiser.state[weight]
        tensors |= {f"weight.{name}": weight.detach(), f"exp_avg.{name}": state["exp_avg"]}
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"step": str(step), "seed": str(seed)})


def load_checkpoint(path: Path, model, optimiser, seed: int) -> int:
    """Fill model and optimiser from a checkpoint of the same run; returns the number of steps done."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if metadata["seed"] != str(seed):
            raise ValueError(f"{path} was written with --seed {metadata['seed']}; resume with that, not with {seed}.")
        step = int(metadata["step"])
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(file.get_tensor(f"weight.{name}"))
                moments = {key: file.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
                optimiser.state[weight] = {"step": torch.tensor(float(step)), **moments}
    return step


def loss_of(model, windows: torch.Tensor) -> torch.Tensor:
    """Mean nats a token of windows, n x (CONTEXT + 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def take_step(forward, optimiser, windows: torch.Tensor, step: int, steps: int, seed: int) -> float:
    """One step of training on BATCH x (CONTEXT + 1) tokens; returns the loss before it, in nats a token."""
    for group in optimiser.param_groups:
        group["lr"] = rate_at(step, steps)
    torch.manual_seed(seed * 1_000_003 + step)  # dropout depends on the step, so a resumed run draws the same
    loss = loss_of(forward, windows)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return loss.item()


def train(out: Path, steps: int, seed: int, minutes: float, resume: bool, compiled: bool) -> None:
    """Train up to `steps` or for `minutes` of wall time; a finished run writes the model folder `out`."""
    rows = _corpus.training_rows()
    tokenizer = train_tokenizer([row["text"] for row in rows])
    whole = [encode_document(tokenizer, row["text"]) for row in rows]
    blocks = [[encode_document(tokenizer, block) for block in top_level_blocks(row["text"])] for row in rows]
    short = [[encode_document(tokenizer, code) for code in definitions(row["text"])] for row in rows]
    short = [[document for document in documents if len(document) < CONTEXT] for documents in short]
    held = np.concatenate([encode_document(tokenizer, row["text"]) for row in _corpus.stdlib_rows("validation")])
    held = held[: (len(held) - 1) // CONTEXT * CONTEXT + 1]
    judging = torch.from_numpy(np.lib.stride_tricks.sliding_window_view(held, CONTEXT + 1)[::CONTEXT].copy())
    model = new_model(seed)
    print(f"{len(rows)} modules, {sum(map(len, whole))} tokens, {model.num_parameters()} parameters", flush=True)

    optimiser, checkpoint = new_optimiser(model), out.with_name(out.name + ".checkpoint.safetensors")
    step = load_checkpoint(checkpoint, model, optimiser, seed) if resume and checkpoint.exists() else 0
    hooks = add_dropout(model)
    forward = torch.compile(model) if compiled else model
    source, began, recent = batches(whole, blocks, short, seed, step), time.monotonic(), []
    while step < steps and time.monotonic() - began < minutes * 60:
        model.train()
        recent.append(take_step(forward, optimiser, torch.from_numpy(next(source).copy()), step, steps, seed))
        step += 1
        if step % 250 == 0 or step == steps:
            save_checkpoint(checkpoint, model, optimiser, step, seed)
            model.eval()
            with torch.no_grad():
                judged = sum(loss_of(model, part).item() * len(part) for part in judging.split(BATCH)) / len(judging)
            line = {"step": step, "train": sum(recent) / len(recent), "validation": judged}
            print(json.dumps(line | {"minutes": (time.monotonic() - began) / 60}), flush=True)
            recent.clear()
    for hook in hooks:
        hook.remove()
    if step < steps:
        save_checkpoint(checkpoint, model, optimiser, step, seed)
        print(f"paused after step {step} of {steps}; go on with --resume")
        return
    write_folder(out, model, tokenizer)
    checkpoint.unlink()


def write_folder(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write an ordinary Hugging Face folder with weights in bfloat16."""
    model.config._attn_implementation = "sdpa"
    model.bfloat16().eval()
    model.generation_config = GenerationConfig(
        **GENERATION, bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


# --- judging it -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_nats(model, document: np.ndarray, stride: int = CONTEXT // 2) -> np.ndarray:
    """Negative log-probability, in nats, of each token of one document (its eos included), n.

    The document starts after an eos; each token sees at least CONTEXT - `stride` tokens before it, where there are any.
    """
    stream = torch.from_numpy(np.concatenate([[EOS_ID], document]))
    nats, done = [], 0
    for first in range(0, len(document), stride):
        window = stream[first : first + CONTEXT + 1]
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
        losses = F.cross_entropy(logits, window[1:], reduction="none")
        nats.append(losses[done - first :])
        done = first + len(window) - 1
        if done == len(document):
            break
    return torch.cat(nats).numpy()


@torch.no_grad()
def sample_texts(model, tokenizer, count: int = SAMPLES, seed: int = 0) -> list[str]:
    """Samples from the bare start token, with the sampling settings of the model's own generation_config.json."""
    torch.manual_seed(seed)
    start = torch.full((count, 1), EOS_ID)
    ids = model.generate(start, attention_mask=torch.ones_like(start))
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def parses(text: str) -> bool:
    """Whether a sample without its last line, which may be torn, is Python that says something."""
    kept = text.rpartition("\n")[0]
    try:
        return bool(ast.parse(kept).body)
    except (SyntaxError, ValueError):
        return False


def evaluate(folder: Path) -> dict[str, float]:
    """The figures of the model card: size, nats a token against a 5-gram on the same tokens, samples that parse."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    training = [encode_document(tokenizer, row["text"]) for row in _corpus.training_rows()]
    held_out = {
        split: [encode_document(tokenizer, row["text"]) for row in _corpus.stdlib_rows(split)]
        for split in _corpus.SPLITS
    }
    opponent = _ngram.KneserNey(training, VOCABULARY, order=5, start=EOS_ID)
    ours = {split: np.concatenate([token_nats(model, d) for d in rows]) for split, rows in held_out.items()}
    theirs = {split: np.concatenate([opponent.nats(d) for d in rows]) for split, rows in held_out.items()}
    figures = {
        "parameters": model.num_parameters(),
        "training_tokens": sum(map(len, training)),
        "held_out_tokens": sum(map(len, ours.values())),
        "nats_per_token": float(np.concatenate(list(ours.values())).mean()),
        "five_gram_nats_per_token": float(np.concatenate(list(theirs.values())).mean()),
    }
    for split in _corpus.SPLITS:
        figures[f"nats_per_token_{split}"] = float(ours[split].mean())
        figures[f"five_gram_nats_per_token_{split}"] = float(theirs[split].mean())
    samples = sample_texts(model, tokenizer)
    figures |= {"samples": SAMPLES, "samples_that_parse": sum(map(parses, samples))}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weft.builtin.train_pycode", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pycode", help="the model's folder")
    parser.add_argument("--evaluate", action="store_true", help="print the figures of the folder, train nothing")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint beside the folder")
    parser.add_argument("--minutes", type=float, default=math.inf, help="pause after so much wall time")
    parser.add_argument("--steps", type=int, default=STEPS, help="where the schedule ends; may move on resuming")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="about 1.8 times faster; needs a C++ compiler")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.evaluate:
        print(json.dumps(evaluate(options.out), indent=2))
        return
    train(options.out, options.steps, options.seed, options.minutes, options.resume, options.compile)


if __name__ == "__main__":
    main()
