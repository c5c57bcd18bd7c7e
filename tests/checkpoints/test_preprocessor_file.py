"""Image settings of a checkpoint's files: pixels equal to transformers' own processor's, or one sentence."""

import dataclasses
import functools
import json
import random
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.model_config import read_config
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.config import CLIP_MEAN, CLIP_STD, KNOWN_TOWERS, ImageSettings, VisionConfig
from llavamed_jax.config.hf import llava_from_hf
from llavamed_jax.errors import UserError
from llavamed_jax.images.load import load_image
from llavamed_jax.models.towers.pixels import normalize
from llavamed_jax.processor import Processor
from llavamed_jax.utils.files import write_json
from tests.support import tiny

HF = {"model_type": "llava", "text_config": tiny.MISTRAL, "vision_config": tiny.CLIP, "vision_feature_layer": -2,
      "image_token_index": 69}
PLAIN = dict(image_processor_type="CLIPImageProcessor", do_convert_rgb=True, do_resize=True, size={"shortest_edge": 28},
             resample=3,
             do_center_crop=True, crop_size={"height": 28, "width": 28}, do_rescale=True, rescale_factor=1 / 255,
             do_normalize=True,
             image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD))
SIZES = [(90, 60), (60, 90), (28, 28), (29, 27), (5, 40), (113, 31), (300, 211), (1, 1), (20, 20)]
ABSENT = object()


