"""Regular expressions of configurations: what `re` says they mean, within limits of size and time."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3.patterns import fully_matching

PATHS = [f"model.layers.{layer}.{name}" for layer in range(12) for name in ("self_attn.k_proj", "mlp.down_proj")]
TEXTS = ["", "a", "b", "ab", "aa", "aab", "ba", "a{e}", "a{", "{2}", "a.b", "a{}", "{", "}", "a{ 2 }b", "A", "a\n", "&"]
PIECES = [
    *("a", "b", ".", r"\.", "[ab]", "[^a]", "{", "}", "{e}", "{,}", "{2}", "{1,2}", "{,2}", "{1,}", "{i<=1}", "{ 2 }"),
    *("(a|b)", "(?:ab)", "(?=a)", "(?!b)", "(?<=a)", "(?<!b)", "*", "+", "?", "*?", "++", "|", "^", "$", r"\d", r"\b"),
    *("[{]", "[]a]", "(?i:A)", "(?>a|ab)", r"(a)\1", "(?#c[)", r"\{", "[[:alpha:]]", "[a&&b]", "[a--b]", "(?s:.)"),
]


@pytest.mark.parametrize(
    "pattern", [r".*\.(k|down)_proj", r"(?=.*\.1\.).*k_proj", r"model\.layers\.(?!3\.)\d+\.mlp\..*", r"(?i).*K_PROJ"]
)
def test_honest_expressions_match(pattern):
    expected = {path for path in PATHS if re.fullmatch(pattern, path)}
    assert expected
    assert fully_matching(pattern, PATHS, "target_modules") == expected


@settings(max_examples=1000)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join))
def test_an_expression_means_what_re_says(pattern):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled = re.compile(pattern)
        except re.error:
            with pytest.raises(ValueError, match="not a valid regular expression"):
                fully_matching(pattern, TEXTS, "target_modules")
            return
        assert fully_matching(pattern, TEXTS, "f") == {text for text in TEXTS if compiled.fullmatch(text)}


HOSTILE = {
    r"(.|.)*x": "takes longer than 1 s",
    r"(.*?)*?x": "takes longer than 1 s",
    r"(?=(?:.|.)*x\Z).*": "takes longer than 1 s",
    r"(.+)(.+)(.+)(.+)(.+)(.+)\1\2\3\4\5\6x": "takes longer than 1 s",
    r"(?:(?:.{0,9999}){0,9999}){0,9999}x": "takes longer than 1 s",
    ".*" * 3000 + "x": "takes longer than 1 s",
    "(?:(?:a{9999}){9999}){9999}": "repeats so much",
    "x{4294967294}": "repeats so much",
    "(?:" + "(?:a|b){9}" * 9 + "){9999}": "repeats so much",
    "(?:a{999}){999}|b": "repeats so much",
    "x{99999999999999999999}": "not a valid regular expression",
    "(" * 5000 + "a" + ")" * 5000: "too deep",
    "a|" * 60_000: "has 120,000 characters",
    "(?i)" + "[\\u0100-\\U0010ffff]" * 4000: "ignores case and names characters outside of ASCII",
    "(?x) [\n (?:a{999}){999} # ]": "has the flag x",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: pattern[:30])
def test_an_expression_without_an_end_is_refused_in_time(pattern):
    paths = [f"{path}.x.y" for path in PATHS]
    begun = time.process_time()
    with pytest.raises(ValueError, match=HOSTILE[pattern]) as refused:
        fully_matching(pattern, paths, "exclude_modules")
    assert time.process_time() - begun < 4
    assert str(refused.value).startswith("exclude_modules: ")
    assert len(str(refused.value)) < 400


def test_the_time_is_that_of_all_paths():
    """One path takes a fraction of a second; a thousand of them would take minutes."""
    begun = time.process_time()
    with pytest.raises(ValueError, match="takes longer"):
        fully_matching(r"(?:.|.)*x", [f"{number}{'a' * 17}xy" for number in range(1000)], "target_modules")
    assert time.process_time() - begun < 4
