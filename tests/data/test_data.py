import hashlib
import io
import json
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits as load_scans

from lr_ray.data.images import DataConfig, LabelledImages, fit_square, upright
from lr_ray.data.load import load_data
from lr_ray.errors import DataError

DATA = Path(os.environ.get("LR_RAY_DATA", Path(__file__).parents[3] / "shared" / "data"))
CIFAR_FS_VAL = DATA / "cifar-fs" / "val.parquet"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def load(source: object, classes: Any = None) -> LabelledImages:
    return load_data(DataConfig(source=str(source), classes=classes))


def flat(colour: tuple[int, ...], size: tuple[int, int] = (4, 4), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: list[Any], labels: list[Any], names: list[str] | None = None) -> Path:
    """In the Hugging Face Image convention; `images` are Pillow's, or bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = [{"bytes": i if isinstance(i, bytes) else png(i), "path": f"{n}.png"} for n, i in enumerate(images)]
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if names:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    table = pa.table({"image": encoded, "label": labels})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def write_folder(root: Path, files: dict[str, Image.Image | bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else png(content))
    return root


def colours(data: LabelledImages) -> list[tuple[int, ...]]:
    """The top left pixel of every image."""
    return [tuple(pixel) for pixel in data.pixels(range(len(data)), 4)[:, :, 0, 0].tolist()]


def test_files_of_a_shared_disk_may_be_given_as_a_uri(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {"a/1.png": flat(RED), "b/1.png": flat(BLUE)})
    file = write_parquet(tmp_path / "one.parquet", [flat(RED), flat(BLUE)], [0, 1])
    for path in folder, file:
        assert colours(load(f"file://{path}")) == colours(load(path)) == [RED, BLUE]
        assert load(f"file://{path}").digest() == load(path).digest()


# ---------------------------------------------------------------------------------------------------------- glyphs


@pytest.fixture(scope="module")
def glyphs() -> LabelledImages:
    return load("glyphs")


@pytest.fixture(scope="module")
def glyph_pixels(glyphs: LabelledImages) -> torch.Tensor:
    """(140, 16, 3, 48, 48)."""
    return glyphs.pixels(range(len(glyphs)), 48).view(140, 16, 3, 48, 48)


@pytest.mark.parametrize(("script", "num_classes"), [("latin", 61), ("greek", 34), ("cyrillic", 45)])
def test_glyphs_of_a_script(script: str, num_classes: int):
    data = load("glyphs", [f"{script}/*"])
    assert len(data.class_names) == len(set(data.class_names)) == num_classes
    assert Counter(data.labels.tolist()) == dict.fromkeys(range(num_classes), 16)
    assert data.name == f"glyphs[{script}/*]"


def test_glyphs_are_the_three_scripts(glyphs: LabelledImages):
    assert Counter(name.partition("/")[0] for name in glyphs.class_names) == {"latin": 61, "greek": 34, "cyrillic": 45}
    assert len(glyphs) == 140 * 16


def test_no_two_classes_of_glyphs_look_the_same(glyph_pixels: torch.Tensor):
    """Neither two Latin ones, nor a Greek or Cyrillic one and one that was trained on."""
    looks = {hashlib.sha256(of_class.numpy().tobytes()).digest() for of_class in glyph_pixels}
    assert len(looks) == 140


def test_every_typeface_draws_every_glyph(glyph_pixels: torch.Tensor):
    """A typeface without a character draws its replacement, the same for all that it lacks."""
    for of_typeface in glyph_pixels.transpose(0, 1):
        drawn = Counter(hashlib.sha256(image.numpy().tobytes()).digest() for image in of_typeface)
        assert max(drawn.values()) <= 2
    assert (glyph_pixels.amin(dim=(2, 3, 4)) == 0).all()


def test_glyphs_are_centred(glyph_pixels: torch.Tensor):
    """To the pixel in height; in width the box that is centred includes a little of the space beside a letter."""
    ink = glyph_pixels[:, :, 0] < 250
    for profile, most_off in ((ink.any(dim=3), 1), (ink.any(dim=2), 6)):
        before, after = profile.int().argmax(dim=-1), profile.flip(-1).int().argmax(dim=-1)
        assert (before - after).abs().max() <= most_off


def test_latin_and_greek_glyphs_are_whole(glyph_pixels: torch.Tensor):
    ink = glyph_pixels[:95, :, 0] < 250
    border = torch.cat([ink[..., [0, -1], :].flatten(2), ink[..., [0, -1]].flatten(2)], dim=-1)
    assert not border.any()


def test_glyphs_are_the_same_every_time(glyphs: LabelledImages, glyph_pixels: torch.Tensor):
    again = load("glyphs")
    assert again.digest() == glyphs.digest()
    assert torch.equal(again.pixels(range(100), 48), glyph_pixels.flatten(0, 1)[:100])


def test_a_glyph_says_where_it_is_from(glyphs: LabelledImages):
    assert glyphs.describe(0) == "latin/a in DejaVuSans"
    assert load("glyphs", ["greek/β"]).describe(15) == "greek/β in STIXGeneralItalic"


# ---------------------------------------------------------------------------------------------------------- digits


def test_digits_are_the_scans():
    data, scans = load("digits"), load_scans()
    assert data.class_names == tuple("0123456789")
    assert data.labels.tolist() == scans.target.tolist()
    expected = torch.from_numpy(np.round(scans.images * 255 / 16)).to(torch.uint8)
    assert torch.equal(data.pixels(range(len(data)), 8), expected[:, None].expand(-1, 3, -1, -1))


# --------------------------------------------------------------------------------------------------------- Parquet


def test_parquet_with_named_integer_labels(tmp_path: Path):
    path = write_parquet(tmp_path / "set" / "val.parquet", [flat(RED), flat(BLUE), flat(RED)], [2, 0, 2], ["a", "b", "c"])
    data = load(path)
    assert data.class_names == ("a", "c")
    assert data.labels.tolist() == [1, 0, 1]
    assert colours(data) == [RED, BLUE, RED]
    assert data.name == "set/val"


def test_parquet_with_integer_labels_without_names(tmp_path: Path):
    data = load(write_parquet(tmp_path / "a.parquet", [flat(RED), flat(BLUE)], [7, 3]))
    assert data.class_names == ("3", "7")
    assert data.labels.tolist() == [1, 0]


def test_parquet_without_metadata(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", [flat(RED)], [1])
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    assert load(path).class_names == ("1",)


def described_as(path: Path, described: str) -> Path:
    image = pa.array([{"bytes": b"x", "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image, "label": [1]}).replace_schema_metadata({"huggingface": described}), path)
    return path


@pytest.mark.parametrize("described", ["{", "null", "[]", '{"info": null}', '{"info": {"features": 5}}'])
def test_parquet_whose_description_is_damaged(tmp_path: Path, described: str):
    with pytest.raises(DataError, match="its metadata `huggingface` is not as that writes it") as caught:
        load(described_as(tmp_path / "toy.parquet", described))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", ["null", '{"names": 5}', '{"feature": null}'])
def test_parquet_whose_description_names_no_classes(tmp_path: Path, label: str):
    path = described_as(tmp_path / "toy.parquet", f'{{"info": {{"features": {{"label": {label}}}}}}}')
    assert load(path).class_names == ("1",)


def test_images_that_are_gone_when_the_digest_is_taken_are_named(tmp_path: Path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        flat((9, 9, 9)).save(tmp_path / name / "1.png")
    data, victim = load(tmp_path), tmp_path / "cat" / "1.png"
    victim.unlink()
    with pytest.raises(DataError, match=f"data {victim}: No such file or directory; mend, replace or remove it"):
        data.digest()


def test_parquet_with_text_labels(tmp_path: Path):
    data = load(write_parquet(tmp_path / "a.parquet", [flat(RED), flat(BLUE), flat(GREEN)], ["dog", "cat", "dog"]))
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [1, 0, 1]
    assert colours(data) == [RED, BLUE, GREEN]


def test_a_folder_of_parquet_files_is_read_in_the_order_of_their_names(tmp_path: Path):
    write_parquet(tmp_path / "set" / "1.parquet", [flat(BLUE)], [1], ["a", "b"])
    write_parquet(tmp_path / "set" / "0.parquet", [flat(RED), flat(GREEN)], [0, 1], ["a", "b"])
    data = load(tmp_path / "set")
    assert data.labels.tolist() == [0, 1, 1]
    assert colours(data) == [RED, GREEN, BLUE]


def test_the_digest_of_parquet_follows_its_content(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", [flat(RED)], [0])
    before = load(path).digest()
    assert load(path).digest() == before
    write_parquet(path, [flat(BLUE)], [0])
    assert load(path).digest() != before


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    "columns",
    [
        {"picture": [{"bytes": b"", "path": ""}], "label": [0]},
        {"image": [{"bytes": b"", "path": ""}]},
        {"image": [{"path": ""}], "label": [0]},
        {"image": [b""], "label": [0]},
        {"image": ["a.png"], "label": [0]},
    ],
    ids=["no image", "no label", "no bytes", "bytes without struct", "text"],
)
def test_parquet_of_other_columns(tmp_path: Path, columns: dict[str, list[Any]]):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet.*expected columns image \(struct of bytes and path\) and label"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("images", "labels", "reason"),
    [
        ([], [], "0 rows"),
        ([{"bytes": None, "path": "a.png"}], [0], "1 of them without image bytes"),
        ([{"bytes": b"", "path": ""}] * 2, [None, 0], "1 of 2 rows have no label"),
        ([{"bytes": b"", "path": ""}], [-1], "labels -1 to -1"),
    ],
    ids=["no rows", "no bytes", "null label", "unlabelled"],
)
def test_parquet_with_missing_values(tmp_path: Path, images: list[Any], labels: list[Any], reason: str):
    table = pa.table({"image": pa.array(images, STRUCT), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=reason):
        load(tmp_path / "a.parquet")


def test_parquet_with_a_label_that_has_no_name(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", [flat(RED), flat(BLUE)], [0, 2], ["a", "b"])
    with pytest.raises(DataError, match="labels 0 to 2, but 2 class names"):
        load(path)


def test_a_file_that_is_not_parquet(tmp_path: Path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"images\.zip: not Parquet"):
        load(tmp_path / "images.zip")


def test_cifar_fs():
    if not CIFAR_FS_VAL.exists():
        pytest.skip(f"{CIFAR_FS_VAL} does not exist; set LR_RAY_DATA to the folder that holds cifar-fs/val.parquet")
    data = load(CIFAR_FS_VAL)
    assert len(data.class_names) == len(set(data.class_names)) == 16
    assert Counter(data.labels.tolist()) == dict.fromkeys(range(16), 300)
    assert not any(name.isdigit() for name in data.class_names)
    assert data.name == "cifar-fs/val"
    decoded = data.pixels([0, 4799], 32)
    assert decoded.shape == (2, 3, 32, 32)
    assert decoded.float().std() > 10


# ---------------------------------------------------------------------------------------------------------- folder


def test_a_folder_of_class_folders(tmp_path: Path):
    files: dict[str, Image.Image | bytes] = {
        "dog/b.png": flat(BLUE),
        "dog/a.PNG": flat(RED),
        "cat/c.png": flat(GREEN),
        "cat/notes.txt": b"not an image",
        "empty/notes.txt": b"no image here",
        "readme.md": b"not a class",
    }
    data = load(write_folder(tmp_path / "pets", files))
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 1, 1]
    assert colours(data) == [GREEN, RED, BLUE]
    assert data.name == f"{tmp_path.name}/pets"
    assert data.describe(2) == str(tmp_path / "pets" / "dog" / "b.png")


def test_a_class_whose_images_lie_deeper_is_named_and_not_left_out(tmp_path: Path):
    folder = write_folder(tmp_path, {"a/x.png": flat(RED), "b/deep/er/y.png": flat(BLUE)})
    with pytest.raises(DataError, match=r"class folder 'b' has no images of its own, only .* b/deep/er/y.png; move them up"):
        load(folder)
    write_folder(tmp_path, {"b/z.png": flat(GREEN)})
    assert load(folder).class_names == ("a", "b")


def test_the_digest_of_a_folder_follows_names_and_content_but_not_the_place(tmp_path: Path):
    original = write_folder(tmp_path / "1", {"a/x.png": flat(RED), "b/y.png": flat(BLUE)})
    moved = write_folder(tmp_path / "2", {"a/x.png": flat(RED), "b/y.png": flat(BLUE)})
    renamed = write_folder(tmp_path / "3", {"a/x.png": flat(RED), "c/y.png": flat(BLUE)})
    changed = write_folder(tmp_path / "4", {"a/x.png": flat(RED), "b/y.png": flat(GREEN)})
    assert load(moved).digest() == load(original).digest()
    assert len({load(folder).digest() for folder in (original, renamed, changed)}) == 3


@pytest.mark.parametrize("files", [{}, {"x.png": flat(RED)}, {"a/x.txt": b""}], ids=["empty", "no classes", "no images"])
def test_a_folder_without_class_folders(tmp_path: Path, files: dict[str, Any]):
    with pytest.raises(DataError, match="no class folders with images in it; expected .*/CLASS/IMAGE.png"):
        load(write_folder(tmp_path, files))


@pytest.mark.parametrize("source", ["/no/such/folder", "mnist"])
def test_data_that_are_not_there(source: str):
    with pytest.raises(DataError, match=rf"'{source}': no such file or folder, nor one of glyphs, digits"):
        load(source)


# ------------------------------------------------------------------------------------------------------- selection


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Classes a1, a2, b1, b2, c, one image of each, its first channel 0 to 4; and a second of b1, whose is 5."""
    names, labels = ["a1", "a2", "b1", "b2", "c"], [0, 1, 2, 3, 4, 2]
    return write_parquet(tmp_path / "a.parquet", [flat((i, 0, 0)) for i in range(6)], labels, names)