@functools.cache
def picture(width, height, seed=0):
    small = np.random.default_rng([width, height, seed]).integers(0, 256, (height // 7 + 1, width // 7 + 1, 3),
                                                                  np.uint8)
    return Image.fromarray(small).resize((width, height))


def checkpoint(directory, settings=None, processor=None, config=HF):
    """A directory with a config and files of image settings; no weights."""
    tiny.save(directory, config)
    for name, content in (("preprocessor_config.json", settings), ("processor_config.json", processor)):
        (directory / name).unlink(missing_ok=True)
        if content is not None:
            (directory / name).write_text(json.dumps(content))
    return directory


def their_processor(directory):
    """Transformers' own: a picture -> float32 [H,W,3]."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    return lambda image: np.asarray(processor(image, return_tensors="np")["pixel_values"][0], np.float32).transpose(1, 2, 0)


def theirs(directory, image):
    return their_processor(directory)(image)


def check_equal(directory, sizes=SIZES):
    """Every way in which pixels come about: on the host, and as uint8 that the model normalises. Returns the pixels."""
    config, processor, their, out = read_config(directory), Processor.load(directory), their_processor(directory), {}
    on_device = normalize(jax.numpy.asarray(processor.images_uint8([picture(*size) for size in sizes])), config.vision)
    for (width, height), of_the_model in zip(sizes, np.asarray(on_device), strict=True):
        image = picture(width, height)
        wanted = their(image)
        found = processor.images([image])[0]
        assert found.shape == wanted.shape == (28, 28, 3), (found.shape, wanted.shape)
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_allclose(of_the_model, wanted, rtol=0, atol=1e-6 * max(1, np.abs(wanted).max()))
        out[width, height] = wanted
    return out


CHANGES = [
    {}, dict(do_convert_rgb=False), dict(image_mean=[0.5, 0.4, 0.3]), dict(image_std=[0.1, 0.2, 0.3]),
    dict(do_normalize=False),
    dict(do_rescale=False), dict(do_rescale=False, do_normalize=False), dict(rescale_factor=1 / 127.5),
    dict(rescale_factor=1),
    dict(do_resize=False), dict(do_resize=False, size={"longest_edge": 5}),
    dict(do_center_crop=False, size={"height": 28, "width": 28}),
    dict(size={"height": 28, "width": 28}), dict(size={"height": 40, "width": 30}),
    dict(size={"height": 10, "width": 100}),
    dict(size=[40, 30]), dict(size=32), dict(size=32, default_to_square=True), dict(size=28, crop_size=28),
    dict(crop_size=[28, 28]),
    dict(size={"shortest_edge": 20}), dict(size={"shortest_edge": 1}), dict(size={"shortest_edge": 100}),
    *(dict(resample=number) for number in range(6)), dict(size=ABSENT), dict(resample=ABSENT), dict(image_mean=ABSENT),
    dict(image_std=ABSENT),
    dict(do_resize=None, resample=None), dict(do_rescale=None, rescale_factor=None), dict(do_normalize=None),
    dict(do_pad=True), dict(do_pad=False),
    dict(do_pad=None), dict(do_convert_rgb=None), dict(do_center_crop=None, crop_size=None, size=[28, 28]),
    dict(do_pad=True, pad_size={"height": 28, "width": 28}),
    dict(crop_size=ABSENT, do_center_crop=False, size=[28, 28]),
    dict(do_normalize=ABSENT, do_rescale=ABSENT, rescale_factor=ABSENT, do_resize=ABSENT, do_center_crop=ABSENT,
         do_convert_rgb=ABSENT)]
KINDS = {"clip": dict(image_processor_type="CLIPImageProcessor"), "llava": dict(image_processor_type="LlavaImageProcessor"),
         "llava pads": dict(image_processor_type="LlavaImageProcessor", do_pad=True)}
# Every change of CLIP's class and of LLaVA's with padding; a few of LLaVA's without, which resizes and crops as CLIP's does.
CASES = [(kind, change) for kind in KINDS for change in (CHANGES if kind != "llava" else CHANGES[::5])]


@pytest.mark.parametrize("kind, change", CASES, ids=lambda part: part if isinstance(part, str) else json.dumps(part, default=lambda _: "absent"))
def test_each_setting_is_obeyed(kind, change, tmp_path):
    settings = {key: value for key, value in {**PLAIN, **KINDS[kind], **change}.items() if value is not ABSENT}
    check_equal(checkpoint(tmp_path, settings))
    is_padded = kind != "clip" and bool(settings.get("do_pad"))
    assert Processor.load(tmp_path).image_mode == ("pad" if is_padded else "square")


@pytest.mark.parametrize("kind", KINDS)
def test_settings_inside_of_the_processors_file_are_obeyed(kind, tmp_path):
    """As transformers 5 writes them; every file says what its own file would."""
    for change in CHANGES:
        settings = {key: value for key, value in {**PLAIN, **KINDS[kind], **change}.items() if value is not ABSENT}
        inside = checkpoint(tmp_path / "inside", processor={"processor_class": "LlavaProcessor", "image_processor": settings})
        assert read_config(inside) == read_config(checkpoint(tmp_path / "own", settings))
    check_equal(inside)
    assert Processor.load(inside).image_mode == ("pad" if kind == "llava pads" else "square")


@pytest.mark.parametrize("kind", [
    "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "LlavaImageProcessor",
    "LlavaImageProcessorFast",
    "LlavaImageProcessorPil", None])
@pytest.mark.parametrize("does", [False, True])
def test_classes(kind, does, tmp_path):
    settings = {**PLAIN, "image_processor_type": kind, "do_pad": does}
    check_equal(checkpoint(tmp_path, {key: value for key, value in settings.items() if value is not None}))


# What Google's SigLIP (bicubic) and SigLIP 2 (bilinear) state, at this size.
SIGLIP = dict(image_processor_type="SiglipImageProcessor", do_resize=True, size={"height": 28, "width": 28}, resample=2,
              do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3,
              do_convert_rgb=None, processor_class="SiglipProcessor")


@pytest.mark.parametrize("change", [
    {}, dict(resample=3), dict(resample=ABSENT), dict(image_mean=ABSENT, image_std=ABSENT),
    dict(do_center_crop=True, crop_size=[28, 28], size={"shortest_edge": 30}), dict(do_center_crop=False),
    dict(crop_size=[14, 14]), dict(do_center_crop=True, crop_size={"height": 28, "width": 28}), dict(size=28, default_to_square=True),
    dict(do_pad=True, pad_size={"height": 28, "width": 28}), dict(do_normalize=False), dict(rescale_factor=1 / 127.5),
    dict(image_processor_type="SiglipImageProcessorFast"), dict(image_processor_type="SiglipImageProcessorPil"),
    dict(image_processor_type=ABSENT, feature_extractor_type="SiglipFeatureExtractor")], ids=lambda change: ",".join(change))
def test_siglips_class(change, tmp_path):
    """In a checkpoint, and in the tower's own directory, where a file that names no class is SigLIP's too."""
    settings = {key: value for key, value in {**SIGLIP, **change}.items() if value is not ABSENT}
    named = {**settings, "image_processor_type": "SiglipImageProcessor"}
    vision = {**tiny.CLIP, "model_type": "siglip_vision_model"}
    config = {**HF, "vision_config": vision, "vision_feature_select_strategy": "full"}
    if "feature_extractor_type" not in settings:
        check_equal(checkpoint(tmp_path / "whole", settings, config=config))
    wanted = check_equal(checkpoint(tmp_path / "named", named, config=config))
    tower = checkpoint(tmp_path / "tower", {k: v for k, v in settings.items() if k != "image_processor_type"},
                       config={"model_type": "siglip", "vision_config": {k: v for k, v in vision.items() if k != "model_type"}})
    same_pixels(checkpoint(tmp_path / "v1", config=tiny.V1), wanted, tower)


def test_towers_without_files_have_the_settings_of_their_kind(tmp_path):
    """A tower that is known by name, or whose directory has no preprocessor; CLIP's settings do not pass to a SigLIP."""
    tower = checkpoint(tmp_path / "tower", config={**tiny.CLIP, "model_type": "siglip_vision_model"})
    clip = checkpoint(tmp_path / "model", config=tiny.V1)
    tiny.save_clip(tmp_path / "tiny-tower")
    wanted = {size: theirs(checkpoint(tmp_path / "theirs", {**SIGLIP, "resample": 3}), picture(*size)) for size in SIZES}
    same_pixels(clip, wanted, tower)
    (tmp_path / "tree" / "model").mkdir(parents=True)
    write_json(tmp_path / "tree" / "model" / "config.json", read_config(clip).to_dict())
    same_pixels(tmp_path / "tree", wanted, tower)
    for name, resample in (("google/siglip-so400m-patch14-384", "bicubic"), ("google/siglip2-so400m-patch14-384", "bilinear")):
        vision = KNOWN_TOWERS[name]
        assert vision.images == ImageSettings((384, 384), is_cropped=False, resample=resample)
        assert (vision.image_mean, vision.image_std, vision.num_patches) == ((0.5,) * 3, (0.5,) * 3, 729)


def test_a_file_of_before_image_processors(tmp_path):
    """As openai/clip-vit-large-patch14-336 has it."""
    old = dict(crop_size=28, do_center_crop=True, do_normalize=True, do_resize=True,
               feature_extractor_type="CLIPFeatureExtractor",
               image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD), resample=3, size=28)
    check_equal(checkpoint(tmp_path, old))
    assert read_config(tmp_path).vision == VisionConfig.from_hf(tiny.CLIP)


