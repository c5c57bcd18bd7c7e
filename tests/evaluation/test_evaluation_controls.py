"""Pictures of noise, what a difference is said to mean, and what a model was trained on."""

import json
import math
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavamed_jax.datasets import training
from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.datasets.vqa_rad import read_vqa_rad
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.scoring import controls, leakage


def sample(number, image, answer="Yes", kind="CLOSED"):
    return VqaSample(number, Path(image), "Is it?", answer, kind)


# --- noise ---


def test_noise_is_uniform_its_own_for_each_image_and_fixed_by_the_seed(tmp_path):
    samples = [sample(n, f"{n % 3}.jpg") for n in range(7)]

    def pictures(seed):
        with controls.noise_images(samples, tmp_path / "noise", seed) as shown:
            assert [shown[n] == shown[0] for n in range(7)] == [True, False, False, True, False, False, True]
            assert sorted(path.name for path in (tmp_path / "noise").iterdir()) == [f"noise_0000{n}.png" for n in range(3)]
            return [np.asarray(Image.open(path)) for path, in shown[:3]]

    first, again, other = pictures(0), pictures(0), pictures(1)
    assert not (tmp_path / "noise").exists()
    assert {picture.shape for picture in first} == {(controls.NOISE_SIZE, controls.NOISE_SIZE, 3)}
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a in first for b in other) and not np.array_equal(first[0], first[1])
    counts = np.bincount(first[0].ravel(), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * math.sqrt(2 * 255), "a chi-squared of 255 degrees: every value as often"
    left, right = (first[0][:, part, 0].ravel() - 127.5 for part in (slice(None, -1), slice(1, None)))
    assert abs(np.corrcoef(left, right)[0, 1]) < 0.02, "no pixel says anything about the next"


def test_noise_is_gone_after_a_failure_and_takes_the_place_of_an_earlier_one(tmp_path):
    folder = tmp_path / "noise"
    folder.mkdir()
    (folder / "old.png").write_bytes(b"of a start that was killed")
    with pytest.raises(KeyboardInterrupt), controls.noise_images([sample(0, "a.jpg")], folder, 0):
        assert [path.name for path in folder.iterdir()] == ["noise_00000.png"]
        raise KeyboardInterrupt
    assert not folder.exists()


def test_noise_that_the_disk_has_no_room_for_is_one_sentence(tmp_path, monkeypatch):
    samples = [sample(n, f"{n}.jpg") for n in range(100)]
    monkeypatch.setattr(controls.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(10**6))
    with pytest.raises(UserError, match="100 pictures of noise need 34 MB; the disk of .*noise has 1 MB free"):
        with controls.noise_images(samples, tmp_path / "noise", 0):
            pass
    assert not (tmp_path / "noise").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to .*file/noise"):
        with controls.noise_images(samples, tmp_path / "file" / "noise", 0):
            pass


# --- what a difference says ---


def row(name, value, p):
    return {name: value, f"{name}_low": value - 1, f"{name}_high": value + 1, f"{name}_p": p}


def test_a_difference_is_read_in_a_sentence():
    text = controls.reading(row("closed_accuracy", 3.25, 0.2) | row("open_f1", 28.61, 0.0001), "another image")
    assert text == (
        "With another image in place of the image: the model loses 28.6 points of open F1 (p < 0.001): these answers depend on the image; a difference of"
        " +3.2 points of closed accuracy (p = 0.200) is within chance: no evidence that these answers depend on the image."
    )
    assert controls.reading(row("closed_accuracy", -5.0, 0.01), "noise") == (
        "With noise in place of the image: the model gains 5.0 points of closed accuracy (p = 0.010): the right image misleads it, or something is wrong."
    )
    assert controls.reading(row("choice_accuracy", -2.0, 0.3) | row("rouge_l", 0.0, 1.0), "noise") == (
        "With noise in place of the image: differences of -2.0 points of accuracy of choices (p = 0.300) and +0.0 points of ROUGE-L (p = 1.000) are within"
        " chance: no evidence that these answers depend on the image."
    )
    assert controls.reading({"closed_accuracy": None, "closed_accuracy_p": None, "open_exact": 4.0, "open_exact_p": 0.01}, "noise") == ""


# --- what the model was trained on ---


@pytest.fixture
def pictures(tmp_path):
    """Six pictures in `test/`, one a JPEG, and what a training set makes of them."""
    rng = np.random.default_rng(0)
    for folder in ("test", "train"):
        (tmp_path / folder).mkdir()
    for n in range(6):
        Image.fromarray(rng.integers(0, 256, (12, 10 + n // 4, 3), dtype=np.uint8)).save(tmp_path / "test" / f"{n}.png")
    Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / "test" / "6.jpg")
    return tmp_path


def train(folder, *records):
    """A LLaVA file of (image, answer, …) records."""
    asked = lambda first: {"from": "human", "value": "<image>\nIs it?" if first else "And now?"}
    rows = [{"id": str(n), "image": image, "conversations": [turn for i, answer in enumerate(turns) for turn in (
        asked(i == 0), {"from": "gpt", "value": answer})]} for n, (image, *turns) in enumerate(records)]
    (folder / "train.json").write_text(json.dumps(rows))
    return training.read_training(str(folder / "train.json"), str(folder / "train"))


def test_files_and_pixels_are_found_whatever_they_are_called(pictures):
    test, training = pictures / "test", pictures / "train"
    (training / "renamed.png").write_bytes((test / "0.png").read_bytes())
    Image.open(test / "1.png").save(training / "again.bmp")  # the same pixels in another file
    Image.open(test / "6.jpg").save(training / "lossless.png")
    Image.open(test / "2.png").save(training / "lossy.jpg", quality=60)
    changed = np.array(Image.open(test / "3.png"))
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(training / "one_bit.png")
    data = train(pictures, ("renamed.png", "No.", "the Left lung"), ("again.bmp", "yes"), ("lossless.png", "No"), ("lossy.jpg", "yes"),
                 ("one_bit.png", "yes"), ("gone.png", "yes"))  # fmt: skip
    samples = [sample(n, test / f"{n}.png") for n in range(6)] + [sample(6, test / "6.jpg", "No")]
    samples += [sample(7, test / "0.png", "Left lung.", "OPEN"), sample(8, test / "0.png", "And now", "OPEN")]
    samples += [sample(9, test / "0.png", "no")]
    found = leakage.trained_on(samples, data)
    assert found == {
        "records": 6, "records_not_readable": 0, "training_images": 6, "training_images_not_readable": 1,
        "images": 7, "images_same_file": 1, "images_same_pixels": 2,
        "by_kind": {
            # 0, 1, 6 and 9 by their image; of these the gold is among the answers of 1, 6 and 9.
            "CLOSED": {"questions": 8, "image_in_training": 4, "image_and_answer_in_training": 3},
            "OPEN": {"questions": 2, "image_in_training": 2, "image_and_answer_in_training": 1},
        },
    }  # fmt: skip


@pytest.mark.parametrize("letter, count", [("A", 1), ("B", 0), ("(a)", 1)])
def test_a_letter_of_training_data_is_the_option_that_its_question_lists(pictures, letter, count):
    (pictures / "train" / "0.png").write_bytes((pictures / "test" / "0.png").read_bytes())
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. lung\nB. liver"}, {"from": "gpt", "value": letter}]
    (pictures / "train.json").write_text(json.dumps([{"id": 1, "image": "0.png", "conversations": turns}]))
    asked = VqaSample(1, pictures / "test" / "0.png", "Which?\nA. liver\nB. lung", "Lung", "CHOICE", options=("liver", "Lung"))
    found = leakage.trained_on([asked], training.read_training(str(pictures / "train.json"), str(pictures / "train")))
    assert found["by_kind"]["CHOICE"] == {"questions": 1, "image_in_training": 1, "image_and_answer_in_training": count}


def test_two_tested_copies_of_a_training_file_are_both_found(pictures):
    """One by its bytes, the other, saved again, by its pixels: that the first is settled does not hide the second."""
    Image.open(pictures / "test" / "0.png").save(pictures / "test" / "copy.bmp")
    (pictures / "train" / "a.png").write_bytes((pictures / "test" / "0.png").read_bytes())
    found = leakage.trained_on([sample(0, pictures / "test" / "0.png"), sample(1, pictures / "test" / "copy.bmp")],
                               train(pictures, ("a.png", "yes")))  # fmt: skip
    assert (found["images_same_file"], found["images_same_pixels"]) == (1, 1)
    assert found["by_kind"]["CLOSED"] == {"questions": 2, "image_in_training": 2, "image_and_answer_in_training": 2}


def test_equal_bytes_of_another_shape_are_another_picture(pictures):
    for folder, sizes in (("test", [(6, 8), (8, 6)]), ("train", [(8, 6)])):
        for width, height in sizes:
            Image.new("RGB", (width, height)).save(pictures / folder / f"{width}.{'png' if folder == 'test' else 'bmp'}")
    Image.new("RGB", (6, 8), "white").save(pictures / "train" / "6.bmp")
    found = leakage.trained_on([sample(n, pictures / "test" / f"{n}.png") for n in (6, 8)],
                               train(pictures, ("8.bmp", "yes"), ("6.bmp", "yes")))  # fmt: skip
    assert found["images_same_pixels"] == 1 and found["images_same_file"] == 0


def test_damaged_records_and_records_without_images_are_counted(pictures):
    train(pictures, (["0.png"], "yes"))
    rows = json.loads((pictures / "train.json").read_text())
    (pictures / "train" / "0.png").write_bytes((pictures / "test" / "0.png").read_bytes())
    (pictures / "train" / "broken.png").write_bytes(b"no picture")
    talk = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "yes"}]
    rows += [{"id": "x"}, {"id": "y", "conversations": talk}, rows[0] | {"id": "z", "image": "broken.png"}]
    (pictures / "train.json").write_text(json.dumps(rows))
    data = training.read_training(str(pictures / "train.json"), str(pictures / "train"))
    found = leakage.trained_on([sample(0, pictures / "test" / "0.png")], data)
    assert (found["records"], found["records_not_readable"]) == (4, 1)
    assert (found["training_images"], found["training_images_not_readable"]) == (2, 1)
    assert found["images_same_file"] == 1


def test_nothing_is_read_twice_and_nothing_for_nothing(pictures, monkeypatch):
    test, training = pictures / "test", pictures / "train"
    for n in range(4):
        (training / f"{n}.png").write_bytes((test / f"{n}.png").read_bytes())
    Image.new("RGB", (50, 60)).save(training / "other_shape.png")
    read, decoded = Counter(), Counter()
    digest, pixels = leakage._digest, leakage._pixels
    monkeypatch.setattr(leakage, "_digest", lambda image: read.update([image]) or digest(image))
    monkeypatch.setattr(leakage, "_pixels", lambda image: decoded.update([image]) or pixels(image))
    data = train(pictures, *((f"{n}.png", "yes") for n in range(4)), ("other_shape.png", "yes"))
    found = leakage.trained_on([sample(n, test / f"{n}.png") for n in range(4)], data)
    assert found["images_same_file"] == 4 and found["images_same_pixels"] == 0
    assert set(read.values()) == {1} == set(decoded.values()) and not any("other_shape" in image for image in (*read, *decoded))
    decoded.clear()
    found = leakage.trained_on([sample(4, test / "4.png")], train(pictures, ("0.png", "yes")))
    assert found["images_same_file"] == 0 and not decoded, "another width is another picture"


def test_one_copied_file_needs_no_decoding(pictures, monkeypatch):
    (pictures / "train" / "a.png").write_bytes((pictures / "test" / "0.png").read_bytes())
    monkeypatch.setattr(leakage, "_pixels", lambda image: pytest.fail("decoded"))
    found = leakage.trained_on([sample(0, pictures / "test" / "0.png")], train(pictures, ("a.png", "no")))
    assert found["images_same_file"] == 1 and found["by_kind"]["CLOSED"]["image_and_answer_in_training"] == 0


@pytest.mark.slow
def test_the_papers_training_rows_hold_the_answers(shared):
    """By content as by name: 202 of VQA-RAD's 203 test images, and in the paper's rows most open answers too."""
    root = shared / "data" / "vqa_rad"
    samples = [each for each in read_vqa_rad(root, "test") if each.answer_type == "OPEN"]
    by_name = leakage.leakage(samples, read_vqa_rad(root, "train", "paper"))
    found = leakage.trained_on(samples, training.read_training(root, protocol="paper"))
    assert found["by_kind"]["OPEN"]["image_and_answer_in_training"] == by_name["open_answers_on_same_image_in_training"] == 105