@pytest.mark.parametrize(
    ("classes", "names", "reds", "labels"),
    [
        (None, ["a1", "a2", "b1", "b2", "c"], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 2]),
        (["b1"], ["b1"], [2, 5], [0, 0]),
        (["a*"], ["a1", "a2"], [0, 1], [0, 1]),
        (["?1"], ["a1", "b1"], [0, 2, 5], [0, 1, 1]),
        (["[bc]*"], ["b1", "b2", "c"], [2, 3, 4, 5], [0, 1, 2, 0]),
        (["1:3"], ["a2", "b1"], [1, 2, 5], [0, 1, 1]),
        (["3:"], ["b2", "c"], [3, 4], [0, 1]),
        ([":1"], ["a1"], [0], [0]),
        (["c", "0:2", "a1"], ["a1", "a2", "c"], [0, 1, 4], [0, 1, 2]),
        ("c,b2", ["b2", "c"], [3, 4], [0, 1]),
    ],
)
def test_selection(scenes: Path, classes: Any, names: list[str], reds: list[int], labels: list[int]):
    data = load(scenes, classes)
    assert data.class_names == tuple(names)
    assert data.labels.tolist() == labels
    assert [colour[0] for colour in colours(data)] == reds
    assert [data.describe(i) for i in range(len(data))] == [f"row {red} of {scenes}" for red in reds]