CHOICES = {
    "image_processor_type": ["CLIPImageProcessor", "LlavaImageProcessor", "CLIPImageProcessorFast"],
    "do_convert_rgb": [True, False],
    "do_resize": [True, True, False], "resample": [0, 1, 2, 3, 4, 5, ABSENT], "do_center_crop": [True, True, False],
    "size": [28, 32, [28, 28], [31, 44], {"shortest_edge": 28}, {"shortest_edge": 37}, {"height": 28, "width": 28},
             ABSENT,
             {"height": 50, "width": 28}, {"shortest_edge": 28, "longest_edge": 60}, {"longest_edge": 28},
             {"max_height": 28, "max_width": 28}],
    "crop_size": [28, [28, 28], {"height": 28, "width": 28}, {"height": 28, "width": 28}, ABSENT, 24,
                  {"height": 28, "width": 14}],
    "do_rescale": [True, False], "rescale_factor": [1 / 255, 1 / 127.5, 0.5, ABSENT], "do_normalize": [True, False],
    "do_pad": [True, False, ABSENT],
    "image_mean": [list(CLIP_MEAN), [0.5, 0.5, 0.5], [0, 0, 0], [1, 0.9, 0.1], ABSENT],
    "image_std": [list(CLIP_STD), [0.5, 0.25, 1], ABSENT],
    "default_to_square": [ABSENT, False, True], "data_format": [ABSENT, "channels_first"], "pad_size": [ABSENT, None]}


@pytest.mark.parametrize("seed", range(60))
def test_settings_at_random_are_obeyed_or_refused(seed, tmp_path):
    rng = random.Random(seed)
    drawn = {key: rng.choice(values) for key, values in CHOICES.items()}
    directory = checkpoint(tmp_path, {key: value for key, value in drawn.items() if value is not ABSENT})
    sizes = [(rng.randint(1, 120), rng.randint(1, 120)) for _ in range(4)]
    try:
        Processor.load(directory)
    except UserError as error:
        assert "preprocessor_config.json" in str(error) and "\n" not in str(error)
        return
    check_equal(directory, sizes)


def test_most_settings_at_random_are_obeyed(tmp_path):
    """So that the test above does not pass by refusing: of settings that transformers can run, those above refuse a few."""
    refused = 0
    for seed in range(200):
        rng = random.Random(seed)
        drawn = {key: rng.choice(values) for key, values in CHOICES.items()}
        drawn |= {"size": rng.choice(CHOICES["size"][:9]), "crop_size": {"height": 28, "width": 28},
                  "do_center_crop": True}
        try:
            Processor.load(checkpoint(tmp_path, {key: value for key, value in drawn.items() if value is not ABSENT}))
        except UserError:
            refused += 1
    assert refused == 0


