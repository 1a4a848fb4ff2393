"""What the studies on real models and data say of the papers: lines of the ledger, from the results that lie there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from ledger import interval

from weft.report.study import read
from weft.run.ranking import Pair
from weft.run.stream import summary

BENCHMARKS = Path(__file__).parents[1]
STUDIES = BENCHMARKS.parent / "docs" / "results"
sys.path.append(str(BENCHMARKS))  # each study's own file knows how to read its results


@dataclass(frozen=True)
class Line:
    """One claim: whose, what it says, what was found, and the word for that."""

    method: str
    claim: str
    found: str
    word: str


# study of `weft compare`, method, claim in words, who is said to be better than whom
TRAINED = (
    ("fine-tuning", "galore", "as good as AdamW on all weights", "full@galore", "full@hf:adamw_torch"),
    ("fine-tuning", "owlore", "layers drawn by outliers beat a LoRA", "full@owlore", "peft:lora"),
    ("fine-tuning", "owlore", "layers drawn by outliers beat ones drawn evenly", "full@owlore", "full@owlore#uniform"),
    ("fine-tuning", "owlore", "layers drawn by outliers beat GaLore", "full@owlore", "full@galore"),
    ("fine-tuning", "owlore", "they beat GaLore of as small a state", "full@owlore", "full@galore#small"),
    ("fine-tuning", "sara", "small weights, trained, beat a LoRA of equal size", "full@sara", "peft:lora"),
    ("fine-tuning", "lora_pro", "gradients near to full ones beat plain LoRA", "peft:lora@lora_pro", "peft:lora"),
    ("wide", "sara", "small weights, trained, beat a LoRA of equal size", "full@sara", "peft:lora"),
    ("wide", "sara", "the pull to low rank helps", "full@sara", "full@sara#alone"),
    ("pretraining", "galore", "as good as AdamW on all weights", "full@galore", "full@hf:adamw_torch"),
    ("pretraining", "galore", "moments of 8 bits are as good", "full@galore#8bit", "full@galore"),
    ("pretraining", "dct_projection", "columns of a DCT are as good as GaLore's", "full@dct_projection", "full@galore"),
    ("pretraining", "sltrain", "near training at full rank", "sltrain", "full@hf:adamw_torch"),
    ("pretraining", "sltrain", "well under plain low rank", "sltrain", "lowrank"),
    ("pretraining", "lost", "near training at full rank", "lost", "full@hf:adamw_torch"),
    ("pretraining", "lost", "well under plain low rank", "lost", "lowrank"),
    ("pretraining", "sst", "closes most of the gap that ReLoRA leaves", "sst", "relora"),
    ("pretraining", "sst", "near training at full rank", "sst", "full@hf:adamw_torch"),
    ("larger", "galore", "as good as AdamW, at four times the size (one seed)", "full@galore", "full@hf:adamw_torch"),
    ("larger", "sltrain", "near full rank, at four times the size (one seed)", "sltrain", "full@hf:adamw_torch"),
)
CONVOLUTIONAL = ("resnet20", "resnet32", "resnet56", "mobilefacenet")
COMMANDS = {
    "fine-tuning": "python benchmarks/optimiser_studies.py --data-dir DIR --study fine-tuning",
    "wide": "python benchmarks/optimiser_studies.py --data-dir DIR --study wide",
    "pretraining": "python benchmarks/optimiser_studies.py --data-dir DIR --study pretraining",
    "larger": "python benchmarks/optimiser_studies.py --data-dir DIR --study larger",
    **{name: f"python benchmarks/compress_convolutions.py --data-dir DIR --model {name}" for name in CONVOLUTIONAL},
    "prose7m": "python benchmarks/compression_claims.py --data-dir DIR",
    "squeezed": "python benchmarks/compression_studies.py --data-dir DIR",
    "maestro": "python benchmarks/maestro.py --data-dir DIR",
    "trp": "python benchmarks/trp.py --data-dir DIR",
    "trained": "python benchmarks/trained_compression.py --data-dir DIR",
    "faces": "python benchmarks/verification.py --data-dir DIR",
    "graphs": "python benchmarks/sst_graphs.py --data-dir DIR",
    "translation": "python benchmarks/sst_translation.py --data-dir DIR",
    "factorllm": "python benchmarks/factorllm.py --data-dir DIR",
    "lengths": "python benchmarks/greenformers.py",
    "thin": "python benchmarks/greenformers.py --accuracy --data-dir DIR",
    "segmentation": "python benchmarks/segmentation.py --data-dir DIR",
    "shift": "python benchmarks/shift.py --data-dir DIR",
    "omniglot": "python benchmarks/omniglot.py --data-dir DIR",
    "clicks": "python benchmarks/ctr.py --data-dir DIR",
    "streams": "python benchmarks/streams.py --data-dir DIR",
}
CLICKS = (  # arms of benchmarks/ctr.py, so many times smaller
    ("{}× features", "original"),
    ("{}× features, tuned", "original, tuned"),
    ("{}× features, tuned", "{}× weights, tuned"),
    ("{}× features, tuned", "{}× random, whole"),
)
MIMICKED = "outputs mimicked beat singular values cut, at keep {keep}"


def told(difference: float, low: float, high: float, unit: str = "") -> str:
    """A difference with its interval, and in what."""
    import arms

    scale = 100 if unit == "points" else 1
    return f"{arms.told(scale * difference, scale * low, scale * high)} {unit}".rstrip()


def verdict(low: float, high: float) -> str:
    """Whether the first of two is better, by the interval of how far it is above the other."""
    return "holds" if low > 0 else "reversed" if high < 0 else "tie"


def trained() -> Iterator[tuple[str, Line]]:
    """Of the studies of `weft compare`: lower losses are better."""
    for study, method, claim, better, other in TRAINED:
        if not (STUDIES / study / "results.jsonl").exists():
            continue
        pair: Pair = read(STUDIES / study).ranking.pair(better, other)
        word = {better: "holds", other: "reversed", None: "tie"}[pair.better]
        found = f"{better} against {other}: {told(pair.difference, pair.low, pair.high)} nats"
        yield study, Line(method, claim, found, word)


def convolutions() -> Iterator[tuple[str, Line]]:
    for name in CONVOLUTIONAL:
        path = BENCHMARKS / "results" / "convolutions" / f"{name}.json"
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else ():
            low, high = row["interval"]
            word = verdict(low, high)
            found = f"{name}, shared out by {row['allocate']}: {told(row['apart'], low, high, 'points')}"
            yield name, Line("atomic_feature_mimicking", MIMICKED.format(keep=row["keep"]), found, word)


def clicks() -> Iterator[tuple[str, Line]]:
    import ctr

    for data in ctr.SEEDS:
        rows = ctr.measured(data)
        models = ", ".join(dict.fromkeys(row["model"] for row in rows))
        for times, (one, other) in product(ctr.SMALLER, CLICKS) if rows else ():
            mine, theirs = one.format(times), other.format(times)
            apart, low, high = ctr.above(rows, mine, theirs)
            found = f"{models} on {data}: {told(apart, low, high, 'points')}"
            yield "clicks", Line("atomic_feature_mimicking", f"{mine} above {theirs} in AUC", found, verdict(low, high))


def squeezed() -> Iterator[tuple[str, Line]]:
    import compression_studies as compression

    for task, study in compression.finished():
        for (better, worse), keep, (place, corpus) in product(
            compression.CLAIMS, study.tables, enumerate(study.corpora)
        ):
            word, shown = compression.verdict(study, keep, place, better, worse)
            if shown:
                found = f"{task}, {compression.named(corpus)}: {shown} nats"
                yield "squeezed", Line(better, f"{better} below {worse}, keep {keep:g}", found, word)


def compressed() -> Iterator[tuple[str, Line]]:
    import compression_claims as claims

    if not claims.out("prose7m_llama").exists():
        return
    document = json.loads(claims.out("prose7m_llama").read_text(encoding="utf-8"))
    for name, claim, corpus, found in claims.findings(document):
        word, _, difference = found.partition(", ")
        yield "prose7m", Line(name, claim, f"{corpus}: {difference}", word)


def cut() -> Iterator[tuple[str, Line]]:
    import maestro

    for task, curves in maestro.accuracies().items():
        for share, each in curves.items():
            apart = each["maestro"] - each["dense"]
            low, high = interval(apart)
            word = verdict(low, high)
            claim = f"trained in order, then cut to {share} of the multiplications, beats SVD of the dense model"
            yield "maestro", Line("maestro", claim, f"{task}: {told(float(np.mean(apart)), low, high, 'points')}", word)


def pruned() -> Iterator[tuple[str, Line]]:
    import trp

    path = trp.RESULTS / "resnet20.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    for form in trp.FORMS if rows else ():
        apart = (trp.outcomes(rows, form, trp.AFTER[-1]).mean(0) - trp.outcomes(rows, form, trp.BASELINE)).mean(0)
        low, high = interval(apart)
        word = verdict(low, high)
        claim = "trained with cuts, then cut to half of the multiplications, beats cut first and trained as long"
        found = f"resnet20, form {form}, {rows[0]['settings']['steps']} steps: "
        yield "trp", Line("trp", claim, found + told(float(np.mean(apart)), low, high, "points"), word)


def graphs() -> Iterator[tuple[str, Line]]:
    import arms
    import sst_graphs

    tested = sst_graphs.study_of().tested()
    for problem, (one, other) in product(sst_graphs.PROBLEMS, sst_graphs.PAIRS):
        if "sst" in one and (problem, one) in tested:
            mine, its = tested[problem, one], tested[problem, other]
            score = next(iter(mine[0]["scores"]))
            word, shown = arms.order(mine, its, score)
            yield "graphs", Line("sst", f"{one} above {other}", f"{problem}, {score}: {shown}", word)


def translated() -> Iterator[tuple[str, Line]]:
    import sst_translation

    tested = {arm: runs for (_, arm), runs in sst_translation.study_of().tested().items()}
    for one, other, score, word, shown in sst_translation.verdicts(tested):
        found = f"multi30k, {'nats a token' if score == 'loss' else score}: {shown}"
        yield "translation", Line("sst", f"{one} better than {other}", found, word)


def adapted() -> Iterator[tuple[str, Line]]:
    import arms
    import omniglot
    import segmentation
    import shift

    for name, module, score in (("segmentation", segmentation, "Dice"), ("shift", shift, "jpeg")):
        tested = module.study_of().tested()
        for problem, one, other, word, shown in arms.orders(tested, module.PAIRS, score):
            yield name, Line(one.partition(",")[0], f"{one} above {other}", f"{problem}, {score}: {shown}", word)
    for problem, claim, word, shown in omniglot.claims(omniglot.study_of().tested()):
        yield "omniglot", Line("block_lora", claim, f"{problem}: {shown}", word)


def streamed() -> Iterator[tuple[str, Line]]:
    import streams

    methods = json.loads(streams.RESULTS.read_text(encoding="utf-8"))["methods"] if streams.RESULTS.exists() else {}
    if "codyra" not in methods:
        return
    # seeds × (the start, then after each task) × tasks
    mine, lora = (np.array(methods[name]["matrices"]) for name in ("codyra", "peft:lora"))
    lost = [np.array([summary(matrix, higher=True)["forgotten"] for matrix in each.tolist()]) for each in (mine, lora)]
    claims = {
        "forgets less than a merged LoRA": lost[1] - lost[0],
        "learns a new task as well": np.diagonal((mine - lora)[:, 1:], axis1=1, axis2=2),
        "is better on all tasks after the last": (mine - lora)[:, -1],
    }
    for claim, apart in claims.items():
        low, high = interval(apart.ravel())
        found = f"five tasks: {told(float(apart.mean()), low, high, 'points')}"
        yield "streams", Line("codyra", claim, found, verdict(low, high))


def routed() -> Iterator[tuple[str, Line]]:
    import factorllm

    for one, other, corpus, word, shown in factorllm.verdicts(factorllm.tested_arms(factorllm.study_of())):
        yield "factorllm", Line("factorllm", f"{one} below {other}", f"{corpus}: {shown} nats", word)


def shortened() -> Iterator[tuple[str, Line]]:
    import greenformers

    for what, length, word in greenformers.turns(greenformers.ratios(greenformers.measured())):
        claim = "thin factors need less on short inputs, sums over the sequence from 512 tokens on"
        yield "lengths", Line("greenformers", claim, f"{what}: from {length} tokens on", word)
    for arm, shown, word in greenformers.near(greenformers.study_of()):
        yield "thin", Line("greenformers", f"{arm} within a point of full on SST-2", shown, word)


def repaired() -> Iterator[tuple[str, Line]]:
    import trained_compression as compression

    tested = compression.study_of().tested()
    for problem in dict.fromkeys(problem for problem, _ in tested):
        mine = {arm: tested[problem, arm] for arm in compression.ARMS if (problem, arm) in tested}
        scores = compression.SCORES[problem.partition(" keep ")[0]]
        for arm, claim, score, word, shown in compression.verdicts(mine, scores):
            if arm != "svd, trained":
                yield "trained", Line(compression.ARMS[arm][0], claim, f"{problem}, {score}: {shown}", word)


def faces() -> Iterator[tuple[str, Line]]:
    import verification

    if not verification.OUT.exists():
        return
    first = json.loads(verification.OUT.read_text(encoding="utf-8").splitlines()[0])
    rows = verification.Rows(verification.OUT, first["settings"])
    for claim, word, apart in verification.claims(verification.chosen(rows, len({row["seed"] for row in rows.rows}))):
        yield "faces", Line("petalface", claim, told(*apart, "points" if claim.endswith("TAR") else ""), word)


def page() -> Iterator[str]:
    """The part of the ledger that is measured on real models."""
    yield from ("## On real models and data", "")
    yield "Paired 95 % bootstrap intervals over documents, rows, images or tasks, three seeds where models are trained."
    yield "What is better but has twice the dense model's perplexity is *collapsed*."
    compression = squeezed, compressed, convolutions, clicks, repaired, routed, shortened
    for run in (trained, *compression, cut, pruned, graphs, translated, faces, adapted, streamed):
        lines = list(run())
        for study in dict.fromkeys(study for study, _ in lines):
            yield from ("", "| method | claim | found | verdict |", "| --- | --- | --- | --- |")
            yield from (f"| `{x.method}` | {x.claim} | {x.found} | **{x.word}** |" for s, x in lines if s == study)
            yield from ("", f"`{COMMANDS[study]}`")