def test_a_selection_shows_in_name_and_digest(scenes: Path):
    everything, one, other = load(scenes), load(scenes, ["a1"]), load(scenes, ["a2"])
    assert one.name == f"{everything.name}[a1]"
    assert len({data.digest() for data in (everything, one, other)}) == 3
    assert load(scenes, ["a1", "a2"]).digest() == load(scenes, ["0:2"]).digest() == load(scenes, ["a*"]).digest()


@pytest.mark.parametrize("pattern", ["d", "d*", "5:", "3:2", "A1", "²:"])
def test_a_pattern_that_matches_nothing(scenes: Path, pattern: str):
    with pytest.raises(DataError) as caught:
        load(scenes, ["c", pattern])
    assert f"classes: {pattern!r} matches none of the 5 classes" in str(caught.value)
    assert "a1, a2, b1, b2, c" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- pixels


def test_pixels_are_rgb_bytes_in_the_order_asked_for(scenes: Path):
    pixels = load(scenes).pixels(np.array([4, 0, 4]), 6)
    assert pixels.shape == (3, 3, 6, 6)
    assert pixels.dtype == torch.uint8
    assert pixels[:, 0, 3, 3].tolist() == [4, 0, 4]


@pytest.mark.parametrize("size", [(20, 10), (10, 20)])
def test_images_that_are_not_square_are_cropped_to_their_centre(tmp_path: Path, size: tuple[int, int]):
    """Red, green and blue parts of 5, 10 and 5 pixels along the long side: the green one is the central square."""
    image = flat(GREEN, size)
    far = (15, 0) if size[0] > size[1] else (0, 15)
    part = (5, 10) if size[0] > size[1] else (10, 5)
    image.paste(flat(RED, part), (0, 0))
    image.paste(flat(BLUE, part), far)
    pixels = load(write_folder(tmp_path, {"a/x.png": image})).pixels([0], 10)[0]
    assert torch.equal(pixels, torch.tensor(GREEN, dtype=torch.uint8)[:, None, None].expand(3, 10, 10))


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (7, 100), (3, 2), (1, 1), (1000, 3)])
@pytest.mark.parametrize("side_px", [1, 8, 14])
def test_any_size_becomes_the_square(size: tuple[int, int], side_px: int):
    assert fit_square(flat(RED, size), side_px).size == (side_px, side_px)