@pytest.mark.parametrize("change, sentence", [
    (dict(image_processor_type="DonutImageProcessor"),
     "has image_processor_type 'DonutImageProcessor'; CLIPImageProcessor or LlavaImageProcessor or SiglipImageProcessor or ViTImageProcessor was"),
    (dict(image_processor_type="SiglipImageProcessor", crop_size=ABSENT),
     "has do_center_crop true and no crop_size; the vision tower's 28 x 28 was expected"),
    (dict(image_processor_type="SiglipImageProcessor", size=28, do_center_crop=ABSENT, crop_size=ABSENT), "an image keeps its aspect ratio"),
    (dict(image_processor_type="SiglipImageProcessor", size=[30, 30], do_center_crop=ABSENT), "an image is resized to 30 x 30 pixels"),
    (dict(image_processor_type="LlavaNextImageProcessor"), "has image_processor_type 'LlavaNextImageProcessor'"),
    (dict(image_processor_type=5), "has image_processor_type 5"),
    (dict(image_processor_type=None, feature_extractor_type="DeiTFeatureExtractor"),
     "has feature_extractor_type 'DeiTFeatureExtractor'"),
    (dict(image_processor_type=None, auto_map={"AutoImageProcessor": "x.Y"}), "names custom code"),
    (dict(size={"shortest_edge": 28, "longest_edge": 40}),
     "has size {'shortest_edge': 28, 'longest_edge': 40}; shortest_edge, height and width"),
    (dict(size={"longest_edge": 28}), "has size {'longest_edge': 28}"), (dict(size={}), "has size {}"),
    (dict(size="28"), "has size '28'"),
    (dict(size={"max_height": 28, "max_width": 28}), "has size {'max_height': 28"),
    (dict(size={"height": 28}), "has size {'height': 28}"),
    (dict(size=0), "has size 0"), (dict(size=[28]), r"has size \[28\]"), (dict(size=[28, 28, 3]), "has size"),
    (dict(size=28.0), "has size 28.0"),
    (dict(size={"shortest_edge": True}), "has size"), (dict(size=10**9), "from 1 to 13377, was expected"),
    (dict(size=-28), "has size -28"),
    (dict(crop_size=24), "has crop_size 24; the vision tower's 28 x 28 was expected"),
    (dict(crop_size=[28, 14]), r"has crop_size \[28, 14\]"),
    (dict(crop_size={"shortest_edge": 28}), "has crop_size {'shortest_edge': 28}; height and width or a number"),
    (dict(crop_size=None), "has crop_size None; height and width or a number"),
    (dict(crop_size=ABSENT), "has no crop_size, so it is 224; the vision tower's 28 x 28"),
    (dict(do_center_crop=False), "do_center_crop is false, so an image keeps its aspect ratio; the vision tower expects 28 x 28 pixels"),
    (dict(do_center_crop=False, size=[30, 40]), "an image is resized to 40 x 30 pixels"),
    (dict(do_center_crop=False, do_resize=False), "an image keeps its size"),
    (dict(resample=6), "has resample 6; one of 0 \\(nearest\\)"),
    (dict(resample="bicubic"), "has resample 'bicubic'"), (dict(resample=True), "has resample True"),
    (dict(resample=2.0), "has resample 2.0"),
    (dict(rescale_factor=0), "has rescale_factor 0"), (dict(rescale_factor=-1), "has rescale_factor -1"),
    (dict(rescale_factor="1/255"), "has rescale_factor"), (dict(rescale_factor=float("nan")), "has rescale_factor nan"),
    *(({key: value}, f"has {key} {value!r}; true or false was expected") for key in (
        "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad") for value in (1, "true", 0.0)),
    (dict(size=None), "has size None"), (dict(resample=None), "has resample None"),
    (dict(rescale_factor=None), "has rescale_factor None"),
    (dict(size={"height": 28, "width": 28, "shortest_edge": None}), "has size"),
    (dict(do_center_crop=None), "an image keeps its aspect ratio"),
    (dict(image_mean=[0.5]), r"has image_mean \[0.5\]"), (dict(image_std=[1, 0, 1]), "has image_std"),
    (dict(image_mean=0.5), "has image_mean 0.5"),
    (dict(use_square_size=True), "has use_square_size"), (dict(do_pad=True, pad_size=40), "has pad_size 40; the vision tower's 28 x 28"),
    (dict(image_processor_type="LlavaImageProcessor", do_pad=True, image_mean=[123.7, 116.3, 103.5]),
     "cannot be the colour of padding"),
    (dict(image_processor_type="LlavaImageProcessor", do_pad=True, image_mean=[-0.5, 0, 0]),
     "cannot be the colour of padding")])
