"""CLIP without training: pictures prepared as transformers' CLIPImageProcessor does, probabilities of labels equal to CLIPModel's."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_checkpoints import assert_equal
from tiny_encoders import clip_tokenizer, written
from transformers import CLIPTokenizer
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import pellucid
from pellucid.errors import BadInput
from pellucid.models import zero_shot
from pellucid.models.images import Preprocess, clip_preprocess, read_preprocess
from pellucid.tokenizers import Tokenizer


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pictures():
    palette = Image.fromarray(noise(21, 30, 3, seed=7)).quantize(16)
    seen_through = palette.copy()
    seen_through.info["transparency"] = 3
    return {
        "wide": Image.fromarray(noise(30, 47, 3)), "tall": Image.fromarray(noise(61, 33, 3)), "small": Image.fromarray(noise(7, 9, 3)),
        "square": Image.fromarray(noise(20, 20, 3)), "grey": Image.fromarray(noise(25, 31)), "alpha": Image.fromarray(noise(25, 31, 4)),
        "grey-alpha": Image.fromarray(noise(25, 31, 2)), "palette": palette, "seen-through": seen_through, "bits": Image.fromarray(noise(25, 31)).convert("1"),
        "cmyk": Image.fromarray(noise(25, 31, 3)).convert("CMYK"), "array": noise(40, 28, 3), "first": noise(3, 40, 28), "both": noise(3, 28, 4),
        "array-alpha": noise(40, 28, 4), "array-grey": noise(40, 28, 1), "tensor": torch.from_numpy(noise(3, 33, 40)),
    }


@pytest.mark.parametrize("name", pictures())
@pytest.mark.parametrize(("size", "crop"), [(20, 18), (17, 24)], ids=["cut", "framed"])
def test_pixels_equal_those_of_the_reference(name, size, crop):
    theirs = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": crop, "width": crop})
    want = theirs(pictures()[name], return_tensors="pt")["pixel_values"]
    got = Preprocess(size, (crop, crop))([pictures()[name]])
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_a_file_is_turned_as_the_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(24, 40, 3)).save(tmp_path / "a.png", exif=exif)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 18, "width": 18})
    want = theirs(load_image(str(tmp_path / "a.png")), return_tensors="pt")["pixel_values"]
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(Preprocess(20, (18, 18))([path]), want)
    assert not torch.equal(Preprocess(20, (18, 18))([noise(24, 40, 3)]), want)


@pytest.mark.parametrize("options", [
    {}, {"size": {"height": 15, "width": 22}, "do_center_crop": False}, {"do_normalize": False}, {"do_resize": False, "crop_size": 16},
    {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2}, {"do_rescale": False}, {"rescale_factor": 1 / 128}])
def test_what_the_folder_says_about_pictures(options, tmp_path):
    theirs = CLIPImageProcessorPil(**{"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}, **options})
    theirs.save_pretrained(tmp_path)
    picture = Image.fromarray(noise(30, 47, 3))
    got = read_preprocess(tmp_path, 99)([picture])
    assert_equal(got, theirs(picture, return_tensors="pt")["pixel_values"].float())
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "inner.json")
    (tmp_path / "processor_config.json").write_text('{"image_processor": ' + (tmp_path / "inner.json").read_text() + "}")
    assert torch.equal(read_preprocess(tmp_path, 99)([picture]), got)


def test_older_spelling_and_silence(tmp_path):
    assert read_preprocess(tmp_path, 30) == clip_preprocess(30)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 24, "crop_size": 20, "do_resize": true, "resample": 3}')
    assert read_preprocess(tmp_path, 30) == Preprocess(24, (20, 20))


@pytest.mark.parametrize("text", ['{"size": "big"}', '{"crop_size": {"height": 5}}', '{"image_mean": [1, 2]}', '{"resample": 9}', "[1]", "{",
                                  '{"size": {"shortest_edge": 20, "longest_edge": 30}}', '{"size": 0}'])
def test_what_is_said_wrongly(text, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(BadInput):
        read_preprocess(tmp_path, 30)


@pytest.mark.parametrize("picture", [np.zeros((4, 4, 3)), np.zeros((5, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8), torch.rand(3, 5, 5), 7,
                                     np.zeros((1, 2, 3, 4), np.uint8)])
def test_what_is_no_picture(picture):
    with pytest.raises(BadInput, match="picture"):
        clip_preprocess(16)([picture])


def test_files_that_are_no_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    Image.fromarray(noise(30, 30, 3)).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:700])
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(BadInput, match=name):
            clip_preprocess(16)([tmp_path / name])


def test_without_pillow(monkeypatch):
    for name in [*filter(lambda name: name.split(".")[0] == "PIL", sys.modules)]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match="Pillow") as caught:
        clip_preprocess(16)([noise(5, 5, 3)])
    assert "pellucid[vision]" in caught.value.next


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    theirs = written("clip", folder)
    with torch.no_grad():
        theirs.logit_scale.fill_(4.0)
    theirs.save_pretrained(folder)
    clip_tokenizer(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    return folder, theirs, processor


def reference(clip, images, labels, template="a photo of a {}."):
    folder, theirs, processor = clip
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    rows = tokenizer([template.format(label) for label in labels], padding=True, return_tensors="pt")
    with torch.no_grad():
        return theirs(**rows, pixel_values=processor(images, return_tensors="pt")["pixel_values"]).logits_per_image.softmax(-1)


def test_probabilities_equal_clipmodels(clip):
    folder, labels = clip[0], ["cat", "dog", "the other thing"]
    images = [Image.fromarray(noise(30, 47, 3, seed=i)) for i in range(5)]
    want = reference(clip, images, labels)
    assert want.std() > 0.1
    assert_equal(zero_shot(folder, images, labels, batch_size=2), want)
    one = zero_shot(folder, images[3], labels)
    assert one.shape == (3,) and abs(float(one.sum()) - 1) < 1e-6
    assert_equal(one, want[3])
    model, tokenizer = pellucid.load(folder), Tokenizer.load(folder)
    assert_equal(zero_shot(model, images, labels, template="the {}", tokenizer=tokenizer, preprocess=Preprocess(18, (16, 16))),
                 reference(clip, images, labels, "the {}"))


def test_several_templates_are_averaged(clip):
    """Section 3.1.4 of the paper: the mean of the normalised vectors of a label's sentences."""
    folder, theirs, processor = clip
    labels, templates, tokenizer = ["cat", "dog"], ["a {}", "the {} ."], CLIPTokenizer.from_pretrained(clip[0])
    picture = Image.fromarray(noise(30, 47, 3))
    with torch.no_grad():
        text = [F.normalize(theirs.get_text_features(**tokenizer([t.format(x) for x in labels], padding=True, return_tensors="pt")).pooler_output, dim=-1)
                for t in templates]
        image = F.normalize(theirs.get_image_features(processor(picture, return_tensors="pt")["pixel_values"]).pooler_output, dim=-1)
        want = (theirs.logit_scale.exp() * image @ F.normalize(sum(text), dim=-1).T).softmax(-1)
    assert_equal(zero_shot(folder, [picture], labels, template=templates), want)


def test_what_cannot_be_asked(clip, tmp_path):
    folder = clip[0]
    written("bert", tmp_path)
    picture = noise(20, 20, 3)
    for call in (lambda: zero_shot(folder, picture, []), lambda: zero_shot(folder, picture, ["cat"], template="a photo"), lambda: zero_shot(folder, picture, "cat"),
                 lambda: zero_shot(pellucid.load(folder), picture, ["cat"]), lambda: zero_shot(tmp_path, picture, ["cat"], tokenizer=Tokenizer.load(folder))):
        with pytest.raises(BadInput):
            call()
    assert zero_shot(folder, [], ["cat", "dog"]).shape == (0, 2)