def test_resizing_is_antialiased():
    """Columns black, white, black, …: at half the size, grey, not one of the two."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (32, 16)))
    middle = np.array(fit_square(stripes, 16))[:, 2:-2]
    assert ((middle > 100) & (middle < 156)).all()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", (90,), (90, 90, 90)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 50, 100, 51), (204, 214, 224)),
        ("LA", (0, 51), (204, 204, 204)),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("1", (1,), (255, 255, 255)),
    ],
)
def test_modes(tmp_path: Path, mode: str, colour: tuple[int, ...], expected: tuple[int, int, int]):
    image = Image.new(mode, (4, 4), colour if len(colour) > 1 else colour[0])
    assert colours(load(write_folder(tmp_path, {"a/x.png": image}))) == [expected]


@pytest.mark.filterwarnings("error")
def test_a_palette_of_which_some_is_transparent_is_on_white(tmp_path: Path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.info["transparency"] = bytes([0, 255])
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "x.png")
    assert colours(load(tmp_path)) == [(255, 255, 255)]


def test_a_transparent_image_is_turned_too():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    exif = image.getexif()
    exif[0x0112] = 3  # by half a turn
    image.save(content := io.BytesIO(), "PNG", exif=exif)
    turned = upright(Image.open(content))
    assert [turned.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (200, 0, 0)]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("content", [b"", b"no image", png(NOISE)[:1000], png(NOISE)[:40]])
def test_an_image_that_does_not_decode_is_named(tmp_path: Path, content: bytes):
    folder = load(write_folder(tmp_path / "images", {"a/bad.png": content, "a/good.png": NOISE}))
    parquet = load(write_parquet(tmp_path / "a.parquet", [NOISE, content], [0, 1]))
    assert folder.pixels([1], 8).shape == parquet.pixels([0], 8).shape == (1, 3, 8, 8)
    with pytest.raises(DataError, match=r"image .*images/a/bad\.png does not decode \(.*\); replace or remove it"):
        folder.pixels([0, 1], 8)
    with pytest.raises(DataError, match=r"image row 1 of .*a\.parquet does not decode"):
        parquet.pixels([0, 1], 8)


def test_an_image_deleted_meanwhile_is_named(tmp_path: Path):
    data = load(write_folder(tmp_path, {"a/x.png": NOISE}))
    (tmp_path / "a" / "x.png").unlink()
    with pytest.raises(DataError, match=r"a/x\.png does not decode .*No such file"):
        data.pixels([0], 8)


def test_an_image_too_large_to_be_one(tmp_path: Path):
    """A PNG header that promises 10,000 × 5,001 pixels; nothing is decoded."""
    small = bytearray(png(NOISE))
    small[16:24] = (10_000).to_bytes(4, "big") + (5_001).to_bytes(4, "big")
    header = bytes(small[12:29])
    small[29:33] = zlib.crc32(header).to_bytes(4, "big")
    with pytest.raises(DataError, match="has 10000×5001 pixels; at most 50000000"):
        load(write_folder(tmp_path, {"a/bomb.png": bytes(small)})).pixels([0], 8)


def test_a_strip_that_would_grow_beyond_measure(tmp_path: Path):
    """Its short side is enlarged to the image size, and its long side with it."""
    strip = io.BytesIO()
    Image.new("RGB", (60_000, 1)).save(strip, "PNG")
    with pytest.raises(DataError, match="is a strip of 60000×1 pixels, too large once its short side has 224"):
        load(write_folder(tmp_path, {"a/strip.png": strip.getvalue()})).pixels([0], 224)


def test_a_misspelt_source_is_answered_with_what_was_meant(tmp_path: Path):
    with pytest.raises(DataError, match="'.*glyhps': no such file or folder, .*; did you mean glyphs\\? give a Parquet file"):
        load_data(DataConfig(source=str(tmp_path / "glyhps")))
