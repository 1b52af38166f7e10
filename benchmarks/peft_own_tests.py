"""PEFT's own tests of IA3, run with ia3's names in the place of PEFT's.

    python benchmarks/peft_own_tests.py PEFT-SOURCE [--library peft] [-k …]

PEFT-SOURCE is the unpacked source distribution of PEFT, which has its tests. An adapted copy of them is made in a
temporary folder: what `ia3` offers is imported from it, the rest (other methods, which the same files test) from PEFT;
PEFT's internals are put in public terms (`peft_terms.py`); errors are compared by class, not by words; models of
the hub are small random ones (`tiny_hub.py`).
Selected is a test whose parameters or whose own code name IA3, and one whose code names no method and no internal of
PEFT. Left out are the few that read a certain repository of the hub. `--library peft` runs the same selection unchanged
against PEFT itself, which shows that it is sound.

Needs: CPU; peft and its source distribution; an hour.
"""

from __future__ import annotations

import argparse
import ast
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import ia3
from bench import write

HERE = Path(__file__).parent
FILES = (
    *("test_custom_models", "test_decoder_models", "test_encoder_decoder_models", "test_feature_extraction_models"),
    *("test_seq_classifier", "test_token_classification_qa", "test_vision_models", "test_stablediffusion"),
    *("test_config", "test_auto", "test_hub_features", "test_low_level_api", "test_tuners_utils", "test_other"),
    *("test_initialization", "test_mapping", "test_torch_compile", "test_helpers", "test_integrations"),
)
SHARED = ("testing_common", "testing_utils")
# Internals that `peft_terms` has in other terms.
TERMS = {
    *("AuxiliaryTrainingWrapper", "BaseTunerLayer", "BufferDict", "ModulesToSaveWrapper", "inspect_matched_modules"),
}
LAYER_STATE = {
    *("active_adapters", "active_adapter", "disable_adapters", "merged_adapters", "merged", "is_feedforward"),
    *("_all_available_adapter_names", "_available_adapters", "_adapters", "adapter_layer_names", "prefix"),
    *("set_adapter", "merge"),
}
# Tests of what a certain repository on the hub holds.
OF_THE_HUB = {
    *("test_auto_peft_model_forwards_revision_to_tokenizer", "test_from_pretrained", "test_from_pretrained_cache_dir"),
    *("test_from_pretrained_cache_dir_remote", "test_peft_causal_lm_extended_vocab", "test_peft_whisper"),
    "test_save_pretrained_with_runtime_config",
}
# A parameter's name as the wrapped model has it: ia3's models have no wrapper.
PARAMETER = re.compile(r"^base_model\.model\.(.*\.(ia3_l|modules_to_save)\..*)$")

SELECTION = """
import ast, inspect, textwrap
from pathlib import Path
import pytest

PUBLIC = set({public!r})
METHOD_FREE = {method_free!r}
OF_THE_HUB = {of_the_hub!r}

def names_ia3(value, depth=0):
    text = value if isinstance(value, str) else getattr(value, "__name__", None) or type(value).__name__
    if "IA3" in text or text.lower() == "ia3":
        return True
    return depth < 2 and isinstance(value, (list, tuple)) and any(names_ia3(item, depth + 1) for item in value)

def names_other(value):
    text = value if isinstance(value, str) else getattr(value, "__name__", None) or type(value).__name__
    return text.endswith("Config") and "IA3" not in text

def is_chosen(item):
    if item.originalname in OF_THE_HUB:
        return False
    params = list(getattr(item, "callspec", None).params.values()) if hasattr(item, "callspec") else []
    flat = [v for p in params for v in (p if isinstance(p, (list, tuple)) else [p])]
    if any(names_ia3(value) for value in flat):
        return True
    if any(names_other(value) for value in flat):
        return False
    function = inspect.unwrap(item.function)
    while hasattr(function, "func"):
        function = function.func
    code = textwrap.dedent(inspect.getsource(function))
    if "IA3" in code or "ia3" in item.name.lower():
        return True
    if item.path.stem not in METHOD_FREE:
        return False
    module = item.module.__dict__
    used = {{node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}}
    homes = {{name: getattr(module.get(name), "__module__", None) or "" for name in used}}
    theirs = {{name for name, home in homes.items() if home.startswith(("peft", "ia3"))}}
    fixtures = set(getattr(item, "fixturenames", ())) - {{"request", "tmp_path", "recwarn", "monkeypatch", "caplog"}}
    params = set(item.callspec.params) if hasattr(item, "callspec") else set()
    return bool(theirs) and theirs <= PUBLIC and not (fixtures - params) and "lora" not in item.name.lower()

def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if is_chosen(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
"""


class InOurTerms(ast.NodeTransformer):
    """Rewrites a test file: imports, and expressions that reach into PEFT's wrapper."""

    def __init__(self, public: set[str]) -> None:
        self.public = public

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        if node.level or (node.module or "").split(".")[0] != "peft":
            return node
        by_source: dict[str, list[ast.alias]] = collections.defaultdict(list)
        for alias in node.names:
            source = "peft_terms" if alias.name in TERMS else "ia3" if alias.name in self.public else node.module
            by_source[source].append(alias)
        return [ast.ImportFrom(source, names, 0) for source, names in by_source.items()]

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if not isinstance(node.ctx, ast.Load):
            self.generic_visit(node)
            return node
        if node.attr == "model" and isinstance(node.value, ast.Attribute) and node.value.attr == "base_model":
            return _call("inner_model", self.visit(node.value.value))
        self.generic_visit(node)
        if node.attr == "base_model":
            return _call("base_model", node.value)
        if node.attr in ("base_layer", "original_module"):
            return _call("own_layer", node.value, ast.Constant(node.attr))
        if node.attr in LAYER_STATE:
            return _call("held", node.value, ast.Constant(node.attr))
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            return _call("has", *node.args)
        if not isinstance(node.func, ast.Attribute):
            return node
        if node.func.attr == "get_base_layer":
            return _call("own_layer", node.func.value, ast.Constant("base_layer"))
        if node.func.attr in ("raises", "warns"):  # the words of an error are each library's own
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "match"]
        return node

    def visit_Constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, str) and PARAMETER.match(node.value):
            return ast.Constant(PARAMETER.sub(r"\1", node.value))
        return node


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    function = ast.Attribute(ast.Name("peft_terms", ast.Load()), name, ast.Load())
    return ast.Call(function, list(arguments), [])


