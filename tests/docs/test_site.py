"""The documentation: the site is built as `make docs` builds it, and opened in a real browser."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from contextlib import suppress
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

import gatelet

ROOT = Path(__file__).parents[2]
WIDTHS = (1400, 390)  # a desk, a telephone
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
needs_mkdocs = pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed, which builds the site")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine to open the site in")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. Warnings end the build: a dead link in a page, an example of the tutorial that fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    settings = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """What a page links to, what it shows, and which anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if value and (name, tag) in {("href", "a"), ("src", "img"), ("href", "link"), ("src", "script")}:
                self.links.append(value)
            elif value and name in ("id", "name"):
                self.anchors.add(value)


def broken(folder: Path) -> list[str]:
    """Links within a site that lead nowhere."""
    pages = {path: Page(path.read_text()) for path in folder.rglob("*.html") if path.name != "404.html"}
    found = []
    for path, page in pages.items():
        here = "http://site/" + path.relative_to(folder).as_posix()
        for link in page.links:
            target, anchor = urldefrag(urljoin(here, link))
            if not target.startswith("http://site/"):
                continue
            there = folder / unquote(target.removeprefix("http://site/"))
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file() or (anchor and there in pages and unquote(anchor) not in pages[there].anchors):
                found.append(f"{path.relative_to(folder)}: {link}")
    return sorted(found)


@needs_mkdocs
def test_the_home_page_has_the_readmes_three_numbers(site):
    named = re.findall(r"^\* \*\*(.+?)\*\*", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    home = (site / "index.html").read_text()
    assert [name for name in named if f"<li><strong>{name}</strong>" in home.replace("<p>", "")] == named[:3]


@needs_mkdocs
def test_no_link_is_broken(site):
    assert len(list(site.rglob("*.html"))) > 20
    assert broken(site) == []


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "index.html").write_text('<a href="a.html#there">1</a> <a href="a.html#no">2</a> <img src="no.png">')
    (tmp_path / "a.html").write_text('<h1 id="there">3</h1><a href="../index.html">4</a> <a href="gone/">5</a>')
    assert broken(tmp_path) == ["a.html: gone/", "index.html: a.html#no", "index.html: no.png"]


def relative_links(text: str) -> list[str]:
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_what_is_read_in_the_repository_links_to_files(name):
    for link in relative_links((ROOT / name).read_text()):
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor, f"{link}: anchors differ between the site and the repository"


def test_the_page_of_the_paper_leads_to_files_and_descriptions():
    """Each row links to files, and all but the two that are about the lab to the page of a symbol."""
    lines = (ROOT / "docs" / "paper.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) >= 14
    assert all("](../src/" in row for row in rows)
    assert [row for row in rows if "](api/" not in row and "gatelet_lab" not in row] == []
    assert "Section 2.2" in next(row for row in rows if "gatelet/estimators/smooth_times_stochastic.py" in row)


def test_pages_link_to_files_of_the_repository_that_exist():
    found = 0
    for page in (ROOT / "docs").rglob("*.md"):
        for link in relative_links(page.read_text()):
            if link.startswith("../") and ("src/" in link or "tests/" in link):
                found += 1
                assert (page.parent / link).exists(), f"{page.name}: {link}"
    assert found > 20


@needs_mkdocs
@pytest.mark.parametrize("part", ["gatelet", "nn", "kernels", "sparsity", "estimators"])
def test_the_reference_has_every_public_function_with_its_first_argument(site, part):
    """A function with the name of a module could be left out for the module, unnoticed."""
    package = gatelet if part == "gatelet" else getattr(gatelet, part)
    text = (site / "api" / part / "index.html").read_text() + (site / "api" / "diagnose" / "index.html").read_text()
    names = [name for name in vars(package) if inspect.isroutine(getattr(package, name)) and not name.startswith("_")]
    assert names
    for name in names:
        path = "gatelet.diagnose.diagnose" if name == "diagnose" else f"{package.__name__}.{name}"
        assert f'id="{path}"' in text, name
        shown, _, _ = text[text.index(f'id="{path}"') :].partition("mkdocstrings-source")
        argument = next(iter(inspect.signature(getattr(package, name)).parameters), None)
        assert argument is None or f"<code>{argument}</code>" in shown, f"{name}: {argument} is not described"


@needs_mkdocs
def test_links_to_files_of_the_repository_are_words_on_the_site(site):
    page = (site / "paper" / "index.html").read_text()
    assert "<code>gatelet/estimators/smooth_times_stochastic.py</code>" in page
    assert "../src/" not in page


def test_no_page_is_forgotten():
    """Every page stands in the navigation."""
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation, page


def test_the_badge_counts_the_estimators():
    badge = (ROOT / "docs" / "pictures" / "certified.svg").read_text()
    assert f">{len(gatelet.estimators.ALL)}</text>" in badge, "draw it again: python docs/make_pictures.py"


def test_the_release_has_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1] == version


