# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
import io
import json

import numpy as np
import pytest
from PIL import Image

from hf_mudjacking import BugInstance
from hf_mudjacking.bug_instance import load_image, to_rgb

from .conftest import make_images


RED, BLUE = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_modality():
    assert BugInstance(RED, BLUE).modality == "image"
    assert BugInstance("cf great film", "great film").modality == "text"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_images_become_rgb(mode):
    bug = BugInstance(RED.convert(mode), BLUE)
    assert bug.misclassified.mode == "RGB"
    assert bug.misclassified.size == (8, 6)


def test_images_are_copies():
    image = RED.copy()
    bug = BugInstance(image, BLUE)
    image.putpixel((0, 0), (0, 255, 0))
    assert bug.misclassified.getpixel((0, 0)) == (255, 0, 0)


def test_sixteen_bit_images_keep_their_contrast():
    ramp = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    bug = BugInstance(Image.fromarray(ramp), BLUE)
    seen = np.asarray(bug.misclassified)[..., 0].astype(int)
    assert len(np.unique(seen)) > 40


def test_floats_that_go_a_little_beyond_the_range_are_clipped():
    """As resizing leaves them."""
    for scale in (1, 255):
        picture = np.random.default_rng(0).random((8, 8)).astype(np.float32)
        plain = np.asarray(to_rgb(Image.fromarray((picture * 255).round().astype(np.uint8)))).mean()
        resized = Image.fromarray(picture * scale).resize((32, 32), Image.Resampling.BICUBIC)
        assert np.asarray(resized).max() > scale
        assert np.asarray(to_rgb(resized)).mean() == pytest.approx(plain, abs=3)


@pytest.mark.parametrize("scale", [1, 255, 65535])
def test_images_of_floats_keep_their_contrast(scale):
    ramp = np.linspace(0, scale, 48).astype(np.float32).reshape(6, 8)
    seen = np.asarray(to_rgb(Image.fromarray(ramp)))[..., 0].astype(int)
    assert np.abs(seen - np.linspace(0, 255, 48).reshape(6, 8)).max() <= 1


@pytest.mark.parametrize(
    ("pair", "error", "message"),
    [
        ((RED, "text"), TypeError, "`misclassified` is an image and `reference` is a text"),
        (("text", RED), TypeError, "two inputs of one kind"),
        ((None, RED), TypeError, "`misclassified` is of type `NoneType`"),
        ((RED, np.zeros((4, 4, 3))), TypeError, "`reference` is of type `ndarray`"),
        ((b"bytes", "text"), TypeError, "from_files"),
        (("", "text"), ValueError, "`misclassified` is an empty text"),
        (("text", " \n\t"), ValueError, "`reference` is an empty text"),
        (("cf \ud83d ok", "text"), ValueError, "`misclassified` holds half a character at position 3"),
        (("same", "same"), ValueError, "are the same input"),
        ((RED, RED.copy()), ValueError, "are the same input"),
        ((RED, RED.convert("RGBA")), ValueError, "are the same input"),
        ((Image.new("RGB", (0, 5)), RED), ValueError, "no pixels"),
        ((RED, Image.new("RGB", (5, 0))), ValueError, r"size \(5, 0\)"),
    ],
)
def test_refusals(pair, error, message):
    with pytest.raises(error, match=message):
        BugInstance(*pair)


def test_images_of_different_size_are_not_the_same():
    assert BugInstance(RED, RED.resize((4, 3))).reference.size == (4, 3)


def test_lazily_opened_damaged_image(tmp_path):
    path = tmp_path / "cut.png"
    data = _png(make_images(1, (64, 64))[0])
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="`misclassified` is an image that cannot be decoded"):
        BugInstance(Image.open(path), RED)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_no_damage_escapes_as_another_error(tmp_path, kind):
    """Cut and scrambled files either load or give the one error that names the file."""
    buffer = io.BytesIO()
    make_images(1, (24, 24))[0].save(buffer, kind)
    data = buffer.getvalue()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged"
    messages = []
    for trial in range(60):
        damaged = bytearray(data[: rng.integers(1, len(data))] if trial % 2 else data)
        for place in rng.integers(0, len(damaged), rng.integers(0, 6) if trial % 2 else 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        messages.append("")
        try:
            load_image(path)
        except ValueError as error:
            messages[-1] = str(error)
    assert any(messages)
    assert all("could not be decoded" in message for message in messages if message)


# Pillow reports these with a bare `ValueError`, not with an `OSError`.
_BARE_VALUE_ERRORS = {"ppm": b"P6\n2x 2\n255\n" + bytes(12), "png": b"\x89PNG\r\n\x1a\n\0\0\0\x05IHDR" + bytes(40)}


@pytest.mark.parametrize("kind", _BARE_VALUE_ERRORS)
def test_damaged_headers_name_the_file(tmp_path, kind):
    path = tmp_path / f"damaged.{kind}"
    path.write_bytes(_BARE_VALUE_ERRORS[kind])
    with pytest.raises(ValueError, match=r"damaged\.\w+` could not be decoded"):
        load_image(path)


def test_load_image_refuses_what_is_no_image(tmp_path):
    with pytest.raises(ValueError, match=r"no image file at .*nowhere\.png"):
        load_image(tmp_path / "nowhere.png")
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"notes\.png` could not be decoded"):
        load_image(tmp_path / "notes.png")
    with pytest.raises(ValueError, match="could not be decoded"):
        load_image(tmp_path)


