"""The pages that a reader follows: every relative link of README, CONTRIBUTING and docs/ leads somewhere."""

import re
from pathlib import Path

import pytest

from tests.test_architecture import LEVEL, PACKAGE

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "samples").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its blocks of code, which may hold brackets of another kind."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them: lower case, blanks to dashes, punctuation left out."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", each)).strip().lower().replace(" ", "-")
        for each in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_relative_link_is_dead(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue  # another site
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.relative_to(ROOT)} links to {target}, which does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), (
                f"{page.relative_to(ROOT)} links to {target}: {name or 'the page'} has no such heading"
            )


def test_a_link_is_found_and_a_heading_named_as_hosts_name_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("## Files of images, key by key\n[a](#x) and [b](c.md)\n```\n[no](link)\n```\n", encoding="utf-8")
    assert LINK.findall(prose(page)) == ["#x", "c.md"]
    assert anchors(page) == {"files-of-images-key-by-key"}


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / target.partition("#")[0]).resolve() for target in LINK.findall(index)}
    missing = [
        page.name
        for page in sorted((ROOT / "docs").glob("*.md"))
        if page.name != "README.md" and page.resolve() not in linked
    ]
    assert not missing, f"docs/README.md does not link to {missing}"
    assert "docs/README.md" in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


PATH = re.compile(r"`((?:llavamed_jax|tests|benchmarks|configs|samples|docs|convert)/[\w./*-]+)(?:::(\w+))?`")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_file_that_a_page_names_exists(page):
    """In tables and text; the changelog names files of its time, and `docs/verification.md` is written by a command."""
    for name, test in PATH.findall(prose(page)):
        if name == "docs/verification.md" or "NAME" in name:  # which stands for any name
            continue
        found = list(ROOT.glob(name.rstrip("/")))
        assert found, f"{page.relative_to(ROOT)} names {name}, which does not exist"
        assert not test or f"def {test}(" in found[0].read_text(encoding="utf-8"), f"{name} has no {test}"


def test_the_map_has_every_room_in_the_order_of_the_imports():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    there = {path.stem for path in PACKAGE.iterdir() if (path / "__init__.py").is_file() or path.suffix == ".py"} - {
        "__init__",
        "__pycache__",
    }
    table = text.partition("| room | what it does |")[2].partition("\n\n")[0]
    rows = [
        name
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1:2][0] if "|" in line else "")
    ]
    diagram = re.search(r"```mermaid\n(.*?)```", text, re.DOTALL)[1]
    drawn = [name for name in dict.fromkeys(re.findall(r"\w+", diagram)) if name in LEVEL]
    for names in (rows, drawn):
        assert set(names) == there
        assert [LEVEL[name] for name in names] == sorted(LEVEL[name] for name in names)


IN_COMMANDS = re.compile(r"(?<![\w/.`])(?:tests|benchmarks|samples|configs)/[\w/]+\.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_script_of_a_command_exists(page):
    """Also in blocks of code, which readers copy; RECIPE and NAME stand for any name."""
    names = [
        name for name in IN_COMMANDS.findall(page.read_text(encoding="utf-8")) if not re.search("RECIPE|NAME", name)
    ]
    assert not [name for name in names if not (ROOT / name).is_file()]