def test_what_cannot_be_obeyed_is_one_sentence(change, sentence, tmp_path):
    settings = {key: value for key, value in {**PLAIN, **change}.items() if value is not ABSENT}
    directory = checkpoint(tmp_path / "a", settings)
    inside = checkpoint(tmp_path / "b", None, {"image_processor": settings})
    for path, file in ((directory, "preprocessor_config.json"), (inside, "processor_config.json")):
        for call in (Processor.load, read_config):
            with pytest.raises(UserError, match=sentence) as error:
                call(path)
            assert file in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="has image_processor 5; an object was expected"):
        read_config(checkpoint(tmp_path / "c", None, {"image_processor": 5}))


def test_keys_that_transformers_does_not_read_are_said(tmp_path, capsys):
    harmless = dict(data_format="channels_first", device=None, processor_class="LlavaProcessor", return_tensors=None,
                    disable_grouping=None,
                    input_data_format=None, pad_size=None, do_pad=None, image_seq_length=None)
    check_equal(checkpoint(tmp_path / "a", {**PLAIN, **harmless}), SIZES[:2])
    assert capsys.readouterr().err == ""
    check_equal(checkpoint(tmp_path / "b", {**PLAIN, "do_flip": True, "gamma": 2}), SIZES[:2])
    assert capsys.readouterr().err.count("has do_flip, gamma, which neither transformers' CLIPImageProcessor nor this project reads") == 1
    (tmp_path / "a" / "video_preprocessor_config.json").write_text("{}")
    Processor.load(tmp_path / "a")
    assert "has settings for videos, which are not read" in capsys.readouterr().err


def test_of_two_files_the_one_inside_the_processor_counts(tmp_path, capsys):
    inside = dict(processor_class="LlavaProcessor", image_processor={**PLAIN, "resample": 2})
    check_equal(checkpoint(tmp_path / "a", PLAIN, inside))
    assert "hold different image settings; processor_config.json's are used, as in transformers 5" in capsys.readouterr().err
    check_equal(checkpoint(tmp_path / "b", {**PLAIN, "size": 28}, {"image_processor": PLAIN}))
    assert capsys.readouterr().err == "", "the same in other words"
    check_equal(checkpoint(tmp_path / "c", {**PLAIN, "resample": 2},
                           {"processor_class": "LlavaProcessor", "image_mean": [9, 9, 9]}))


def test_a_file_that_says_nothing_of_sizes_is_at_the_towers(tmp_path):
    for settings in ({}, {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, {"resample": 2, "do_normalize": False}):
        found = Processor.load(checkpoint(tmp_path, settings)).images([picture(90, 60)])[0]
        np.testing.assert_array_equal(found, theirs(checkpoint(tmp_path, {**PLAIN, **settings}), picture(90, 60)))


@pytest.mark.parametrize("processor, sentence", [
    ({}, None), (dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
                      image_token="<image>"), None),
    (dict(patch_size=None, vision_feature_select_strategy=None), None),
    (dict(patch_size=14, vision_feature_select_strategy="default"), None),
    (dict(patch_size=16), "has patch_size 16; config.json has 14"),
    (dict(vision_feature_select_strategy="full"), "has vision_feature_select_strategy 'full'; config.json has default"),
    (dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=0),
     "has num_additional_image_tokens 0; 1 was"),
    (dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=2),
     "an image takes 4 tokens")])
def test_a_processor_that_counts_other_tokens_than_the_model_is_refused(processor, sentence, tmp_path):
    directory = checkpoint(tmp_path, PLAIN, {"processor_class": "LlavaProcessor", **processor})
    if sentence is None:
        assert Processor.load(directory).tokens_per_image == 4
        return
    with pytest.raises(UserError, match=sentence) as error:
        Processor.load(directory)
    assert "processor_config.json" in str(error.value)


def test_a_processor_with_another_image_token_is_said(tmp_path, capsys):
    directory = checkpoint(tmp_path, PLAIN, {"image_token": "<img>"})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer("<image>")))
    Processor.load(directory)
    assert "processor_config.json has image_token '<img>'; <image> of the tokenizer" in capsys.readouterr().err
    Processor.load(checkpoint(tmp_path / "same", PLAIN, {"image_token": "<image>"}))
    assert "image_token" not in capsys.readouterr().err


