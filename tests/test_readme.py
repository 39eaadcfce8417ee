"""The examples of the README and the docs: each runs, and prints what it says it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "example", "exec"), {})
    printed = re.findall(r"^print\(.*\n((?:# .*\n)+)", code, re.MULTILINE)
    promised = "".join(printed).replace("# ", "")
    assert not promised or capsys.readouterr().out == promised


def test_readme_has_examples() -> None:
    assert sum("README" in example.id for example in EXAMPLES if example.id) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_real_tests(page: Path) -> None:
    """And where a name is a link, it leads to the file that has the test."""
    files = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    text = page.read_text()
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in "".join(files.values()), name
    for name, file in re.findall(r"`(test_\w+)`\]\(../tests/(\w+\.py)\)", text):
        assert f"def {name}(" in files[file], (name, file)


def test_every_complaint_has_an_answer_and_a_test() -> None:
    """Each row of the table: threads, an answer, and a test or the words that none applies."""
    _, table = (ROOT / "docs" / "faq.md").read_text().split("## Every complaint")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if "](http" in line]
    assert len(rows) > 30
    for complaint, answer, test in rows:
        assert re.search("/(issues|pull|discussions)/", complaint)
        assert answer and ("`test_" in test or "Does not apply" in test), complaint


def test_complaints_of_the_answers_are_in_the_table() -> None:
    answers, table = (ROOT / "docs" / "faq.md").read_text().split("## Every complaint")
    threads = re.findall(r"https://[^)]+/(?:issues|pull|discussions)/\d+", answers)
    assert threads and not [thread for thread in threads if thread not in table]
