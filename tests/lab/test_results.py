"""Taking a run into the repository: its table into its place, its JSON and pictures beside."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results():
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "docs").mkdir()
    page = "before\n<!-- paper -->\nold\n<!-- /paper -->\nbetween\n<!-- best -->\nNot run yet.\n<!-- /best -->\nafter\n"
    (tmp_path / "docs" / "results.md").write_text(page)
    run = tmp_path / "runs" / "paper"
    run.mkdir(parents=True)
    (run / "table.json").write_text(json.dumps({"rows": [1]}))
    (run / "table.md").write_text("# gatelet reproduce\n\n| a \\1 |\n")
    (run / "curves.png").write_bytes(b"picture")
    return tmp_path


def test_a_run_takes_its_place(results, repository):
    for _ in range(2):  # again: the same
        results.take(repository / "runs" / "paper", repository)
        assert (repository / "docs" / "results.md").read_text() == (
            "before\n<!-- paper -->\n| a \\1 |\n\n![curves](paper_curves.png)\n<!-- /paper -->\nbetween\n"
            "<!-- best -->\nNot run yet.\n<!-- /best -->\nafter\n"
        )
    assert (repository / "docs" / "paper_curves.png").read_bytes() == b"picture"
    assert json.loads((repository / "results" / "paper.json").read_text()) == {"rows": [1]}


def test_what_is_no_run_or_has_no_place_is_told(results, repository):
    with pytest.raises(SystemExit, match=r"holds none of table\.json"):
        results.take(repository, repository)
    (repository / "runs" / "paper").rename(repository / "runs" / "other")
    with pytest.raises(SystemExit, match="no place <!-- other -->"):
        results.take(repository / "runs" / "other", repository)


@pytest.mark.parametrize("name", ["paper", "claims", "best", "frontier", "frontier_fashion"])
def test_the_page_has_a_place_for_every_run(name):
    page = (ROOT / "docs" / "results.md").read_text()
    assert page.count(f"<!-- {name} -->\n") == page.count(f"<!-- /{name} -->") == 1
