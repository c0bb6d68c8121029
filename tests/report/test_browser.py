"""The pages in a real browser: nothing fails, nothing is fetched, charts have content, choices work."""

import shutil

import pytest
import torch

from matchdistill.report.page import write_report
from matchdistill.runs import evidence
from matchdistill.runs.train import fit

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

LOOKS = [(scheme, width) for scheme in ("light", "dark") for width in (1280, 390)]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens a page; at the end, everything that it complained about or asked for is an error."""
    contexts, wrong = [], []

    def open_(path, scheme="light", width=1280):
        contexts.append(browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        address = path.resolve().as_uri()
        page.on("request", lambda asked: wrong.append(asked.url) if not local(asked.url, address) else None)
        page.goto(address)
        return page

    def local(url, address):
        return url == address or url.startswith(("data:", "blob:"))

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture
def classification(folder, tiny):
    """A run of three epochs, once for all tests."""
    if not (folder / "run").exists():
        arguments = "--distillation.method=mgd-amp", "--distillation.refresh_every=1", "--training.epochs=3"
        fit(tiny(*arguments), folder / "run", quiet=True)
    return write_report([folder / "run"])


@pytest.fixture
def detection(folder, small):
    """A run whose student finds something, once for all tests."""
    if not (folder / "detector").exists():
        fit(small("--distillation.refresh_every=1"), folder / "detector", quiet=True)
        tensors, told = evidence.load(folder / "detector" / evidence.PICTURES)
        told["images"][0]["student"] = [["disc", 0.9, 0.1, 0.1, 0.5, 0.5]]
        evidence.save(folder / "detector" / evidence.PICTURES, tensors, told)
    return write_report([folder / "detector"])


def drawn(page):
    """Scroll through the page, so that all charts which are shown are drawn, and return them."""
    page.wait_for_selector(".js-plotly-plot")
    for plot in page.query_selector_all(".plot"):
        if plot.is_visible():
            plot.scroll_into_view_if_needed()
            page.wait_for_function("plot => plot.classList.contains('js-plotly-plot')", arg=plot)
    return [plot for plot in page.query_selector_all(".js-plotly-plot") if plot.is_visible()]


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
@pytest.mark.parametrize("kind", ["classification", "detection"])
def test_charts_have_content_and_fit_the_screen(request, opened, kind, scheme, width):
    page = opened(request.getfixturevalue(kind), scheme, width)
    plots = drawn(page)
    assert len(plots) == 2 + {"classification": 3, "detection": 1}[kind] + 2 + 4
    for plot in plots:
        marks = plot.query_selector_all(".point, .js-line, .heatmaplayer image, .bars path")
        assert marks, plot.get_attribute("aria-label")
        box = plot.bounding_box()
        assert 250 < box["width"] <= width
        assert plot.get_attribute("role") == "img"
        assert len(plot.get_attribute("aria-label")) > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for image in page.query_selector_all("img"):
        assert image.get_attribute("alt")


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_text_can_be_read(opened, classification, scheme, width):
    """The contrast of text with what is behind it is at least 4.5, of the page's and of the charts' (WCAG 2.1, 1.4.3)."""
    page = opened(classification, scheme, width)
    drawn(page)
    behind = page.evaluate("getComputedStyle(document.querySelector('.chart')).backgroundColor")
    texts = {
        "page": page.evaluate("getComputedStyle(document.body).color"),
        "caption": page.evaluate("getComputedStyle(document.querySelector('figcaption')).color"),
        "tick": page.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill"),
        "legend": page.evaluate("getComputedStyle(document.querySelector('.legendtext')).fill"),
        "axis": page.evaluate("getComputedStyle(document.querySelector('.ytitle')).fill"),
    }
    for name, colour in texts.items():
        assert contrast(colour, behind) >= 4.5, (name, colour, behind)


def contrast(*colours):
    """Of two colours "rgb(r, g, b)": WCAG's ratio of relative luminances."""
    luminances = []
    for colour in colours:
        parts = [float(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_positions_and_channels_are_chosen_by_keyboard(opened, classification):
    page = opened(classification)
    drawn(page)
    shown = "[data-of='position1']:not([hidden])"
    assert page.get_attribute(shown, "data-value") == "2"  # the deepest first
    position = page.locator("select[data-group='position1']")
    position.focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert page.get_attribute(shown, "data-value") == "0"
    assert len(drawn(page)) == 2 + 3 + 2 + 4  # those of the position now chosen have been drawn
    channel = page.locator("select[data-group='channel1.0']")
    first = page.get_attribute("[data-of='channel1.0']:not([hidden])", "aria-label")
    channel.focus()
    page.keyboard.press("ArrowDown")
    assert page.get_attribute("[data-of='channel1.0']:not([hidden])", "aria-label") != first
    assert page.locator("[data-of='channel1.0']:not([hidden])").count() == 1


def test_charts_fit_a_screen_that_was_turned_while_they_were_hidden(opened, classification):
    page = opened(classification)
    drawn(page)
    position = page.locator("select[data-group='position1']")
    position.select_option("0")
    page.set_viewport_size({"width": 390, "height": 900})
    page.wait_for_timeout(500)  # what is shown has followed
    position.select_option("2")
    page.wait_for_timeout(500)
    for plot in drawn(page):
        assert plot.query_selector(".main-svg").bounding_box()["width"] <= plot.bounding_box()["width"]


def test_charts_follow_the_colour_scheme(opened, classification):
    page = opened(classification)
    drawn(page)
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        colours.append(page.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill"))
    assert contrast(*colours) > 4.5


def test_hovering_tells_values(opened, classification):
    page = opened(classification)
    drawn(page)
    plot = page.locator("figure:has-text('Costs of all pairs') .js-plotly-plot").locator("visible=true").first
    plot.scroll_into_view_if_needed()
    box = plot.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(".hovertext")
    assert "cost" in page.text_content(".hovertext")


def test_maps_are_of_what_was_seen(opened, classification, folder):
    """The colours of a map, read back from the page, say its values: red above zero, blue below."""
    page = opened(classification)
    tensors, told = evidence.load(folder / "run" / evidence.PICTURES)
    channel = told["positions"][2]["channels"][0]
    image = page.query_selector(f"[data-of='channel1.2']:not([hidden]) img[alt='student channel {channel}, image 1']")
    pixels = page.evaluate(
        """async (image) => {
          await image.decode();
          const canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
          const context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          return Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data);
        }""",
        image,
    )
    values = tensors["student2"][0, 0].float()
    red, _, blue, _ = torch.tensor(pixels).reshape(*values.shape, 4).unbind(2)
    clear = values.abs() > 0.1 * values.abs().max()
    assert torch.equal((red > blue)[clear], (values > 0)[clear])


def test_boxes_are_drawn(opened, detection):
    page = opened(detection)
    box = page.locator("svg.boxes[aria-label*='student'] rect").first
    outer = page.locator("svg.boxes[aria-label*='student']").first.bounding_box()
    inner = box.bounding_box()
    assert inner["width"] / outer["width"] == pytest.approx(0.4, abs=0.05)
    assert inner["x"] - outer["x"] == pytest.approx(0.1 * outer["width"], abs=0.05 * outer["width"])
    assert page.locator("svg.boxes text", has_text="disc 90%").count() == 1


def test_print_draws_every_chart_on_paper(opened, classification):
    """Nothing was scrolled to: each chart of every position has marks, in the width of the paper, black on white."""
    page = opened(classification, "dark")
    page.wait_for_function("window.Plotly !== undefined")
    page.evaluate(
        """addEventListener("beforeprint", () => {
          const plots = [...document.querySelectorAll(".plot")];
          window.printed = plots.map((plot) => [
            plot.getAttribute("aria-label"),
            plot.querySelectorAll(".point, .js-line, .heatmaplayer image, .bars path").length,
            plot.checkVisibility(),
          ]);
          window.ink = getComputedStyle(document.querySelector(".xtick text")).fill;
        })"""
    )
    written = page.pdf(format="A4")
    assert written.startswith(b"%PDF")
    printed = page.evaluate("window.printed")
    assert len(printed) == page.locator(".plot").count() == 2 + 3 + 2 + 3 * 4
    assert [label for label, marks, shown in printed if not marks or not shown] == []
    assert contrast(page.evaluate("window.ink"), "rgb(255, 255, 255)") >= 4.5
    assert page.locator("[data-of='position1'][hidden]").count() == 2  # as before
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 700, "height": 900})
    for plot in page.locator(".plot:visible").all():
        svg, box = plot.locator(".main-svg").first.bounding_box(), plot.bounding_box()
        assert svg["width"] <= box["width"] + 1
        assert svg["height"] <= box["height"] + 1
        assert box["height"] > 50


def test_charts_and_tables_are_downloaded(opened, classification):
    page = opened(classification)
    drawn(page)
    with page.expect_download() as loading:
        page.locator("figure.chart:has-text('Accuracy by class') button.csv").click()
    assert loading.value.suggested_filename == "accuracy-by-class.csv"
    lines = loading.value.path().read_text().splitlines()
    assert lines[0] == "series,x,y,value"
    assert len(lines) == 1 + 2 * 10  # the student and its teacher, ten digits
    with page.expect_download() as loading:
        page.locator("figure.chart:has-text('Confusion matrix') button.csv").click()
    assert len(loading.value.path().read_text().splitlines()) == 1 + 10 * 10
    with page.expect_download() as loading:
        page.locator("figure.chart:has-text('Calibration') button.png").click()
    assert loading.value.path().read_bytes().startswith(b"\x89PNG")
    with page.expect_download() as loading:
        page.locator("button[aria-label='download as CSV: networks']").click()
    assert loading.value.path().read_text().startswith("network,top-1,top-5,")


def test_words_are_explained_by_keyboard(opened, classification):
    page = opened(classification)
    tip = page.locator(".term:has(button[aria-label='what churn means']) .tip")
    assert not tip.is_visible()
    page.locator("button[aria-label='what churn means']").focus()
    assert tip.is_visible()
    assert "share of teacher channels" in tip.text_content()


def test_a_wide_table_says_that_it_scrolls(opened, classification):
    page = opened(classification, width=390)
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll.wider'), '::before').content").startswith(
        '"scroll'
    )
    assert page.locator(".scroll.wider[tabindex='0'] #summary").count() == 1
