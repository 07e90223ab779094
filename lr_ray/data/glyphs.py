"""`glyphs`: characters in the 16 typefaces that matplotlib ships, drawn by Pillow; 61 Latin classes, 79 others."""

import functools
import hashlib
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont

from lr_ray.data.images import LabelledImages

_SIDE_PX = 48
_FONT_PX = 36
_SCRIPTS = {
    "latin": "abcdefghijklmnopqrstuvwxyzABDEFGHIJKLMNQRTUY0123456789&@#%?!$",
    "greek": "αβγδεζηθικλμνξπρσςτυφχψωΓΔΘΛΞΠΣΦΨΩ",
    "cyrillic": "бвгджзийклмнптфцчшщъыьэюяБГДЖИЙЛПУФЦЧШЩЪЫЬЭЮЯ",
}
_FAMILIES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
_STYLES = {
    "STIXGeneral": ("", "Bol", "BolIta", "Italic"),
    "DejaVuSerif": ("", "-Bold", "-BoldItalic", "-Italic"),
}
_OBLIQUE_STYLES = ("", "-Bold", "-BoldOblique", "-Oblique")


def load_glyphs() -> LabelledImages:
    """Classes `latin/a`, `greek/α`, `cyrillic/б`…; one 48 px image a typeface, black on white, centred."""
    class_names = tuple(f"{script}/{character}" for script, characters in _SCRIPTS.items() for character in characters)
    fonts = _font_files()

    def open_image(index: int) -> Image.Image:
        return _draw(class_names[index // len(fonts)].partition("/")[2], fonts[index % len(fonts)])

    def digest() -> str:
        content = [
            f"{class_names}{_SIDE_PX}{_FONT_PX}{PIL.__version__}".encode(),
            *(font.read_bytes() for font in fonts),
        ]
        return hashlib.sha256(b"".join(content)).hexdigest()

    return LabelledImages(
        name="glyphs",
        class_names=class_names,
        labels=np.repeat(np.arange(len(class_names)), len(fonts)),
        describe=lambda index: f"{class_names[index // len(fonts)]} in {fonts[index % len(fonts)].stem}",
        open_image=open_image,
        digest=digest,
    )


def _font_files() -> list[Path]:
    import matplotlib  # 0.3 s, which other data need not wait for

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [folder / f"{family}{style}.ttf" for family in _FAMILIES for style in _STYLES.get(family, _OBLIQUE_STYLES)]


@functools.cache
def _font(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), _FONT_PX)


def _draw(character: str, font_file: Path) -> Image.Image:
    image = Image.new("RGB", (_SIDE_PX, _SIDE_PX), "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), character, font=_font(font_file))
    corner = ((_SIDE_PX - (right - left)) / 2 - left, (_SIDE_PX - (bottom - top)) / 2 - top)
    draw.text(corner, character, fill="black", font=_font(font_file))
    return image