def tokenizer(token):
    added = [dict(id=i, content=text, special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
             for i, text in enumerate(("<s>", "</s>", token))]
    vocabulary = {"<s>": 0, "</s>": 1, token: 2, "a": 3}
    return dict(version="1.0", added_tokens=added, model=dict(type="BPE", vocab=vocabulary, merges=[]))


# ---- the originals' layouts


@pytest.mark.parametrize("ratio", ["pad", "square"])
@pytest.mark.parametrize("does", [None, True, False])
def test_the_originals_pad_by_their_config(ratio, does, tmp_path, capsys):
    """image_aspect_ratio decides, with the colour of the processor's mean; a do_pad beside it is said not to."""
    tower = tiny.save_clip(tmp_path / "tiny-tower")
    settings = {**PLAIN, "resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_processor_type": "LlavaImageProcessor",
                "do_pad": does}
    directory = checkpoint(tmp_path / "model", settings, config={**tiny.V1, "image_aspect_ratio": ratio})
    processor = Processor.load(directory)
    assert processor.image_mode == ratio
    told = "is used, as in the original's code" in capsys.readouterr().err
    assert told == (does is not None and does != (ratio == "pad"))
    alike = checkpoint(tmp_path / "alike", {**settings, "do_pad": ratio == "pad"})
    for size in SIZES:
        np.testing.assert_array_equal(processor.images([picture(*size)])[0], theirs(alike, picture(*size)))
    if ratio == "pad":  # expand2square of the original, then its processor
        image = picture(90, 60)
        square = Image.new("RGB", (90, 90), tuple(int(x * 255) for x in settings["image_mean"]))
        square.paste(image, (0, 15))
        np.testing.assert_array_equal(processor.images([image])[0],
                                      theirs(checkpoint(alike, {**settings, "do_pad": False}), square))
    assert tower.exists()


def test_the_towers_own_folder_decides_for_the_originals(tmp_path):
    tiny.save_clip(tmp_path / "model" / "tiny-tower")
    for settings in ({**PLAIN, "resample": 2}, {**PLAIN, "do_normalize": False, "do_resize": False},
                     {**PLAIN, "size": [40, 30]}):
        directory = checkpoint(tmp_path / "model", config=tiny.V1)
        (directory / "tiny-tower" / "preprocessor_config.json").write_text(json.dumps(settings))
        found = Processor.load(directory).images([picture(90, 60)])[0]
        np.testing.assert_array_equal(found, theirs(checkpoint(tmp_path / "hf", settings), picture(90, 60)))
    (directory / "tiny-tower" / "preprocessor_config.json").write_text(json.dumps({**PLAIN, "crop_size": 20}))
    with pytest.raises(UserError, match="tiny-tower/preprocessor_config.json has crop_size 20; the vision tower's 28 x 28"):
        Processor.load(directory)


def test_a_tower_that_is_given_brings_its_own_settings(tmp_path):
    """In place of the checkpoint's, which may be of another size; a tower without settings keeps the checkpoint's."""
    directory = checkpoint(tmp_path / "model", {**PLAIN, "resample": 2})
    other = tiny.save(tmp_path / "other", {**tiny.CLIP, "image_size": 42})
    (other / "preprocessor_config.json").write_text(json.dumps({**PLAIN, "resample": 4, "size": 42, "crop_size": 42}))
    vision = read_config(directory, other).vision
    assert (vision.image_size, vision.images) == (42, ImageSettings(resample="box"))
    same = tiny.save(tmp_path / "same", tiny.CLIP)
    assert read_config(directory, same).vision.images == ImageSettings(resample="bilinear")
    tree = tmp_path / "tree" / "model"
    tree.mkdir(parents=True)
    (tree / "config.json").write_text(json.dumps(read_config(directory).to_dict()))
    assert read_config(tmp_path / "tree", other).vision == vision
    assert read_config(tmp_path / "tree", same).vision.images == ImageSettings(resample="bilinear")


# ---- where settings travel

SETTINGS = [
    {**PLAIN, "resample": 2, "image_mean": [0.5, 0.4, 0.3], "size": {"shortest_edge": 40}},
    {**PLAIN, "do_center_crop": False, "size": {"height": 28, "width": 28}, "do_normalize": False},
    {**PLAIN, "do_resize": False, "do_rescale": False, "image_std": [50, 60, 70]},
    {**PLAIN, "rescale_factor": 1 / 127.5, "image_processor_type": "LlavaImageProcessor", "do_pad": True},
    {**PLAIN, "image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": False, "resample": 1}]


def same_pixels(directory, wanted, vision_tower=None):
    processor = Processor(read_config(directory, vision_tower)) if vision_tower else Processor.load(directory)
    for size, pixels in wanted.items():
        found = processor.images([picture(*size)])[0]
        np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("place, settings", [*(("preprocessor", each) for each in SETTINGS), ("processor", SETTINGS[3])],
                         ids=[*range(len(SETTINGS)), "processor"])
def test_settings_come_back_from_imports_and_exports(place, settings, tmp_path):
    """A checkpoint of transformers to our tree, to both layouts and back: the same pixels each time, and transformers' too."""
    config = llava_from_hf(HF)
    source = tmp_path / "source"
    export(random_checkpoint(config), source)
    files = dict(settings=settings) if place == "preprocessor" else dict(processor={"image_processor": settings})
    checkpoint(source, config=json.loads((source / "config.json").read_text()), **files)
    their = their_processor(source)
    wanted = {size: their(picture(*size)) for size in SIZES}
    same_pixels(source, wanted)
    write_model(tmp_path / "tree", open_checkpoint(source))
    same_pixels(tmp_path / "tree", wanted)
    for layout in ("transformers", "llava"):
        export(open_checkpoint(tmp_path / "tree"), tmp_path / layout, layout)
        same_pixels(tmp_path / layout, wanted)
        write_model(tmp_path / f"tree of {layout}", open_checkpoint(tmp_path / layout))
        same_pixels(tmp_path / f"tree of {layout}", wanted)
        export(open_checkpoint(tmp_path / f"tree of {layout}"), tmp_path / f"{layout} again")
        same_pixels(tmp_path / f"{layout} again", wanted)
        for size, pixels in wanted.items():
            np.testing.assert_array_equal(theirs(tmp_path / f"{layout} again", picture(*size)), pixels)
    for size, pixels in wanted.items():
        np.testing.assert_array_equal(theirs(tmp_path / "transformers", picture(*size)), pixels)
    assert "It does not read `preprocessor_config.json` here either" in (tmp_path / "llava" / "README.md").read_text()


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=range(3))
@pytest.mark.parametrize("ratio", ["pad", "square"])
def test_settings_of_the_originals_reach_transformers(settings, ratio, tmp_path):
    """v1.0 with a tower in a folder of its own, whose settings are not those of CLIP."""
    if ratio == "pad" and not settings["do_center_crop"]:
        settings = {**settings, "size": {"shortest_edge": 28}}
    tiny.save_v1(tmp_path)
    (tmp_path / "tiny-tower" / "preprocessor_config.json").write_text(json.dumps(settings))
    config = json.loads((tmp_path / "v1" / "config.json").read_text())
    (tmp_path / "v1" / "config.json").write_text(json.dumps({**config, "image_aspect_ratio": ratio,
                                                             "mm_projector_type": "linear"}))
    reference = checkpoint(tmp_path / "hf",
                           {**settings, "image_processor_type": "LlavaImageProcessor", "do_pad": ratio == "pad"})
    wanted = {size: theirs(reference, picture(*size)) for size in SIZES}
    same_pixels(tmp_path / "v1", wanted)
    write_model(tmp_path / "tree", open_checkpoint(tmp_path / "v1"))
    same_pixels(tmp_path / "tree", wanted)
    export(open_checkpoint(tmp_path / "tree"), tmp_path / "out", "llava")
    same_pixels(tmp_path / "out", wanted)
    for name in ("preprocessor_config.json", "tiny-tower/preprocessor_config.json"):
        written = json.loads((tmp_path / "out" / name).read_text())
        assert written["image_processor_type"] == "CLIPImageProcessor" and "do_pad" not in written