def test_the_readme_is_read_in_a_minute():
    assert (ROOT / "README.md").read_text().count("\n") <= 120


# -------------------------------------------------------------------- in the browser

LOOK = """<!doctype html><title>looking</title><body><script>
const pages = PAGES, widths = WIDTHS, answer = [];
const sleep = time => new Promise(done => setTimeout(done, time));
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  const loaded = new Promise(done => frame.onload = done);
  frame.src = page;
  document.body.append(frame);
  await loaded;
  const inner = frame.contentDocument;
  const pictures = [...inner.querySelectorAll(".md-content img")];
  pictures.forEach(picture => picture.loading = "eager");
  for (let turn = 0; turn < 50 && pictures.some(picture => !picture.complete); turn++) await sleep(20);
  const column = inner.querySelector(".md-content__inner").getBoundingClientRect();
  const right = element => {        // where it ends as seen: what scrolls ends where its box does
    let end = element.getBoundingClientRect().right;
    for (let box = element.parentElement; box; box = box.parentElement)
      if (/auto|scroll|hidden/.test(frame.contentWindow.getComputedStyle(box).overflowX))
        end = Math.min(end, box.getBoundingClientRect().right);
    return end;
  };
  const wide = [...inner.querySelectorAll(".md-content table, .md-content img, .md-content pre")]
    .filter(element => right(element) > column.right + 1)
    .map(element => element.textContent.slice(0, 60) || element.src);
  answer.push({page, width, wide, column: column.width, words: inner.body.innerText.length,
    sideways: inner.documentElement.scrollWidth > width,
    missing: pictures.filter(picture => !picture.naturalWidth).map(picture => picture.src), pictures: pictures.length});
  frame.remove();
}
(async () => {
  for (const page of pages) for (const width of widths)
    await look(page, width).catch(error => answer.push({page, width, error: String(error)}));
  await fetch("/answer", {method: "POST", body: JSON.stringify(answer)});
})();
</script></body>"""


def looked_at(folder: Path, profile: Path, pages: list[str]) -> list[dict]:
    """What the browser sees of the pages, each at each width, in frames of that width."""
    answers: list[list[dict]] = []
    arrived = threading.Event()
    looking = LOOK.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS)).encode()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path != "/looking":
                with suppress(ConnectionError):  # the browser may leave before a file is whole
                    super().do_GET()
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(looking)

        def do_POST(self) -> None:
            answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            arrived.set()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += [
        "--window-size=1600,1000",
        "--remote-debugging-port=0",
        f"http://127.0.0.1:{server.server_port}/looking",
    ]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert arrived.wait(300), "the browser did not answer"
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
        serving.join()
        server.server_close()
    return answers[0]


@needs_mkdocs
@needs_browser
def test_in_a_browser_tables_stay_in_their_columns_and_pictures_are_there(site, tmp_path):
    pages = [
        "/" + path.parent.relative_to(site).as_posix().removeprefix(".") for path in sorted(site.rglob("index.html"))
    ]
    pages = [page if page.endswith("/") else page + "/" for page in pages]
    seen = looked_at(site, tmp_path, pages)
    assert len(seen) == len(pages) * len(WIDTHS)
    assert [each for each in seen if "error" in each] == []
    assert [each for each in seen if each["wide"] or each["sideways"] or each["missing"]] == []
    assert all(each["words"] > 100 for each in seen)
    shown = {each["page"]: each["pictures"] for each in seen}
    assert shown["/"] >= 1
    assert shown["/tutorial/"] >= 3
    assert shown["/gallery/"] >= 4


@needs_browser
def test_the_browser_sees_what_is_too_wide_or_missing(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "index.html").write_text(
        '<div class="md-content"><div class="md-content__inner" style="width: 300px">'
        '<table style="width: 900px"><tr><td>wide</td></tr></table>'
        '<div style="overflow-x: auto"><table style="width: 900px"><tr><td>scrolls</td></tr></table></div>'
        '<img src="gone.png"></div></div>'
    )
    for each in looked_at(tmp_path, tmp_path / "profile", ["/bad/"]):
        assert each["wide"] == ["wide"]
        assert each["sideways"] == (each["width"] == 390)
        assert len(each["missing"]) == 1
