"""All one-shot compression methods on three small language models, at four shares, and the papers' orderings there.

    python benchmarks/compression_studies.py --data-dir DIR                 all of them, one after the other
    python benchmarks/compression_studies.py --data-dir DIR --task prose    one: pycode, stories or prose
    python benchmarks/compression_studies.py --orderings                    what is there: perplexities, and verdicts

    pycode    builtin:pycode, calibrated on Python code; tested on code that did not calibrate, and on help topics
    stories   stories260k, calibrated on stories; tested on other stories, and on encyclopaedia text
    prose     prose7m, calibrated on encyclopaedia text; tested on other such text, and on the web's

DIR holds models/stories260k_llama, models/prose7m_llama, tinystories_sample/, wikitext2/ and c4_sample/. A study is one
`weft compare --pillar compress` and lies in docs/results/compress_TASK; killed, it goes on where it stopped. Further
options are that command's, say --workers 2 or --no-speed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import arms

import weft
from weft.report.study import parse
from weft.report.tradeoffs import Tradeoffs, digest
from weft.run.distil import learns

RESULTS = Path(__file__).parents[1] / "docs" / "results"
TASKS = ("pycode", "stories", "prose")
# who the papers say is better than whom, at equal bits; armor is held against 2:4 pruning in its own benchmark
CLAIMS = (
    ("fwsvd", "svd"),
    ("svd_llm", "fwsvd"),
    ("lord", "fwsvd"),
    ("cospadi", "svd_llm"),
    ("modegpt", "svd"),
    ("welore", "svd"),
)


def options(task: str, data: Path) -> list[str]:
    if task == "pycode":
        return ["--model", "builtin:pycode", "--data", "builtin:stdlib", "--data2", "builtin:pydocs"]
    model = data / "models" / ("stories260k_llama" if task == "stories" else "prose7m_llama")
    if task == "stories":
        stories = data / "tinystories_sample"
        texts = [stories / "train.jsonl.gz", "--test-data", stories / "test.jsonl.gz"]
        second = data / "wikitext2" / "test.txt.gz"
    else:
        texts = [data / "wikitext2" / "valid.txt.gz", "--test-data", data / "wikitext2" / "test.txt.gz"]
        second = data / "c4_sample" / "c4_300.jsonl.gz"
    return list(map(str, ["--model", model, "--data", *texts, "--data2", second]))


def verdict(study: Tradeoffs, keep: float, corpus: int, better: str, worse: str) -> tuple[str, str]:
    """What a study says of one claim, holds, reversed, tie or collapsed, and the difference in nats a token with its
    interval; a dash and nothing where one of the two is not in that ranking."""
    ranking = study.rankings[keep][corpus]
    standings = {each.method: each for each in ranking.standings}
    if better not in standings or worse not in standings:
        return "–", ""
    pair = ranking.pair(better, worse)
    shown = arms.told(pair.difference, pair.low, pair.high)
    if pair.better is None:
        return "tie", shown
    if standings[pair.better].collapsed:
        return "collapsed", shown
    return "holds" if pair.better == better else "reversed", shown


def named(corpus: str) -> str:
    """A test corpus by its folder, or by its own name."""
    return Path(corpus).parent.name or corpus


def costs(study: Tradeoffs) -> Iterator[str]:
    """A table a test corpus: the perplexity of each method over the dense model's, at each share that it can have."""
    for corpus, name in enumerate(study.corpora):
        assert study.dense is not None
        dense = study.dense["corpora"][corpus]["perplexity"]
        rows: dict[str, list[str]] = {}
        for place, (keep, entries) in enumerate(study.tables.items()):
            ranked = {each.method for each in study.rankings[keep][corpus].standings}
            for entry in entries:
                cells = rows.setdefault(entry.name, ["–"] * len(study.tables))
                if (found := entry.perplexity(corpus)) and entry.name in ranked:
                    cells[place] = f"{found / dense:.2f}" if found < 10 * dense else f"{found / dense:.0f}"
        yield f"\n{named(name)}, perplexity over {dense:.3g}\n"
        yield "| | " + " | ".join(f"keep {keep:g}" for keep in study.tables) + " |"
        yield "| --- |" + " ---: |" * len(study.tables)
        yield from (f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items())


def orderings(study: Tradeoffs) -> Iterator[str]:
    """A table a test corpus: claims against shares, differences in nats a token with their intervals."""
    for corpus, name in enumerate(study.corpora):
        yield f"\n{named(name)}\n"
        yield "| claim | " + " | ".join(f"keep {keep:g}" for keep in study.tables) + " |"
        yield "| --- |" + " --- |" * len(study.tables)
        for better, worse in CLAIMS:
            cells = [" ".join(verdict(study, keep, corpus, better, worse)) for keep in study.tables]
            yield f"| {better} below {worse} | " + " | ".join(cells) + " |"


def finished() -> Iterator[tuple[str, Tradeoffs]]:
    """The studies of which there are results."""
    for task in TASKS:
        if (RESULTS / f"compress_{task}" / "results.jsonl").exists():
            yield task, digest(*parse(RESULTS / f"compress_{task}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--task", choices=TASKS, help="one study alone")
    parser.add_argument("--orderings", action="store_true", help="measure nothing; print what is there")
    args, passed = parser.parse_known_args()
    if not args.orderings and args.data_dir is None and args.task != "pycode":
        parser.error("--data-dir is missing: the folder with models and texts")
    methods = ",".join(slug for slug in sorted(weft.cards("compress")) if not learns(slug))
    wanted = [args.task] if args.task else TASKS
    for task in () if args.orderings else wanted:
        command = [sys.executable, "-m", "weft", "compare", "--pillar", "compress", "--methods", methods]
        command += ["--samples", "64", "--rows", "64", "--output", os.path.relpath(RESULTS / f"compress_{task}")]
        code = subprocess.run([*command, *options(task, args.data_dir or Path()), *passed]).returncode
        if code:
            sys.exit(code)
    for task, study in finished():
        if task in wanted:
            print(f"\n{task}", *costs(study), *orderings(study), sep="\n")


if __name__ == "__main__":
    main()