def test_an_export_that_was_edited_is_read_as_edited(tmp_path):
    """By transformers and here; our tree of it too, though the files from before the export lie inside."""
    config = dataclasses.replace(llava_from_hf({**tiny.V1, "model_type": "llava_llama",
                                                      "mm_projector_type": "mlp2x_gelu"},
                                                     VisionConfig.from_hf(tiny.CLIP)), image_aspect_ratio="pad")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PLAIN))
    export(random_checkpoint(config).replace(files={"preprocessor_config.json": tmp_path / "preprocessor_config.json"}),
           tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "LlavaImageProcessor" and written["do_pad"] is True
    check_equal(tmp_path / "hf")
    for change in (dict(resample=2), dict(do_pad=False),
                   dict(do_pad=False, do_normalize=False, image_mean=[0.1, 0.2, 0.3])):
        (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps({**written, **change}))
        check_equal(tmp_path / "hf")
        wanted = {size: theirs(tmp_path / "hf", picture(*size)) for size in SIZES}
        shutil.rmtree(tmp_path / "tree", ignore_errors=True)
        write_model(tmp_path / "tree", open_checkpoint(tmp_path / "hf"))
        same_pixels(tmp_path / "tree", wanted)


def test_another_towers_settings_reach_the_tree(tmp_path):
    """The files that travel are the checkpoint's, of another size; those that are written say what the model does."""
    source = tmp_path / "source"
    export(random_checkpoint(llava_from_hf(HF)), source)
    checkpoint(source, PLAIN, config=json.loads((source / "config.json").read_text()))
    large = {**tiny.CLIP, "image_size": 42}
    tower = tiny.save(tmp_path / "other", large, tiny.drawn(tiny.clip_shapes(large), dtype=np.float32))
    (tower / "preprocessor_config.json").write_text(json.dumps({**PLAIN, "resample": 2, "size": 42, "crop_size": 42}))
    opened = open_checkpoint(source, tower)
    wanted = {size: Processor.from_checkpoint(opened).images([picture(*size)])[0] for size in SIZES}
    assert wanted[90, 60].shape == (42, 42, 3)
    write_model(tmp_path / "tree", opened)
    same_pixels(tmp_path / "tree", wanted)
    export(opened, tmp_path / "hf")
    same_pixels(tmp_path / "hf", wanted)
    np.testing.assert_array_equal(theirs(tmp_path / "hf", picture(90, 60)), wanted[90, 60])


def test_trees_from_before_these_settings_load(tmp_path):
    """Their config has no `images`; what their files say counts."""
    config = read_config(checkpoint(tmp_path / "hf", {**PLAIN, "image_mean": [0.5] * 3}))
    old = config.to_dict()
    assert old["vision"].pop("images") == dataclasses.asdict(ImageSettings())
    model = tmp_path / "tree" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(old))
    assert read_config(tmp_path / "tree") == config
    (model / "preprocessor_config.json").write_text(json.dumps({**PLAIN, "image_mean": [0.5] * 3, "resample": 2}))
    assert read_config(tmp_path / "tree").vision.images == ImageSettings(resample="bilinear")


