"""The page of a run: what it holds, what it is refused for, and how it behaves in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from reports import record, written

from thanos.report.__main__ import main
from thanos.report.compare import compare_page
from thanos.report.page import run_page
from thanos.report.read import Place, place, run_of


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_names_say_where_a_layer_stands() -> None:
    assert place("model.layers.3.mlp.experts.gate_up_proj[17]") == Place(3, "mlp.experts.gate_up_proj", 17)
    assert place("model.layers.12.block_sparse_moe.experts.5.w1") == Place(12, "block_sparse_moe.experts.*.w1", 5)
    assert place("transformer.h.0.attn.c_attn") == Place(0, "attn.c_attn", None)
    assert place("lm_head") == Place(None, "lm_head", None)


def test_a_page_tells_what_was_done_and_needs_nothing_else() -> None:
    page = run_page(run_of("out", record(blocks=4, experts=3)))
    for said in (
        "some/model",
        "thanos",
        "2:4",
        "25.25",
        "from 20.50",
        "49.87%",
        "2 MB",
        "/a/private/place",
        "a router",
    ):
        assert said in page, said
    for name in ("Relative loss", "Sparsity", "Tokens per expert", "Layers with more damping", "Outlier rows"):
        assert f"<h3>{name}</h3>" in page, name
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", page)
    assert page.count("<svg") > 10


@pytest.mark.parametrize("missing", sorted(record()))
def test_a_record_of_an_older_version_has_a_page(missing: str) -> None:
    old = {key: value for key, value in record().items() if key != missing}
    assert "<h1>" in run_page(run_of("old", old))


@pytest.mark.parametrize("missing", sorted(record()["layers"][0].keys() - {"name"}))
def test_layers_of_an_older_version_are_shown(missing: str) -> None:
    old = record()
    for layer in old["layers"]:
        del layer[missing]
    page = run_page(run_of("old", old))
    assert old["layers"][0]["name"] in page


def test_what_a_newer_version_records_is_shown_too() -> None:
    new = record(divergence={"before": 0.25})
    new["layers"][0]["error_after_reconstruction"] = 0.125
    page = run_page(run_of("new", new))
    assert "divergence" in page
    assert '"label":"error after reconstruction"' in page
    assert run_page(run_of("bare", {})).count("<section>") < page.count("<section>")


def test_names_are_no_markup() -> None:
    evil = "</script><script>alert(1)</script>"
    odd = record(command=evil, dense={evil: evil}, method=evil)
    odd["layers"][0]["name"] = evil
    odd["options"]["model"] = evil
    for page in (run_page(run_of(evil, odd)), compare_page([run_of(evil, odd), run_of(evil, odd)])):
        assert "<script>alert" not in page
        assert page.count("</script>") == 2


def test_the_command_makes_the_page_anew(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    result = report(folder)
    assert result.exit_code == 0, result.output
    assert (folder / "report.html").read_text() == run_page(run_of("out", record()))
    assert oct((folder / "report.html").stat().st_mode & 0o777) == oct(0o666 & ~umask())
    other = written(tmp_path / "other", perplexity={"dense": 20.5, "pruned": 31.125, "source": "wikitext2"})
    result = report(folder, other, "--output", tmp_path / "both.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "both.html").read_text()
    assert "<td class=best>25.25</td><td>31.12</td>" in page
    assert page.count("relative_loss:o") == 2
    assert sorted(path.name for path in other.iterdir()) == ["pruning.json"]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def refused(*arguments: object, match: str) -> None:
    result = report(*arguments)
    assert result.exit_code not in (0, None)
    assert result.stderr.startswith("Error: ")
    assert match in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


DAMAGED = {
    "": "is damaged: it is no JSON",
    "{": "is damaged: it is no JSON",
    "[" * 100_000: "is damaged",
    "[]": "it holds no object",
    '{"layers": 3}': "its layers are no list",
    '{"layers": [{}]}': "layer 0 has no name",
    '{"layers": [{"name": "a", "loss": "much"}]}': "the loss of a is no number",
    '{"layers": [{"name": "a", "shape": [1]}]}': "the shape of a is no pair of numbers",
    '{"layers": [{"name": "a", "seconds": 1}]}': "the seconds of a are no object",
    '{"options": []}': "its options is no object",
    '{"excluded": {}}': "its excluded layers are no list",
}


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "pruning.json").write_text(text)
    refused(tmp_path, match=DAMAGED[text])
    assert [path.name for path in tmp_path.iterdir()] == ["pruning.json"]


def test_directories_without_a_record_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", match="there is no directory")
    refused(tmp_path, match="holds no pruning.json")
    (tmp_path / "out.partial").mkdir()
    refused(tmp_path / "out", match="was interrupted; finish it with the same command and --resume")
    refused(written(tmp_path / "done"), "--output", tmp_path, match="is a directory")
    refused(tmp_path / "done", "--output", tmp_path / "nowhere" / "page.html", match="cannot write")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    folder.chmod(0o555)
    refused(folder, match="cannot write")
    folder.chmod(0o755)


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("there is no Chromium here: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(chromedriver))
    yield driver
    driver.quit()


def opened(browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(file.absolute().as_uri())


def shown(browser: Any) -> list[list[str]]:
    """The cells of the rows in the document."""
    rows: list[list[str]] = browser.execute_script(
        "return [...document.querySelectorAll('.scroller tbody tr:not(.gap)')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return rows


def click(browser: Any, heading: str) -> None:
    browser.execute_script(
        "[...document.querySelectorAll('.scroller th button')]"
        ".find(one => one.textContent.startsWith(arguments[0])).click()",
        heading,
    )


def typed(browser: Any, text: str) -> None:
    browser.execute_script(
        "const input = document.querySelector('.tools input'); input.value = arguments[0];"
        "input.dispatchEvent(new Event('input'))",
        text,
    )


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_the_page_works_in_a_browser(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    folder = written(tmp_path / "out", blocks=20, experts=48)
    assert report(folder).exit_code == 0
    opened(browser, folder / "report.html", width, scheme)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ink, paper = browser.execute_script(
        "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
    )
    dark = [sum(map(int, re.findall(r"\d+", colour)[:3])) < 384 for colour in (ink, paper)]
    assert dark == ([False, True] if scheme == "dark" else [True, False])

    layers = record(blocks=20, experts=48)["layers"]
    assert len(shown(browser)) < 100 < len(layers) == 2000
    click(browser, "relative loss")
    worst = max(layers, key=lambda layer: layer["relative_loss"])["name"]
    assert worst.endswith(shown(browser)[0][0])
    click(browser, "relative loss")
    best = min(layers, key=lambda layer: layer["relative_loss"])["name"]
    assert best.endswith(shown(browser)[0][0])
    typed(browser, "layers.7. down[3]")
    assert [row[0].rpartition(".")[2] for row in shown(browser)] == ["down[3]"]
    typed(browser, "damping > 0.05, experts")
    raised = [layer for layer in layers if layer["damping"] > 0.05 and "experts" in layer["name"]]
    output = browser.execute_script("return document.querySelector('.tools output').textContent")
    assert output == f"{len(raised)} of 2,000 layers"


def test_fifty_thousand_layers_scroll(browser: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "out", blocks=100, experts=248)
    assert report(folder).exit_code == 0
    opened(browser, folder / "report.html")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.querySelector('.tools output').textContent") == "50,000 layers"
    browser.execute_async_script(
        "const box = document.querySelector('.scroller'); box.scrollTop = box.scrollHeight;"
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50)))"
    )
    rows = shown(browser)
    assert len(rows) < 100
    assert rows[-1][0] == "model.layers.99.mlp.experts.down[247]"
    assert browser.execute_script("return document.querySelectorAll('*').length") < 5000


def test_values_show_under_the_pointer_and_runs_compare(browser: Any, tmp_path: Path) -> None:
    one, two = written(tmp_path / "one", blocks=12), written(tmp_path / "two", blocks=12, pattern="0.5")
    assert report(one, two, "--output", tmp_path / "both.html").exit_code == 0
    opened(browser, tmp_path / "both.html")
    assert browser.get_log("browser") == []
    browser.execute_script(
        "const area = document.querySelector('.drawing'); const box = area.getBoundingClientRect();"
        "area.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width * 0.52,"
        " clientY: box.top + 20, bubbles: true}))"
    )
    tip = browser.execute_script("return document.getElementById('tip').innerText")
    assert tip.startswith("block 6")
    assert "one" in tip
    assert "two" in tip
    headings = browser.execute_script("return [...document.querySelectorAll('.scroller th')].map(one => one.innerText)")
    assert headings[:3] == ["layer", "relative loss, one", "relative loss, two"]


def test_the_page_prints(browser: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "out", blocks=20, experts=48)
    assert report(folder).exit_code == 0
    opened(browser, folder / "report.html")
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"]
    assert len(pdf) > 20_000
    assert len(shown(browser)) < 100


def test_the_record_is_found_by_its_file(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    assert report(folder / "pruning.json").exit_code == 0
    assert (folder / "report.html").exists()
    assert json.loads((folder / "pruning.json").read_text())["method"] == "thanos"
