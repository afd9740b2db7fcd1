import numpy as np
import pytest
from PIL import Image

from dense_jax import viz
from dense_jax.data.classes import ClassTable
from dense_jax.errors import UserError

NAMES = ["sky", "road", "car"]
PALETTE = ClassTable(NAMES, ((10, 20, 30), (200, 0, 0), (0, 200, 0))).palette()


def example(height=6, width=9):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    return image, rng.choice([0, 1, 2, 255], (height, width)).astype(np.int32)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (256, 1)])
def test_label_png_round_trips_every_id(tmp_path, shape):
    labels = np.arange(np.prod(shape)).reshape(shape) % 256
    viz.save_label_png(tmp_path / "a.png", labels, PALETTE)
    np.testing.assert_array_equal(viz.load_label_png(tmp_path / "a.png"), labels)
    with Image.open(tmp_path / "a.png") as picture:  # what a viewer shows
        np.testing.assert_array_equal(picture.convert("RGB"), viz.colourise(labels, PALETTE))


def test_colours_are_rgb_and_by_id():
    coloured = viz.colourise(np.array([[1, 255]]), PALETTE)
    assert coloured.tolist() == [[[200, 0, 0], PALETTE[255].tolist()]]


def test_objects_in_an_enlarged_picture():
    image, colours = np.zeros((20, 30, 3), np.uint8), np.array([[255, 0, 0]], np.uint8)
    boxes, ids = np.array([[10.0, 5, 20, 18]]), np.array([1])
    picture = viz.objects(image, boxes, ids, ["a", "b"], colours, factor=4)
    assert picture.shape == (80, 120, 3)
    red = (picture == [255, 0, 0]).all(axis=2)
    assert red[20:72, [40, 79]].all()  # the outer edges of the box
    assert not red[72:].any()
    assert not red[:, 80:].any()


def test_objects_have_a_mask_a_box_and_a_name_in_their_colour():
    image = np.full((60, 80, 3), 100, np.uint8)
    boxes, ids = np.array([[10, 20.4, 30, 40], [20, 30, 50, 50]]), np.array([1, 2])
    colours = np.array([[200, 0, 0], [0, 100, 0]], np.uint8)
    masks = np.zeros((2, 60, 80), bool)
    masks[0, 25:35, 15:28] = masks[1, 32:45, 22:45] = True
    bare = viz.objects(image, boxes, ids, NAMES, colours)
    for (x0, y0, x1, y1), colour in zip([(10, 20, 30, 40), (20, 30, 50, 50)], colours, strict=True):
        assert (bare[y1 - 1, x0:x1][:3] == colour).all()
        assert (bare[y0:y1, x1 - 1][-3:] == colour).all()
    assert (bare[25:29, 12:19] == 100).all()  # nothing is filled
    tinted = viz.objects(image, boxes, ids, NAMES, colours, masks=masks, alpha=0.5)
    assert (tinted[31, 24] == [150, 50, 50]).all()
    assert (tinted[34, 25] == [125, 50, 25]).all()  # the first object on top of the second
    assert (tinted[44, 40] == [50, 100, 50]).all()
    written = viz.objects(image, boxes, ids, NAMES, colours, scores=np.array([0.5, 0.25]))
    assert (written != bare).any()
    for level, ink in ((60, [255, 255, 255]), (220, [31, 41, 55])):
        painted = viz.objects(image, boxes, ids, NAMES, np.full((2, 3), level, np.uint8))
        assert (painted == ink).all(axis=-1).any()
    nothing = viz.objects(image, boxes[:0], ids[:0], NAMES, colours[:0], masks=masks[:0])
    np.testing.assert_array_equal(nothing, image)


@pytest.mark.parametrize("wrong", [-1, 256])
def test_ids_that_would_wrap_around_raise(tmp_path, wrong):
    labels = np.array([[0, wrong]])
    with pytest.raises(ValueError, match=str(wrong)):
        viz.colourise(labels, PALETTE)
    with pytest.raises(ValueError, match=str(wrong)):
        viz.save_label_png(tmp_path / "a.png", labels, PALETTE)


def test_colour_picture_is_not_read_as_ids(tmp_path):
    image, _ = example()
    Image.fromarray(image).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png.*RGB"):
        viz.load_label_png(tmp_path / "a.png")


def test_overlay_tints_labelled_pixels_only():
    image, labels = example()
    picture = viz.overlay(image, labels, PALETTE, alpha=0.5)
    void = labels == 255
    np.testing.assert_array_equal(picture[void], image[void])
    expected = (image.astype(int) + viz.colourise(labels, PALETTE)) / 2
    np.testing.assert_allclose(picture[~void], expected[~void], atol=0.5)
    np.testing.assert_array_equal(viz.overlay(image, labels, PALETTE, alpha=0.0), image)
    with pytest.raises(ValueError, match="does not match"):
        viz.overlay(image, labels[1:], PALETTE)


def test_errors_are_red_and_void_is_white():
    image, labels = example()
    predictions = np.zeros_like(labels)
    picture = viz.errors(image, labels, predictions)
    wrong, void = (labels != 0) & (labels != 255), labels == 255
    assert (picture[void] == 255).all()
    assert (picture[wrong] == (220, 38, 38)).all()
    right = picture[labels == 0]
    assert (right.min(-1) == right.max(-1)).all()
    assert right.min() >= 127