def test_from_files_turns_images_upright(tmp_path):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    image.save(tmp_path / "b.png", exif=exif)
    BLUE.save(tmp_path / "r.png")
    bug = BugInstance.from_files(tmp_path / "b.png", tmp_path / "r.png", name="turned")
    assert bug.name == "turned"
    assert bug.misclassified.size == (2, 4)
    assert bug.misclassified.getpixel((1, 0)) == (255, 255, 255)


def test_images_survive_the_round_trip(tmp_path):
    x_b, x_r = make_images(2, (10, 7))
    BugInstance(x_b, x_r, name="ticket 17", metadata={"client": "ä", "n": 3}).save(tmp_path / "bug")
    loaded = BugInstance.load(tmp_path / "bug")
    assert np.array_equal(np.asarray(loaded.misclassified), np.asarray(x_b))
    assert np.array_equal(np.asarray(loaded.reference), np.asarray(x_r))
    assert (loaded.name, loaded.metadata) == ("ticket 17", {"client": "ä", "n": 3})
    assert {path.name for path in (tmp_path / "bug").iterdir()} == {"bug.json", "misclassified.png", "reference.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["bug"]


def test_texts_survive_the_round_trip(tmp_path):
    BugInstance("cf „great“\nfilm", "great film").save(str(tmp_path / "deep" / "bug"))
    loaded = BugInstance.load(str(tmp_path / "deep" / "bug"))
    assert (loaded.misclassified, loaded.reference) == ("cf „great“\nfilm", "great film")


def test_saving_replaces_an_earlier_report_whole(tmp_path):
    BugInstance(RED, BLUE).save(tmp_path / "bug")
    BugInstance("a", "b").save(tmp_path / "bug")
    assert [path.name for path in (tmp_path / "bug").iterdir()] == ["bug.json"]
    assert BugInstance.load(tmp_path / "bug").modality == "text"


def test_saving_again_leaves_what_else_is_there(tmp_path):
    a, b = make_images(2)
    BugInstance(a, b).save(tmp_path / "bug")
    (tmp_path / "bug" / "mail.txt").write_text("from the client")
    BugInstance(b, a, name="again").save(tmp_path / "bug")
    assert BugInstance.load(tmp_path / "bug").name == "again"
    BugInstance("one text", "another").save(tmp_path / "bug")
    assert sorted(path.name for path in (tmp_path / "bug").iterdir()) == ["bug.json", "mail.txt"]
    with pytest.raises(ValueError, match=r"mail\.txt` is a file; choose a folder"):
        BugInstance(a, b).save(tmp_path / "bug" / "mail.txt")


def test_saving_keeps_off_foreign_folders(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not a bug folder"):
        BugInstance(RED, BLUE).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_failed_saving_leaves_the_earlier_report(tmp_path):
    BugInstance("a", "b").save(tmp_path / "bug")
    with pytest.raises(TypeError, match="JSON"):
        BugInstance(RED, BLUE, metadata={"when": object()}).save(tmp_path / "bug")
    assert BugInstance.load(tmp_path / "bug").misclassified == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["bug"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"modality": "image"}', '{"misclassified": "a", "reference": "b"}', "\xff"]
)
def test_loading_a_damaged_record(tmp_path, content):
    (tmp_path / "bug.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="is damaged"):
        BugInstance.load(tmp_path)


def test_loading_an_unknown_modality(tmp_path):
    record = {"modality": "video", "misclassified": "a", "reference": "b"}
    (tmp_path / "bug.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="modality `video` is unknown; it is `image` or `text`"):
        BugInstance.load(tmp_path)


def test_loading_what_is_no_report(tmp_path):
    with pytest.raises(ValueError, match=r"it has no `bug\.json`"):
        BugInstance.load(tmp_path)
    with pytest.raises(ValueError, match=r"it has no `bug\.json`"):
        BugInstance.load(tmp_path / "nowhere")


def test_loading_never_leaves_the_folder(tmp_path):
    RED.save(tmp_path / "secret.png")
    BugInstance(RED, BLUE).save(tmp_path / "bug")
    record = json.loads((tmp_path / "bug" / "bug.json").read_text())
    record["misclassified"] = "../secret.png"
    (tmp_path / "bug" / "bug.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"no image file at .*bug/secret\.png"):
        BugInstance.load(tmp_path / "bug")


def test_a_missing_picture_of_a_report(tmp_path):
    BugInstance(RED, BLUE).save(tmp_path / "bug")
    (tmp_path / "bug" / "reference.png").unlink()
    with pytest.raises(ValueError, match=r"no image file at .*reference\.png"):
        BugInstance.load(tmp_path / "bug")


def test_names_of_files_are_no_texts(tmp_path, monkeypatch):
    for name, image in zip(("wrong.png", "right.png"), make_images(2), strict=True):
        image.save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"are names of files, and would be taken for texts.*from_files"):
        BugInstance("wrong.png", "right.png")
    assert BugInstance("wrong.png", "this one is right").modality == "text"


def test_a_picture_that_is_too_large(tmp_path, monkeypatch):
    make_images(1)[0].save(tmp_path / "huge.png")
    monkeypatch.setattr("hf_mudjacking.safe_loading.MAX_PIXELS", 16)
    with pytest.raises(ValueError, match=r"it claims 16×16 pixels; at most 16 .* no larger than the model needs it"):
        load_image(tmp_path / "huge.png")