@pytest.mark.parametrize("images, sentence", [
    (5, "is not a config of this project"), ({"nonsense": 1}, "is not a config of this project"),
    ({"resample": "sinc"}, "one of nearest, lanczos"),
    ({"resize": [1, 2, 3]}, "at most two edges"), ({"resize": [0]}, "at most two edges from 1 to 13377"),
    ({"scale": 0}, "a finite number above 0"),
    ({"is_cropped": 1}, "true or false was expected"),
    ({"is_cropped": False}, "the vision tower expects 28 x 28 pixels")])
def test_settings_of_ours_that_make_no_sense(images, sentence, tmp_path):
    config = read_config(checkpoint(tmp_path / "hf", PLAIN)).to_dict()
    config["vision"]["images"] = images
    model = tmp_path / "tree" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=sentence):
        read_config(tmp_path / "tree")


def test_a_mode_that_is_asked_for_goes_before_the_files(tmp_path):
    """`image_mode` and `mode` are LLaVA's padding, with the checkpoint's other settings."""
    padding = {**PLAIN, "image_processor_type": "LlavaImageProcessor", "do_pad": True, "resample": 2}
    directory, plain = checkpoint(tmp_path / "a", padding), checkpoint(tmp_path / "b", {**padding, "do_pad": False})
    image = picture(90, 60)
    for found in (Processor.load(directory, image_mode="square").images([image]),
                  Processor.load(directory).images([image], mode="square")):
        np.testing.assert_array_equal(found[0], theirs(plain, image))
    np.testing.assert_array_equal(Processor.load(plain, image_mode="pad").images([image])[0], theirs(directory, image))
    uncut = checkpoint(tmp_path / "c", {**padding, "do_center_crop": False})
    np.testing.assert_array_equal(Processor.load(uncut).images([image])[0], theirs(uncut, image))
    with pytest.raises(UserError, match="resize an image to 42 x 28 pixels; 28 x 28 were expected"):
        Processor.load(uncut).images([image], mode="square")


def test_settings_that_would_make_images_without_end_are_refused(tmp_path):
    directory = checkpoint(tmp_path, {**PLAIN, "size": {"shortest_edge": 13000}})
    with pytest.raises(UserError, match="resize an image to 39000 x 13000 pixels; at most 178956970 pixels were expected"):
        Processor.load(directory).images([Image.new("RGB", (300, 100))])
    squashed = checkpoint(tmp_path, {**PLAIN, "size": [28, 28]})
    assert Processor.load(squashed).images([Image.new("RGB", (1, 3000))]).shape == (1, 28, 28, 3), "no edge grows"
    with pytest.raises(UserError, match="the image is 0 x 5 pixels"):
        Processor.load(squashed).images([load_image(Image.new("RGB", (0, 5)))])
