"""The text around columns: what it fills in, and what it refuses."""

from __future__ import annotations

import pytest

from ia3.tasks.template import Template


def test_a_template_fills_its_fields() -> None:
    template = Template("{{{a b}}} and {c:d}: {a b}")
    assert template.fields == ("a b", "c:d")
    assert template.render({"a b": " x ", "c:d": 3, "more": [1]}) == "{x} and 3: x"
    assert template.render({"a b": "{c:d}", "c:d": None}) == "{{c:d}} and : {c:d}"
    assert template.render({"a b": "", "c:d": float("nan")}) == ""


def test_an_empty_column_in_the_middle_leaves_no_line_breaks() -> None:
    template = Template("{a}{\n\nb} Answer:")
    assert template.render({"a": "x", "b": "y"}) == "x\n\ny Answer:"
    assert template.render({"a": "x", "b": ""}) == template.render({"a": "x"}) == "x Answer:"


def test_one_column_as_it_is() -> None:
    assert Template.of_column("text").render({"text": " a\n{b}\\1 "}) == "a\n{b}\\1"


def test_a_template_around_another_column() -> None:
    assert Template("{{}} {text}, {text}!").with_column("review") == Template("{{}} {review}, {review}!")
    with pytest.raises(ValueError, match="one text column can't replace them"):
        Template("{a} {b}").with_column("review")


@pytest.mark.parametrize("pattern", ["{text", "text} {text}", "{} {text}"])
def test_stray_braces(pattern: str) -> None:
    with pytest.raises(ValueError, match="belongs to no field"):
        Template(pattern)


@pytest.mark.parametrize("pattern", ["", "text", "{{text}}"])
def test_no_field(pattern: str) -> None:
    with pytest.raises(ValueError, match="shows no column to the model"):
        Template(pattern)


def test_a_missing_column() -> None:
    with pytest.raises(ValueError, match=r"line 3 has no column 'b'; its columns are 'a'"):
        Template("{a} {b}").render({"a": "x"}, "line 3")


def test_a_cell_that_is_no_text() -> None:
    with pytest.raises(ValueError, match="line 3: the text is a list, expected a text or a number"):
        Template("{a}").render({"a": ["x"]}, "line 3")
    with pytest.raises(ValueError, match="line 3: 'b' is a dict, expected a text or a number"):
        Template("{a} {b}").render({"a": "x", "b": {}}, "line 3")


def test_line_breaks_inside_the_braces_stand_before_something() -> None:
    template = Template("{question}{\n\ncontext}")
    assert (template.fields, template.required) == (("question", "context"), ("question",))
    assert template.render({"question": "Who?", "context": "Ann."}) == "Who?\n\nAnn."
    assert template.render({"question": "Who?", "context": " "}) == template.render({"question": "Who?"}) == "Who?"
    assert template.render({"question": "", "context": "Ann."}) == "Ann."
    assert template.render({"question": ""}) == ""
    with pytest.raises(ValueError, match="has no column 'question'"):
        template.render({"context": "Ann."})