def test_contact_sheet_places_pictures_of_any_size():
    small, large = np.zeros((2, 4, 3), np.uint8), np.full((6, 8, 3), 7, np.uint8)
    sheet = viz.contact_sheet([small, large, large], columns=2, gap=1)
    assert sheet.shape == (13, 17, 3)
    np.testing.assert_array_equal(sheet[2:4, 2:6], small)
    np.testing.assert_array_equal(sheet[7:, :8], large)
    assert (sheet[7:, 9:] == 255).all()
    with pytest.raises(ValueError, match="at least one"):
        viz.contact_sheet([], columns=2)


def test_comparison_shows_four_pictures():
    image, labels = example(6, 9)
    picture = viz.comparison(image, labels, labels % 255, PALETTE)
    assert picture.shape == (6, 4 * 9 + 3 * 4, 3)
    np.testing.assert_array_equal(picture[:, :9], image)
    np.testing.assert_array_equal(picture[:, 13:22], viz.colourise(labels, PALETTE))


def test_legend_and_confusion_picture_show_their_colours():
    legend = viz.legend(NAMES, PALETTE)
    for i in range(3):
        assert (legend == PALETTE[i]).all(-1).any()
    diagonal = viz.confusion_picture(np.eye(3, dtype=int), NAMES)
    assert diagonal.dtype == np.uint8
    assert (diagonal == (29, 78, 137)).all(-1).any()
    assert not (diagonal == (220, 38, 38)).all(-1).any()
    wrong = viz.confusion_picture(np.roll(np.eye(3, dtype=int), 1, 1), NAMES)
    assert (wrong == (220, 38, 38)).all(-1).any()
    viz.confusion_picture(np.zeros((60, 60), int), ["x"] * 60, cell=8)  # nothing scored, many
    with pytest.raises(ValueError, match="2 names"):
        viz.confusion_picture(np.eye(3, dtype=int), NAMES[:2])


OTHER = ["\u9053\u8def", "\u80cc\u666f", "\uc790\ub3d9\ucc28"]  # road, ground, car


@pytest.fixture
def no_system_fonts(monkeypatch):
    monkeypatch.setattr(viz, "_FONT_FOLDERS", ())
    monkeypatch.setattr(viz, "_told", set())
    viz._font_file.cache_clear()
    yield
    viz._font_file.cache_clear()


@pytest.mark.usefixtures("no_system_fonts")
def test_names_that_no_font_has_are_numbers(capsys):
    ids = [str(i) for i in range(3)]
    for draw in (
        lambda names: viz.legend(names, PALETTE),
        lambda names: viz.confusion_picture(np.eye(3, dtype=int), names),
    ):
        np.testing.assert_array_equal(draw(OTHER), draw(ids))
        assert not np.array_equal(draw(["road", *OTHER[1:]]), draw(ids))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"no font here has the letters of {OTHER[0]!r}: pictures show the numb")


@pytest.mark.usefixtures("no_system_fonts")
@pytest.mark.parametrize("name", [*OTHER, "caf\u00e9", "a \u9053", "\u0645", "\u0436", "a\u3000b"])
def test_a_name_is_drawn_whole_or_as_a_number(name):
    assert viz.lettering(name, 7, 14)[0] == "7"
    assert viz.lettering("traffic-sign (2) & co.", 7, 14)[0] == "traffic-sign (2) & co."


@pytest.mark.usefixtures("no_system_fonts")
def test_a_font_of_the_system_writes_what_the_usual_one_cannot(tmp_path, monkeypatch):
    fonts = {"b.ttf": OTHER[0], "a-Bold.ttf": OTHER[0], "c.otf": OTHER[1]}
    for name in ("0.ttf", *fonts, "readme.txt"):
        (tmp_path / name).write_bytes(b"no font")
    monkeypatch.setattr(viz, "_FONT_FOLDERS", (str(tmp_path / "absent"), str(tmp_path)))
    usual = viz.ImageFont.load_default(14)

    def truetype(path, size):
        if path.name not in fonts:
            raise OSError
        return path.name

    monkeypatch.setattr(viz.ImageFont, "truetype", truetype)
    monkeypatch.setattr(viz.ImageFont, "load_default", lambda size: usual)
    monkeypatch.setattr(viz, "_can_write", lambda font, text: fonts.get(font, "road") == text)
    assert viz.lettering("road", 0, 14) == ("road", usual)
    assert viz.lettering(OTHER[0], 0, 14) == (OTHER[0], "b.ttf")
    assert viz.lettering(OTHER[1], 1, 14) == (OTHER[1], "c.otf")
    assert viz.lettering(OTHER[2], 2, 14) == ("2", usual)


def test_heat_rises_from_black_to_pale_yellow():
    colours = viz.heat(np.array([[-1.0, 0.0, 0.25, 0.5, 1.0, 9.0]]), high=1.0)
    assert colours.dtype == np.uint8
    assert colours[0, 0].tolist() == colours[0, 1].tolist() == [0, 0, 4]
    assert colours[0, 4].tolist() == colours[0, 5].tolist() == [252, 255, 164]
    assert np.all(np.diff(colours.astype(int).sum(-1)[0, 1:5]) > 0)
    assert not viz.heat(np.zeros((2, 2)), high=0.0)[..., :2].any()


def test_heat_scale_is_a_bar_with_numbers():
    scale = viz.heat_scale(0.12, height=60)
    assert scale.shape[0] == 60
    np.testing.assert_array_equal(scale[-1, 0], [0, 0, 4])
    np.testing.assert_array_equal(scale[0, 0], [252, 255, 164])
    assert (scale[:, 16:] < 200).any(), "no numbers"