def adapt(source: str, library: str, public: set[str]) -> str:
    """A test file in the library's terms, offline."""
    tree = ast.parse(source)
    if library == "ia3":
        tree = ast.fix_missing_locations(InOurTerms(public).visit(tree))
        after = 1 if ast.get_docstring(tree) else 0
        tree.body.insert(after, ast.Import([ast.alias("peft_terms")]))
    return ast.unparse(ast.fix_missing_locations(tree))


OFFLINE = """

@contextmanager
def hub_online_once(model_id):
    yield

def load_dataset_english_quotes():
    from datasets import Dataset, DatasetDict

    quotes = [f"w{n} w{n + 1} w{n + 2}" for n in range(10, 90)]
    return DatasetDict(train=Dataset.from_dict(dict(quote=quotes, author=quotes, tags=quotes)))


def load_cat_image():
    from PIL import Image
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
"""


def make_copy(source: Path, folder: Path, library: str) -> None:
    """The adapted tests, the terms and the selection in `folder`."""
    public = public_names()
    tests = folder / "tests"
    tests.mkdir(parents=True)
    (tests / "__init__.py").touch()
    for name in (*FILES, *SHARED):
        text = adapt((source / "tests" / f"{name}.py").read_text(encoding="utf-8"), library, public)
        (tests / f"{name}.py").write_text(text + (OFFLINE if name == "testing_utils" else ""), encoding="utf-8")
    (folder / "peft_terms.py").write_text((HERE / "peft_terms.py").read_text(encoding="utf-8"), encoding="utf-8")
    method_free = {"test_config", "test_auto", "test_hub_features", "test_mapping", "test_helpers", "test_other"}
    (folder / "conftest.py").write_text(
        SELECTION.format(public=sorted(public), method_free=method_free, of_the_hub=OF_THE_HUB)
    )
    (folder / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    single_gpu_tests\n    multi_gpu_tests\n    bitsandbytes\n"
    )


def public_names() -> set[str]:
    return {name for name in ia3.__all__ if not name.startswith("_")}


def run(folder: Path, cache: Path, extra: list[str]) -> list[dict[str, str]]:
    """Run the copy; a row for each test: file, name, outcome, cause."""
    report = folder / "report.xml"
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
    }
    files = [f"tests/{name}.py" for name in FILES]
    flags = ["-q", "-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *flags, *files, *extra]
    subprocess.run(command, cwd=folder, env=environment, check=False)
    return [_row(case) for case in ElementTree.parse(report).iter("testcase")]


def _row(case: ElementTree.Element) -> dict[str, str]:
    row = {"file": _file(case), "name": case.get("name", ""), "outcome": "passed", "cause": ""}
    for child in case:
        if child.tag in ("failure", "error"):
            row |= {"outcome": "failed", "cause": (child.get("message") or "").splitlines()[0][:160]}
            row["trace"] = child.text or ""
        elif child.tag == "skipped":
            row |= {"outcome": "skipped", "cause": (child.get("message") or "")[:160]}
    return row


def _file(case: ElementTree.Element) -> str:
    return next(part for part in f"{case.get('classname')}.{case.get('name')}".split(".") if part.startswith("test_"))


def summary(rows: list[dict[str, str]]) -> dict[str, Any]:
    """Counts by file, and of the failures by cause."""
    by_file: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows:
        by_file[row["file"]][row["outcome"]] += 1
    causes = collections.Counter(_general(row["cause"]) for row in rows if row["outcome"] == "failed")
    total = collections.Counter(row["outcome"] for row in rows)
    return {
        "total": dict(total),
        "by_file": {name: dict(counts) for name, counts in sorted(by_file.items())},
        "failed_by_cause": dict(causes.most_common()),
    }


def _general(cause: str) -> str:
    """A cause without what differs between tests of the same one."""
    return re.sub(r"/tmp/\S+|0x[0-9a-f]+|[0-9.]+e?-?[0-9]*", "…", cause)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the unpacked source distribution of PEFT")
    parser.add_argument("--library", choices=("ia3", "peft"), default="ia3")
    parser.add_argument("--folder", type=Path, help="where the copy goes; a temporary folder by default")
    parser.add_argument("--no-result", action="store_true", help="write nothing into results/")
    arguments, extra = parser.parse_known_args()
    from tiny_hub import make_hub

    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        cache = folder / "hub"
        if not cache.exists():
            make_hub(cache)
        copy = folder / arguments.library
        subprocess.run(["rm", "-rf", str(copy)], check=True)
        make_copy(arguments.source, copy, arguments.library)
        rows = run(copy, cache, extra)
        (copy / "rows.json").write_text(json.dumps(rows, indent=1))
    found = summary(rows)
    print(json.dumps(found, indent=2, ensure_ascii=False))
    if not arguments.no_result:
        name = "peft_own_tests" if arguments.library == "ia3" else "peft_own_tests_by_peft"
        write(name, found)


if __name__ == "__main__":
    main()
