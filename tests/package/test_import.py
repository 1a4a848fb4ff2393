"""What `import weft` does and costs, in new processes.

These are forked from one that has torch, but neither transformers nor peft; where nothing depends on when these come,
from one that has everything but weft.
"""

from __future__ import annotations

import json
import subprocess
import sys

import forked
import pytest

READY = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m; assert 'WEFT_SORA' in m, sorted(m)\n"
LOADABLE = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as q; assert 'weft' in q, sorted(q)\n"
HOOK_GONE = "assert not any('weft' in type(f).__module__ for f in sys.meta_path), sys.meta_path\n"


def run(code: str, libraries: tuple[str, ...] = forked.TORCH) -> str:
    done = forked.run(["-c", "import sys\n" + code], libraries=libraries)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    code = "import sys, weft; print(*{'torch', 'peft', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_these_processes_begin_without_what_weft_hooks_into() -> None:
    run("assert not {'weft', 'peft', 'transformers', 'datasets'} & set(sys.modules) and 'torch' in sys.modules")


@pytest.mark.parametrize(
    "imports",
    [
        "import weft, peft",
        "import peft, weft",
        "import transformers, weft, peft",
        "import weft, transformers, peft",
        "import weft, importlib.util; importlib.util.find_spec('peft'); import peft",  # as transformers looks for it
    ],
)
def test_methods_are_known_to_peft_in_any_import_order(imports: str) -> None:
    run(f"{imports}\n{READY}{LOADABLE}{HOOK_GONE}")


@pytest.mark.parametrize(
    "imports",
    [
        "import weft; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import weft",
        "import transformers, weft",  # which loads its parts when they are used
        "import weft.linear._transformers",
    ],
)
def test_compressed_models_are_known_to_transformers_without_peft(imports: str) -> None:
    only_peft = "assert [f.module for f in sys.meta_path if 'weft' in type(f).__module__] == ['peft'], sys.meta_path\n"
    run(f"{imports}\n{LOADABLE}{only_peft}assert 'peft' not in sys.modules")


@pytest.mark.parametrize(
    "imports",
    [
        "import weft; weft.compress; import weft.compress._engine, weft.compress.svd",
        "import weft.compress.svd; import weft",
        "from weft.compress import svd; import weft",
        "from weft import compress; import weft.compress; import weft",
    ],
)
def test_compress_is_the_function_whatever_of_its_package_was_imported(imports: str) -> None:
    run(
        f"{imports}\n"
        "from weft.compress import _engine, svd\n"
        "from weft import compress\n"
        "assert weft.compress is compress is _engine.compress and compress.__name__ == 'compress'\n"
        "assert weft.SvdConfig is svd.SvdConfig",
        forked.ALL,
    )


def test_using_a_config_is_enough() -> None:
    run(f"import weft\nweft.SoraConfig(r=4)\n{READY}{HOOK_GONE}")


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    run(
        "import weft\n"
        "try:\n    weft.SorraConfig\n"
        "except AttributeError as e:\n    assert 'SorraConfig' in str(e)\n"
        "else:\n    raise SystemExit(1)"
    )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_know_the_methods(method: str, tmp_path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import multiprocessing as mp, weft\n"
        "def work(config):\n"
        "    import peft\n"
        "    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m\n"
        "    return type(config).__name__, config.peft_type in m, config.r\n"
        "if __name__ == '__main__':\n"
        f"    with mp.get_context({method!r}).Pool(1) as pool:\n"
        "        assert pool.apply(work, (weft.SoraConfig(r=5),)) == ('SoraConfig', True, 5)\n"
    )
    done = forked.run([script], libraries=forked.TORCH)
    assert done.returncode == 0, done.stderr


def test_configs_survive_pickle_copy_and_json(tmp_path) -> None:
    run(
        "import weft, pickle, copy, json, peft\n"
        "for slug in weft.cards('adapters'):\n"
        "    c = weft.config_class(slug)()\n"
        "    for d in (pickle.loads(pickle.dumps(c)), copy.deepcopy(c), copy.copy(c)):\n"
        "        assert d.to_dict() == c.to_dict() and type(d) is type(c), slug\n"
        f"    c.save_pretrained({str(tmp_path)!r})\n"
        f"    e = peft.PeftConfig.from_pretrained({str(tmp_path)!r})\n"
        "    assert type(e) is type(c) and json.dumps(e.to_dict(), default=str), slug\n",
        forked.ALL,
    )


def test_the_enum_shim_behaves_like_a_member() -> None:
    run(
        "import weft, pickle\nfrom peft.utils import PeftType\nweft.SoraConfig\n"
        "t = PeftType('WEFT_SORA')\n"
        "assert t is PeftType['WEFT_SORA'] is PeftType.WEFT_SORA and t in list(PeftType) and t == 'WEFT_SORA'\n"
        "assert pickle.loads(pickle.dumps(t)) is t and t.value.lower() == 'weft_sora'\n"
    )


def test_stub_is_current() -> None:
    done = forked.run(["-m", "weft._stubs", "--check"])
    assert done.returncode == 0, done.stderr


def test_every_public_name_resolves_and_is_documented() -> None:
    out = run(
        "import weft, json\n"
        "names = [n for n in dir(weft) if n != '__version__']\n"
        "print(json.dumps({n: bool((getattr(weft, n).__doc__ or '').strip()) for n in names}))",
        forked.ALL,
    )
    missing = [name for name, documented in json.loads(out).items() if not documented]
    assert not missing
