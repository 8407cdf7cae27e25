"""A contact sheet of packed studies, to look at before training on them."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shards.files import atomic_write
from shards.read.reader import ShardReader
from shards.read.tar import to_uint8
from shards.schema import Finding, Study, View

# The standard hanging: right breast on the left, chest walls together.
SLOTS = (("R", "CC"), ("L", "CC"), ("R", "MLO"), ("L", "MLO"))
TILE = (250, 360)  # width, height of an image's place in pixels
LINE = 17  # height of a line of text
TEXT_LINES = 4  # under each image
WRAP = 36  # characters
HEADER = 34
GAP = 24
PAPER, INK, FAINT, BOX = (17, 19, 23), (236, 238, 242), (150, 156, 168), (255, 176, 32)
BLOCK = (len(SLOTS) * TILE[0], HEADER + TILE[1] + TEXT_LINES * LINE)


def contact_sheet(folder: Path, out_png: Path, studies: int = 8) -> Path:
    """Draw `studies` studies, spread evenly over the shards in `folder`, with labels and boxes, and write `out_png`."""
    reader = ShardReader(folder)
    chosen = np.unique(np.linspace(0, len(reader) - 1, min(studies, len(reader))).round().astype(int))
    columns = 1 if len(chosen) <= 3 else 2
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (BLOCK[0] + GAP) + GAP, rows * (BLOCK[1] + GAP) + GAP), PAPER)
    for place, number in enumerate(chosen):
        row, column = divmod(place, columns)
        block = _draw_study(reader, int(number))
        sheet.paste(block, (GAP + column * (BLOCK[0] + GAP), GAP + row * (BLOCK[1] + GAP)))
    out_png.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    sheet.save(buffer, format="png")
    atomic_write(out_png, buffer.getvalue())
    return out_png


def _draw_study(reader: ShardReader, number: int) -> Image.Image:
    study = reader.study(number)
    block = Image.new("RGB", BLOCK, PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), _study_line(study), INK, _font(16))
    draw.line((0, HEADER - 8, BLOCK[0], HEADER - 8), FAINT)
    for slot, (laterality, position) in enumerate(SLOTS):
        x = slot * TILE[0]
        n = next((i for i, v in enumerate(study.views) if (v.laterality, v.view) == (laterality, position)), None)
        if n is None:
            draw.text((x + 8, HEADER + 6), f"{laterality}-{position}  none", FAINT, _font(13))
            continue
        view = study.views[n]
        block.paste(draw_view(reader.image(number, n), view, TILE), (x, HEADER))
        for line, (text, colour) in enumerate(_view_lines(view)):
            draw.text((x + 4, HEADER + TILE[1] + 4 + line * LINE), text, colour, _font(12))
    return block


def draw_view(pixels: np.ndarray, view: View, size: tuple[int, int]) -> Image.Image:
    """The image [h, w] letterboxed to `size` (width, height) with its boxes; right breasts are mirrored back."""
    width, height = size
    scale = min((width - 2) / pixels.shape[1], height / pixels.shape[0])
    shape = max(1, round(scale * pixels.shape[1])), max(1, round(scale * pixels.shape[0]))
    image = Image.fromarray(to_uint8(pixels)).resize(shape, Image.Resampling.LANCZOS)
    mirrored = view.laterality == "R"
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tile = Image.new("RGB", size, (0, 0, 0))
    left = width - image.width if mirrored else 0
    top = (height - image.height) // 2
    tile.paste(image, (left, top))
    draw = ImageDraw.Draw(tile)
    for finding in view.findings:
        if finding.box:
            x0, y0, x1, y1 = (scale * value for value in finding.box)
            if mirrored:
                x0, x1 = image.width - x1, image.width - x0
            draw.rectangle((left + x0, top + y0, left + x1, top + y1), outline=BOX, width=2)
    draw.text((8 if mirrored else width - 62, 6), f"{view.laterality}-{view.view}", INK, _font(15))
    return tile


def _study_line(study: Study) -> str:
    not_shown = len(study.views) - len({(view.laterality, view.view) for view in study.views})
    more = [f"{not_shown} more images"] if not_shown else []
    return "  ·  ".join([study.source, study.split, f"study {study.key}", *people_facts(study), *more])


def people_facts(study: Study) -> list[str]:
    """Age, race, ethnicity and reason of the exam, without unknown ones."""
    facts = [f"age {study.age}"] if study.age is not None else []
    return facts + [text for text in (study.race, study.ethnicity, study.reason) if text]


def label_line(view: View) -> str:
    """The labels of an image in one line."""
    labels = view.labels
    facts = [f"BI-RADS {labels.birads}"] if labels.birads is not None else []
    facts += [f"density {labels.density}"] if labels.density else []
    outcome = labels.pathology or {None: None, False: "no cancer", True: "cancer"}[labels.cancer]
    facts += [outcome] if outcome else []
    return " · ".join(facts) or "no labels"


def finding_line(view: View) -> str:
    """The findings of an image in one line."""
    return "; ".join(map(_finding_words, view.findings))


def _view_lines(view: View) -> list[tuple[str, tuple[int, int, int]]]:
    lines = [(label_line(view), INK)]
    lines += [(line, BOX) for line in textwrap.wrap(finding_line(view), WRAP)]
    lines += [(line, FAINT) for line in textwrap.wrap((view.report or "").replace("\n", ". "), WRAP)]
    return lines[:TEXT_LINES]


def _finding_words(finding: Finding) -> str:
    words = (finding.shape, finding.margin, finding.calcification_type, finding.distribution, finding.kind)
    return " ".join(word for word in words if word)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
