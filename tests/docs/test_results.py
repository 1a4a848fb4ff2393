"""Results appear by lying in their folders."""

from __future__ import annotations

import json

import generate
import pytest

_MADE = {"command": "python benchmarks/adapters.py", "versions": {"torch": "2.13.0"}, "commit": "abc1234"}


def _run(method: str, seed: int, nats: float) -> dict:
    test = {"loss": nats, "perplexity": 2.718**nats, "per_document": [[nats * 10, 10], [nats * 12, 12]]}
    return {
        **{"kind": "run", "phase": "final", "method": method, "seed": seed, "learning_rate": 1e-3, "status": "ok"},
        **{"error": None, "options": {}, "knob": None, "recipe": {}, "trainable": 1234, "steps": 10, "curve": []},
        **{"validation": {"loss": nats}, "test": test, "ranks": None, "forgetting": None, "step_seconds": 0.25},
        **{"peak_bytes": 2_000_000, "file_bytes": 5000, "command": "weft compare"},
    }


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "DOCS", tmp_path / "docs")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "pydocs").mkdir(parents=True)
    return tmp_path


def test_without_results_the_page_says_so(repository):
    assert "No result is committed yet." in generate.results_page()
    assert generate._measured("sora") == []


def test_ratios_of_a_benchmark(repository):
    row = {
        "opponent": "PEFT LoRA",
        "wanted_ratio": 1.15,
        "block": {"time_ratio": 1.06, "memory_ratio": 1.01, "seconds": [2, 1]},
    }
    endless = {"opponent": "PEFT LoRA", "wanted_ratio": float("inf"), "block": {"time_ratio": 2.0}}
    content = {**_MADE, "rows": {"sora": row, "sora attach": {**row, "wanted_ratio": 1.1}, "nola": endless}}
    (repository / "benchmarks" / "results" / "adapters.json").write_text(json.dumps(content))
    page = generate.results_page()
    assert "| case | beside | block: time | block: memory | wanted |" in page
    assert "| sora | PEFT LoRA | 1.06× | 1.01× | 1.15× |" in page
    assert "| nola | PEFT LoRA | 2.00× | – | – |" in page
    assert "command `python benchmarks/adapters.py`" in page and "commit `abc1234`" in page
    own = "\n".join(generate._measured("sora"))
    assert "| sora attach |" in own and "nola" not in own


def test_the_rows_of_a_comparison(repository):
    head = {**_MADE, "kind": "study", "model": "m", "data": "d", "task": "causal-lm", "budget": {"steps": 10}}
    head |= {"seeds": [1, 2], "methods": ["sora", "peft:lora"], "hardware": {"cpu": "x"}, "started": "2026-01-01"}
    runs = [_run("sora", 1, 3.0), _run("sora", 2, 3.1), _run("peft:lora", 1, 3.5), _run("peft:lora", 2, 3.6)]
    folder = repository / "docs" / "results" / "pydocs"
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [head, *runs]))
    (folder / "report.html").write_text("<p>")
    page = generate.results_page()
    assert "## Comparison: pydocs" in page and "(results/pydocs/report.html)" in page
    assert "| `sora` | 3.05" in page and page.index("`sora`") < page.index("`peft:lora`")
    assert "1,234" in page and "250 ms" in page
    own = "\n".join(generate._measured("sora"))
    assert "In the comparison pydocs" in own and "peft:lora" not in own


def test_the_rows_of_a_comparison_of_compression(repository):
    from weft.run.tradeoffs import Point, empty_row

    def corpora(loss: float) -> list[dict]:
        documents = [[loss * 10, 10], [loss * 12, 12], [loss * 11, 11]]
        return [{"data": "wiki.txt", "loss": loss, "perplexity": 2.718281828**loss, "per_document": documents}]

    def row(method: str, keep: float | None, loss: float) -> dict:
        made = empty_row(Point("dense" if keep is None else "quality", method, keep)) | {"status": "ok"}
        bits = {"kept": keep or 1.0, "bits": 100, "dense_bits": 100, "reads": 50 if keep else 100}
        return made | bits | {"corpora": corpora(loss)}

    head = {**_MADE, "kind": "study", "pillar": "compress", "model": "m", "data": "wiki.txt", "keeps": [0.5]}
    head |= {"methods": ["svd", "lord"], "plan": {"corpora": [{"data": "wiki.txt"}], "notes": []}}
    rows = [head, row("dense", None, 2.0), row("svd", 0.5, 2.5), row("lord", 0.5, 2.9)]
    folder = repository / "docs" / "results" / "shares"
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = generate.results_page()
    assert "Keeping 0.5 of the bits, svd ranks first" in page
    assert "| keep | rank | method | perplexity, wiki.txt | stored |" in page
    assert "| 0.5 | 1 | `svd` | 12.18 | 0.500 |" in page
    assert "| 0.5 | collapsed | `lord` | 18.17 | 0.500 |" in page  # more than twice the dense model's 7.39
    assert "| 0.5 | collapsed |" in "\n".join(generate._measured("lord"))
