"""Links in the documentation lead somewhere, and the commands that it shows are commands."""

import re
import shlex
from pathlib import Path

import pytest

from sim.cli import _VERBS, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def links_of(page):
    """Return the targets of a page's links to files, and those of a notebook's text."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith(("http:", "https:"))]


def anchors_of(page):
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in links_of(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors_of(file), target


def test_every_page_is_in_the_index():
    linked = {target.partition("#")[0] for target in links_of(ROOT / "docs" / "README.md")}
    assert {page.name for page in PAGES[1:]} - {"README.md"} <= linked


def commands():
    """Return every `foregate ...` line of a code block and every one of a code span, once."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", "")
        for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL):
            found += [line for line in block.splitlines() if line.startswith("foregate ")]
        found += re.findall(r"(?<!`)`(foregate [^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return list(dict.fromkeys(found))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which a reader has followed the pages: options of his own, and a machine."""
    for group, name in (("eviction", "mine"), ("system", "mine"), ("hardware", "box")):
        (tmp_path / "mine" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "options" / group).mkdir(parents=True, exist_ok=True)
        text = "_target_: mine.Mine" if group == "eviction" else f"# @package _global_\n{group}: {{name: {name}}}\n"
        for place in ("mine", "options"):
            (tmp_path / place / group / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)


def test_every_command_is_understood(folder, capsys):
    shown = commands()
    assert len(shown) > 40
    for command in shown:
        words = shlex.split(command, comments=True)[1:]
        if " ".join(words) in _VERBS or words[0] == "list":
            continue  # a verb that is spoken of
        if "system=winner" in words or "-m" in words:
            continue  # not composed: what is stored, and a sweep of several
        # What stands for a word of the reader's is a word.
        words = [re.sub(r"\b(NAME|FOLDER_OR_ID|FOLDER|VALUE|FILE)\b", "olmoe_1b_7b", word) for word in words]
        assert main([*words, "--cfg"]) == 0, f"{command}\n{capsys.readouterr().err}"
    capsys.readouterr()
