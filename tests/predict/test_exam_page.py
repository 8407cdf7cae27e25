"""The pages of a prediction: what is on them, and that a browser shows it, by keyboard, on a telephone, on paper."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from mama.data.images import to_canvas
from mama.export.figures import Data, Estimate, Metrics, Pointing
from mama.predict.exam_page import write_pages
from mama.predict.neighbours import Neighbour
from mama.predict.shown import overlay, shown
from tests.support.browser import CHROMIUM, Page, browser
from tests.support.prediction import CANVAS, LESION, grey_map, prediction, seen

FOUR = [("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO")]
MANY = [("L", "CC"), ("L", "CC"), ("R", "CC"), (None, "CC"), ("R", None)]
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
SENTENCES = ["spiculated mass", "calcification"]
HOSTILE = (
    "</style></script><img src=x onerror=hacked=1><script>hacked=1</script>\"' onload=hacked=1 javascript:hacked=1"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    document, shown_by_file = prediction([FOUR, MANY], SENTENCES)
    document["refused"] = [{"file": "in/b.txt", "reason": "unreadable", "message": "damaged, or not an image"}]
    first = next(iter(shown_by_file))
    near = [Neighbour(f"key{n}", 0.9 - n / 100, ["R CC", "density B"], seen("R", "CC").stored, "R", True)
            for n in range(5)]  # fmt: skip
    shown_by_file[first] = shown(
        seen("L", "CC"), {text: grey_map(seen("L", "CC")) for text in SENTENCES[:1]}, "letterbox", near
    )
    write_pages(document, shown_by_file, folder)
    return folder


def words(page: str) -> str:
    """The visible text, in one line."""
    body = re.sub(r"<(style|script|noscript)>.*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)))


def picture(uri: str) -> np.ndarray:
    return np.asarray(cv2.imdecode(np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8), -1))


@pytest.mark.parametrize(("side", "flipped", "known"), [
    ("L", False, True), ("R", True, True), ("R", False, True), ("L", False, False), ("R", True, False),
])  # fmt: skip
def test_a_picture_hangs_with_its_map_on_it(side: str, flipped: bool, known: bool) -> None:
    """Whether packing has mirrored it or not, and as in its file if its side is not known.

    Box and map lie where the lesion is in the picture.
    """
    one = seen(side, "CC", flipped)
    one = one if known else replace(one, laterality=None)
    made = shown(one, {"x": grey_map(one)}, "letterbox")
    pixels = picture(made.picture)
    assert pixels.shape == one.stored.shape
    wall = 0 if pixels[:, :10].sum() > pixels[:, -10:].sum() else 1
    assert wall == (side == "R"), "chest wall at the right of a right breast"
    assert made.mirrored is False, "as in these files"
    assert made.extent == (280, 200)
    x0, y0, x1, y1 = LESION
    box = (200 - x1, y0, 200 - x0, y1) if side == "R" else LESION
    x, y, width, height = made.place(box)
    lesion = pixels[round(y / 2) : round((y + height) / 2), round(x / 2) : round((x + width) / 2)]
    assert lesion.min() > 200
    map_ = picture(overlay(made.maps["x"], 0, 1))
    row, column = np.unravel_index(map_[..., 3].argmax(), map_.shape[:2])
    scale = 280 / map_.shape[0]
    assert y - 10 <= row * scale <= y + height + 10
    assert x - 10 <= column * scale <= x + width + 10


def test_a_file_that_is_mirrored_hangs_all_the_same() -> None:
    """A right breast whose chest wall is at the left in its file."""
    one = replace(seen("L", "CC"), laterality="R")
    made = shown(one, {"x": grey_map(one)}, "letterbox")
    assert made.mirrored
    pixels = picture(made.picture)
    assert pixels[:, :10].sum() < pixels[:, -10:].sum()
    x, y, width, height = made.place(LESION)
    assert pixels[round(y / 2) : round((y + height) / 2), round(x / 2) : round((x + width) / 2)].min() > 200
    map_ = picture(overlay(made.maps["x"], 0, 1))
    assert abs(map_[..., 3].max(0).argmax() * 280 / map_.shape[0] - (x + width / 2)) < 25


def test_a_large_image_becomes_one_of_a_browsers_size() -> None:
    stored = np.zeros((4000, 3000), np.uint8)
    stored[:, :2000] = 99
    one = replace(seen("L", "CC"), stored=stored, canvas=to_canvas(stored, CANVAS, "letterbox"))
    made = shown(one, {"x": grey_map(one)}, "letterbox")
    assert max(picture(made.picture).shape) == 1000
    assert max(made.maps["x"].shape) <= 256


def test_an_exam_hangs_and_each_missing_view_says_so(pages: Path) -> None:
    text = (pages / "exam-1.html").read_text()
    assert re.findall(r'class="view \w+" aria-label="([^"]*)"', text) == [
        "Right CC", "Left CC", "Right MLO", "Left MLO",
    ]  # fmt: skip
    cells = re.findall(r'<section class="view (\w+)".*?</section>', text, re.DOTALL)
    assert cells == ["right", "left"] * 2
    assert [alt for alt in re.findall(r'<img src="data[^>]*alt="([^"]*)"', text) if "neighbour" not in alt] == [
        "mammogram, Right CC", "mammogram, Left CC", "mammogram, Right MLO", "mammogram, Left MLO",
    ]  # fmt: skip
    assert "Side or view unknown" not in text
    other = (pages / "exam-2.html").read_text()
    left = re.search(r'aria-label="Left CC".*?</section>', other, re.DOTALL)
    assert left is not None
    assert left[0].count("<figure>") == 2
    assert "2 images" in left[0]
    assert other.count("No image of this view") == 2
    unknown = re.search(r'<h3 id="others">.*?<h2', other, re.DOTALL)
    assert unknown is not None
    assert unknown[0].count("<figure>") == 2
    assert "mammogram, side unknown CC" in unknown[0]
    assert "mammogram, Right view unknown" in unknown[0]


def test_an_exam_of_unknown_views_has_no_empty_places(tmp_path: Path) -> None:
    document, of_files = prediction([[(None, "CC"), ("R", None)]])
    write_pages(document, of_files, tmp_path)
    text = (tmp_path / "exam-1.html").read_text()
    assert text.count("<figure>") == 2
    for absent in ("No image of this view", 'class="hanging"', "Hung as"):
        assert absent not in text


def test_scores_stand_beside_their_calibration_or_the_reason_that_there_is_none(pages: Path) -> None:
    text = words((pages / "exam-1.html").read_text())
    assert "of cancer raw calibrated Exam 0.900 0.070 Right breast 0.500 0.050 Left breast 0.500 0.050 " in text
    assert "R CC 0.300 0.030 L CC 0.100 0.010 R MLO 0.400 0.040 L MLO 0.200 0.020 Calibration: isotonic." in text
    assert "of A B C D Exam 0.250 0.500 0.250 – " in text
    assert (
        "Not calibrated: the val split has no such label. Not scored: D. The training texts never mention C: " in text
    )
    assert "“spiculated mass” 0.125 map 0.125 map" in text
    assert "R CC in/exam 0/2.dcm 200 × 300" in text
    names = words((pages / "exam-2.html").read_text())
    for name in ("R CC 0.300", "L CC 1 0.100", "L CC 2 0.200", "side unknown CC 0.400", "R view unknown 0.500"):
        assert name in names, name
    index = words((pages / "index.html").read_text())
    assert (
        "exam images Cancer: cancer Density exam 0 patient P1 R CC, L CC, R MLO, L MLO 0.900 (0.070) B 0.500" in index
    )
    assert "L CC × 2" in index
    assert "in/b.txt unreadable damaged, or not an image" in index


def test_every_page_says_that_it_is_not_for_clinical_use_also_on_paper(pages: Path) -> None:
    files = sorted(pages.glob("*.html"))
    assert [path.name for path in files] == ["exam-1.html", "exam-2.html", "index.html"]
    for path in files:
        assert words(path.read_text()).count("Not for clinical use") == 2, "at the top, and on each sheet of paper"


def test_the_page_says_what_a_map_is_and_how_often_it_points(tmp_path: Path, pages: Path) -> None:
    assert "the model folder records no figure of how often such a map points" in (pages / "exam-1.html").read_text()
    document, of_files = prediction([FOUR], SENTENCES)
    data = Data(("vindr",), ("vindr",), "test", 50, 200, 0)
    pointing = Pointing(Estimate(0.42, 0.3, 0.54), 0.11, 0.08, 60, 41)
    metrics = Metrics("", "", "fp32", "merged", data, {}, pointing)
    write_pages(document, of_files, tmp_path, metrics)
    text = words((tmp_path / "exam-1.html").read_text())
    short = "Of 60 findings (vindr) such maps pointed at 42 %, chance at 8 %: what a heat map is, and what it is not ."
    assert short in text[: text.index("Pictures")], "where a sentence is chosen"
    assert "of 60 findings of 41 patients with a box (vindr, test split), the highest" in text
    assert "next to it in 42 % (95 % interval 30 to 54 %); the brightest patch of the image, which reads no" in text
    assert "sentence, in 11 %; a random patch of tissue would in 8 %." in text
    assert "Phantoms" not in text
    write_pages(document, of_files, tmp_path, replace(metrics, data=replace(data, sources=("phantom",))))
    assert "Phantoms are no mammograms" in (tmp_path / "exam-1.html").read_text()
    write_pages(document, of_files, tmp_path, replace(metrics, pointing=None))
    text = (tmp_path / "exam-1.html").read_text()
    assert "Not measured: the model folder" in text
    assert "How often such maps point at a lesion was not measured:" in text[: text.index("Pictures")]
    document, of_files = prediction([FOUR])
    write_pages(document, of_files, tmp_path)
    text = (tmp_path / "exam-1.html").read_text()
    for absent in ("What a heat map is", 'id="sentences"', 'id="maps"', "Nearest images"):
        assert absent not in text


def test_a_model_without_maps_has_pages_too(tmp_path: Path) -> None:
    """One that was trained without the local term. An image may be without a picture, too."""
    document, of_files = prediction([FOUR], SENTENCES)
    for image in document["exams"][0]["images"]:
        del image["maps"]
    gone = document["exams"][0]["images"][0]["file"]
    write_pages(document, {file: replace(one, maps={}) for file, one in of_files.items() if file != gone}, tmp_path)
    page = (tmp_path / "exam-1.html").read_text()
    text = words(page)
    assert "“spiculated mass” 0.125 0.125 0.125 0.125 " in text
    assert "There is no heat map: the model was trained without the local term" in text
    assert text.count("The picture is missing.") == 1
    assert "What a heat map is" not in text
    assert 'id="maps"' not in page


def test_a_page_needs_nothing_but_itself_and_allows_nothing_else(pages: Path) -> None:
    for path in pages.glob("*.html"):
        text = path.read_text()
        for address in re.findall(r'(?:src|href)="([^"]{0,40})', text):
            assert re.match(r"data:image/|#|(index|exam-\d+)\.html|maps/\d-\d\.png", address), address
        assert not re.search(r'\son\w+="|\sstyle="|https?://|@import|url\(', re.sub(r'"data:[^"]*"', '""', text))
        policy = html.unescape(re.findall(r'Content-Security-Policy" content="([^"]*)"', text)[0])
        assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
        for kind in ("style", "script"):
            for body in re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL):
                digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
                assert f"{kind}-src 'sha256-{digest}'" in policy


def test_markup_in_names_and_sentences_is_text(tmp_path: Path) -> None:
    document, of_files = prediction([FOUR], [HOSTILE], folder=HOSTILE)
    exam = document["exams"][0]
    exam["exam"] = exam["patient"] = document["model"]["name"] = HOSTILE
    exam["images"][0]["notes"] = [HOSTILE]
    exam["images"][0]["maps"][HOSTILE]["file"] = f"javascript:{HOSTILE}"
    document["refused"] = [{"file": HOSTILE, "reason": HOSTILE, "message": HOSTILE}]
    write_pages(document, of_files, tmp_path)
    for path in tmp_path.glob("*.html"):
        text = path.read_text()
        assert text.count("<script>") == (path.name == "exam-1.html")
        assert text.count("<style>") == text.count("</style>") == 1
        assert "onerror=hacked" not in re.sub(r"&lt;img src=x onerror=hacked", "", text)
        assert 'href="javascript:' not in text
        assert html.escape(HOSTILE, quote=False).replace('"', "&#34;").replace("'", "&#39;") in text
    if CHROMIUM:
        with browser(tmp_path) as page:
            for path in tmp_path.glob("*.html"):
                page.open(path)
                assert page.value("typeof hacked") == "undefined"
                assert page.value("[...document.images].every(i => i.src.startsWith('data:'))")
                assert page.said == [], "not even tried"


def test_units_without_calibration_have_their_reason_too(tmp_path: Path) -> None:
    """With `--pool max` images are calibrated, breasts and exams are not."""
    document, of_files = prediction([FOUR])
    document["tasks"] = {"cancer": {**document["tasks"]["cancer"], "reason": "exams: of another pool"}}
    document["exams"][0]["calibrated"] = {}
    write_pages(document, of_files, tmp_path)
    text = words((tmp_path / "exam-1.html").read_text())
    assert "Exam 0.900 – " in text
    assert "Calibration: isotonic, but none for exams: of another pool." in text


def test_a_command_in_a_sentence_stands_as_code(tmp_path: Path) -> None:
    """And not between backticks, wherever a sentence of ours comes from the document."""
    document, of_files = prediction([FOUR])
    said = "run `mama <eval>` again"
    document["model"]["trained_on"] = [said]
    document["tasks"] = {**document["tasks"], "density": {**document["tasks"]["density"], "reason": said}}
    document["exams"][0]["images"][0]["notes"] = [said]
    document["refused"] = [{"file": "a", "reason": "b", "message": said}]
    write_pages(document, of_files, tmp_path)
    for name, places in (("exam-1.html", 3), ("index.html", 2)):
        page = (tmp_path / name).read_text()
        assert page.count("run <code>mama &lt;eval&gt;</code> again") == places
        assert "`" not in words(page)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["exam-1.html", "exam-2.html", "index.html"])
def test_a_browser_shows_all_of_it(chromium: Page, pages: Path, name: str, width: int) -> None:
    chromium.open(pages / name, width)
    assert chromium.said == []
    assert chromium.requests == [(pages / name).as_uri()]
    assert chromium.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert chromium.value("innerWidth") == width
    assert chromium.value(FITS)
    wide = "[...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1"
    wide += " && getComputedStyle(e).overflowX != 'visible')"
    assert chromium.value(f"{wide}.every(e => e.classList.contains('scroll') && e.tabIndex === 0)")
    if width == 1280:
        assert chromium.value(f"{wide}.length") == 0
    outside = "[...document.querySelectorAll('main :not(svg, svg *, td, th, tr, tbody, thead, table, td *, th *)')]"
    outside += f".filter(e => e.getBoundingClientRect().right > {width} + 0.5).length"
    assert chromium.value(outside) == 0
    heads = "[...document.querySelectorAll('thead th')].map(e => getComputedStyle(e).verticalAlign)"
    assert set(chromium.value(heads)) == {"bottom"}
    cells = (
        "[...document.querySelectorAll('.hanging .view')].map(e => { const p = e.querySelector('.picture, .missing')"
    )
    cells += ".getBoundingClientRect(); return [p.left, p.right, p.top, p.height] })"
    if name == "exam-1.html":
        for right, left in zip(*[iter(chromium.value(cells))] * 2, strict=True):
            assert right[1] == pytest.approx(left[0], abs=1), "chest walls touch"
            assert right[2] == pytest.approx(left[2], abs=1)
            assert right[3] > 150
            assert right[3] == pytest.approx(left[3], abs=1)


def test_a_map_is_chosen_and_faded_with_the_keyboard_alone(chromium: Page, pages: Path) -> None:
    chromium.open(pages / "exam-1.html")
    focus = "document.activeElement"
    maps = "[...document.querySelectorAll('img.map')].filter(e => e.checkVisibility({opacityProperty: true}))"
    frames = "[...document.querySelectorAll('.picture svg')].filter(e => e.checkVisibility()).length"
    assert chromium.value(f"{maps}.length") == 0
    for _ in range(9):
        chromium.press("Tab")
        assert chromium.value(f"getComputedStyle({focus}).outlineStyle") == "solid"
        assert chromium.value(f"parseFloat(getComputedStyle({focus}).outlineWidth)") >= 2
        if chromium.value(f"{focus}.name") == "sentence":
            break
    chromium.press("ArrowDown")
    assert chromium.value(f"{focus}.labels[0].textContent.trim()") == f"“{SENTENCES[0]}”"
    assert chromium.value(f"{maps}.map(e => e.dataset.sentence)") == ["0"] * 4
    assert chromium.value(frames) == 4
    same = "e => JSON.stringify(e.getBoundingClientRect()) === "
    same += "JSON.stringify(e.parentElement.querySelector('img').getBoundingClientRect())"
    assert chromium.value(f"{maps}.every({same})"), "a map covers its picture"
    scale = chromium.value("document.querySelector('#maps .note[data-sentence]:not([hidden])').textContent")
    assert "0.000" not in scale
    assert "Smoothed between patches, which the PNG files are not" in scale
    assert not chromium.value("[...document.querySelectorAll('.printed')].some(e => e.checkVisibility())")
    chromium.press("ArrowDown")
    assert chromium.value(f"{maps}.map(e => e.dataset.sentence)") == ["1"] * 3, "one picture has no map of it"
    chromium.press("Tab")
    assert chromium.value(f"{focus}.labels[0].textContent") == "Opacity"
    assert chromium.value("getComputedStyle(document.querySelector('img.map')).opacity") == "0.6"
    chromium.press("ArrowRight", 4)
    assert chromium.value("getComputedStyle(document.querySelector('img.map')).opacity") == "0.8"
    assert chromium.value("document.getElementById('percent').textContent") == "80 %"
    chromium.press("Tab")
    chromium.press("Space")
    assert chromium.value(frames) == 0
    assert chromium.value(f"{maps}.length") == 3
    unnamed = "[...document.querySelectorAll('input')].filter(e => !e.labels.length).length"
    assert chromium.value(unnamed) == 0
    assert chromium.said == []


def test_without_scripts_pictures_and_scores_are_there(chromium: Page, pages: Path) -> None:
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(pages / "exam-1.html", 390)
        assert chromium.value("document.getElementById('maps').checkVisibility()") is False
        seen_ = "[...document.querySelectorAll('.picture img')].filter(e => e.checkVisibility() && e.clientWidth > 100)"
        assert chromium.value(f"{seen_}.length") == 4
        text = chromium.value("document.body.innerText")
        for part in ("0.900", "Not for clinical use", "Without JavaScript no map"):
            assert part in text
        assert chromium.value("document.querySelectorAll('td a[href^=maps]').length") == 8
    finally:
        chromium.call("Emulation.setScriptExecutionDisabled", value=False)


def test_paper_has_the_notice_on_each_sheet_and_what_a_map_is_of(chromium: Page, pages: Path) -> None:
    chromium.open(pages / "exam-1.html", 714)
    chromium.value("document.querySelectorAll('input[name=sentence]')[1].click()")
    chromium.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert chromium.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert chromium.value(FITS)
        assert chromium.value("document.getElementById('maps').checkVisibility()") is False
        text = chromium.value("document.querySelector('.paper').innerText")
        legends = "[...document.querySelectorAll('[data-sentence].note')].filter(e => e.checkVisibility())"
        assert chromium.value(f"{legends}.length") == 1
        scale = chromium.value(f"{legends}[0].innerText")
    finally:
        chromium.call("Emulation.setEmulatedMedia", media="")
    assert text.startswith("Not for clinical use")
    assert re.match(rf"“{SENTENCES[0]}”: cosine 0\.\d+0\.\d+, one scale", scale), "of the map that is printed"
    assert not chromium.value("document.querySelector('.paper').checkVisibility()")
    pdf = base64.b64decode(chromium.call("Page.printToPDF")["data"])
    streams = [
        zlib.decompressobj().decompress(part)
        for part in re.findall(rb"stream\r?\n(x.*?)\r?\nendstream", pdf, re.DOTALL)
    ]
    lines = [re.findall(rb"<([0-9A-F]+)>", stream) for stream in streams if b" Tf" in stream]
    sheets = [{line for line in of_sheet if len(line) == 4 * len(text)} for of_sheet in lines]  # 4 digits a letter
    assert len(sheets) == len(re.findall(rb"/Type /Page\b", pdf)) > 1
    assert set.intersection(*sheets)
