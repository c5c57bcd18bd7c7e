"""Known answers of the original's code on its two tiny models, and ten random models beside transformers.

The torch reference of `originals.py` is held to the printed numbers first; then it stands in where none are printed:
windows, truncation, greedy tokens. Everything here goes through the same door as a user's checkpoint: `load(directory)`.
"""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from llavamed_jax.assistant import load
from llavamed_jax.config import IMAGE_TOKEN, PAD_TOKEN
from llavamed_jax.models import layers, llava
from llavamed_jax.text.image_positions import expand_images
from llavamed_jax.training.losses import cross_entropy
from tests.support import hf, originals
from tests.support.programs import apply

torch = hf.torch
TOLERANCE = 1e-4
P = 4  # patches of both towers
IGNORE = -100

V15_ROWS = [[1, 5, IMAGE_TOKEN, 7, 9, 11], [1, 6, 8]]
V15_LABELS = [[IGNORE] * 3 + [7, 9, 11], [IGNORE, 6, 8]]
START, END = originals.START, originals.END
V1_ROWS = [[1, 5, START, IMAGE_TOKEN, END, 7, 9, 2], [1, 6, 8, 10, 12, 14, 16, 18]]
V1_LABELS = [[IGNORE] * 5 + [7, 9, 2], [IGNORE] * 2 + [8, 10, 12, 14, 16, 18]]

# (row, expanded position) -> the first five logits as printed; left padding gives the same at the same token.
V15_LOGITS = {(0, 8): [1.459669, -.628106, -.736656, 1.476071, -.962451], (1, 2): [1.645196, -1.102205, -.376447, 1.535533, -1.391107],
              (0, 0): [-1.065744, .406330, .598017, -1.094707, .662102], (0, 2): [-.373282, .019584, .350739, -.423319, .136545]}
V1_LOGITS = {(0, 10): [1.006845, -1.049956, .201760, .817710, -1.143027], (0, 4): [-1.004380, .720480, .175035, -.921963, .886238],
             (1, 7): [-1.104486, .770850, .217160, -1.020823, .957910]}
PRINTED = {"v15": (V15_ROWS, V15_LABELS, V15_LOGITS, 5.2719169), "v1": (V1_ROWS, V1_LABELS, V1_LOGITS, 5.6709228)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """name -> (our model, the reference), each loaded from a directory in its release's layout."""
    def make(save, *args, **changes):
        directory, reference = save(tmp_path_factory.mktemp("tiny"), *args, **changes)
        return load(directory, dtype="float32"), reference
    return {"v15": make(originals.save_v15), "v1": make(originals.save_v1)}


def padded(rows, labels, side):
    """Expanded ids, labels and segments [B,T]; padding is a segment of its own, positions count over the padded length (Q7)."""
    pairs = [expand_images(row, P, label) for row, label in zip(rows, labels)]
    T = max(len(ids) for ids, _ in pairs)
    ids, wanted, segments = np.zeros((len(rows), T), np.int32), np.full((len(rows), T), IGNORE), np.zeros((len(rows), T), np.int32)
    for b, (row, label) in enumerate(pairs):
        where = slice(0, len(row)) if side == "right" else slice(T - len(row), T)
        ids[b, where], wanted[b, where], segments[b, where] = row, label, 1
    return ids, wanted, segments


def slots(images, rows):
    """[I,H,W,3] -> [B,1,H,W,3]: the first image to the first row."""
    out = np.zeros((rows, 1, *images.shape[1:]), np.float32)
    out[0, 0] = images[0]
    return out


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", PRINTED)
def test_logits_and_loss_as_printed(name, side, tiny, measured):
    rows, labels, printed, loss = PRINTED[name]
    model, _ = tiny[name]
    ids, labels, segments = padded(rows, labels, side)
    T = ids.shape[1]
    logits = np.asarray(apply(llava.Llava(model.config), model.engine.params, ids, slots(originals.PIXELS, 2), segment_ids=segments))
    starts = segments.argmax(1)
    measured([logits[b, starts[b] + t, :5] for b, t in printed], list(printed.values()), TOLERANCE)
    total, count = jax.jit(cross_entropy)(logits, labels, segments)
    measured(total / count, loss, TOLERANCE)
    if name == "v15":
        assert T == 9 and int(logits[0, 8].argmax()) == 49


@pytest.mark.parametrize("name", PRINTED)
def test_load_and_logits_as_printed(name, tiny, measured):
    """The public call: rows padded with -1 on the right, one image for the one row that has one."""
    rows, labels, printed, _ = PRINTED[name]
    ids, _, segments = padded(rows, labels, "right")
    logits = tiny[name][0].logits(np.where(segments == 1, ids, PAD_TOKEN), originals.PIXELS[:1])
    measured([logits[place][:5] for place in printed], list(printed.values()), TOLERANCE)


PARTS = {"v15": ([-1.3093107, .8270665, -1.2362983, .3318336], -13.501129, [.4525617, .1629396, -.6866335, .8491831], 1.631598),
         "v1": ([-5.2813406, -7.8751307, -7.0217228, -4.9967890], -295.09924, [51.281269, 84.542908, 95.729393, 81.933510], 197.613388)}


@pytest.mark.parametrize("name", PARTS)
def test_tower_and_projector_as_printed(name, tiny, measured):
    """Sums run over thousands of values: they are judged by the sum of their magnitudes' order, the values themselves by 1e-4."""
    model, reference = tiny[name]
    tower_values, tower_sum, values, total = PARTS[name]

    @jax.jit
    def run(params, pixels):
        module = llava.Llava(model.config)
        tower = module.apply(params, pixels, method=lambda module, pixels: module.vision_tower(pixels)[:, 1:])
        return tower, module.apply(params, pixels[:, None], method="encode_images")[:, 0]
    tower, features = map(np.asarray, run({"params": model.engine.params}, originals.PIXELS))
    measured(tower[0, 0, :4], tower_values, TOLERANCE)
    measured(features[0, 0, :4], values, TOLERANCE)
    measured([tower.sum(dtype=np.float64), features.sum(dtype=np.float64)], [tower_sum, total], 1e-3)
    measured(tower, reference.tower_out(originals.PIXELS).numpy(), TOLERANCE)
    if name == "v15":
        measured((tower.astype(np.float64) ** 2).sum(), 533.963255, 1e-3)


@pytest.mark.parametrize("name", PRINTED)
def test_the_reference_itself_gives_the_printed_numbers(name, tiny, measured):
    rows, _, printed, _ = PRINTED[name]
    logits = [tiny[name][1].logits(rows[0], originals.PIXELS[:1]), tiny[name][1].logits(rows[1])]
    measured([logits[b][t, :5] for b, t in printed], list(printed.values()), TOLERANCE)


@pytest.mark.parametrize("max_length", [4, 8])  # inside the image, and one token short
def test_rows_are_cut_as_the_original_cuts(max_length, tiny, tmp_path, measured):
    """`tokenizer_model_max_length` counts expanded positions and may cut inside an image (v1.5's `llava_arch.py`; quirk Q6)."""
    directory, reference = originals.save_v15(tmp_path, tokenizer_model_max_length=max_length)
    model = load(directory, dtype="float32")
    assert model.engine.max_prompt == max_length
    whole = tiny["v15"][0].config  # the program of the printed rows, whose shapes these have
    assert model.config == whole.replace(max_length=max_length)
    ids, _, segments = padded(V15_ROWS, V15_LABELS, "right")
    segments[0, max_length:] = 0
    ids[0, max_length:] = 0  # a part of an image stays
    logits = apply(llava.Llava(whole), model.engine.params, ids, slots(originals.PIXELS, 2), segment_ids=segments)
    measured(logits[0, :max_length], reference.logits(V15_ROWS[0], originals.PIXELS[:1], max_length), TOLERANCE)


@pytest.mark.parametrize("window", [4, 4096])
def test_sliding_window(window, tmp_path, measured):
    """Query i sees keys i-w < j <= i (transformers' MistralModel)."""
    directory, reference = originals.save_v15(tmp_path, sliding_window=window)
    model = load(directory, dtype="float32")
    row = [1, 5, IMAGE_TOKEN, 7, 9, 11, 20, 21, 22]
    logits = model.logits([expand_images(row, P)], originals.PIXELS[:1])
    measured(logits[0], reference.logits(row, originals.PIXELS[:1]), TOLERANCE)
    full = originals.Reference(originals.V15, originals.TOWER, reference.tensors).logits(row, originals.PIXELS[:1])
    assert (np.abs(logits[0] - full).max() > 1e-2) == (window < len(row) + P - 1)  # the window is felt where it is shorter


GREEDY = {"an image": ([1, 5, IMAGE_TOKEN, 7, 9, 11], 1), "text": ([1, 6, 8], 0), "two images": ([1, IMAGE_TOKEN, 4, IMAGE_TOKEN, 9], 2)}


@pytest.mark.parametrize("name", ["v15", "v15 with a window"])
def test_greedy_tokens(name, tiny, tmp_path):
    if name in tiny:
        model, reference = tiny[name]
    else:
        directory, reference = originals.save_v15(tmp_path, sliding_window=3)
        model = load(directory, dtype="float32")
    rows, counts = zip(*GREEDY.values())
    images = [list(originals.PIXELS[:count]) for count in counts]
    wanted = [reference.greedy(row, originals.PIXELS[:count], 12) for row, count in zip(rows, counts)]
    assert model.generate_tokens(rows, images, max_new_tokens=12) == wanted
    assert len({token for tokens in wanted for token in tokens}) > 6  # more than one answer, repeated


def test_stage_1_moves_the_projector_and_the_rows_of_two_tokens(tiny, measured):
    """B.8: the projector and the rows of <im_start> and <im_end> get the original's gradient, and nothing else gets any: of
    the second sample, which is text, the original let it leak into the rows of its tokens too (quirk Q12)."""
    from configs.pretrain import get_config
    from llavamed_jax.training.recipe import TABLE
    from llavamed_jax.training.state import merge, only_rows, partition, tokens_of
    model, reference = tiny["v1"]
    recipe = get_config("v1").trainable
    assert tokens_of(recipe) == ["<im_start>", "<im_end>"]
    trainable, frozen = partition(model.engine.params, recipe)
    assert set(trainable) == {"projector/linear_0/kernel", "projector/linear_0/bias", TABLE}
    assert "decoder/lm_head/kernel" in frozen
    ids, labels, segments = padded(V1_ROWS, V1_LABELS, "right")

    def mean_loss(params, pixels):
        logits = apply(llava.Llava(model.config), params, ids, pixels, segment_ids=segments)
        total, count = cross_entropy(logits, labels, segments)
        return total / count
    loss = only_rows(mean_loss, (START, END))
    found = jax.jit(jax.grad(lambda trainable, frozen: loss(merge(trainable, frozen), slots(originals.PIXELS, 2))))(trainable, frozen)
    assert np.flatnonzero(np.abs(found[TABLE]).max(axis=1)).tolist() == [START, END]
    for name, gradient in torch_stage_1_gradient(reference).items():
        measured(found[name], gradient, TOLERANCE, scale=np.abs(gradient).max())


def torch_stage_1_gradient(reference):
    """Of the mean loss over both rows, by autograd; of the embedding only the two rows are not detached."""
    projector = reference.projector
    features = projector(reference.tower_out(originals.PIXELS[:1]))
    table = reference.language.get_input_embeddings().weight
    losses = []
    for row, label in zip(V1_ROWS, V1_LABELS):
        ids, targets = expand_images(row, P, label)
        tokens = torch.tensor([max(i, 0) for i in ids])
        x = torch.where(((tokens == START) | (tokens == END))[:, None], table[tokens], table[tokens].detach()).clone()
        is_image = torch.tensor(ids) == IMAGE_TOKEN
        if is_image.any():
            x[is_image] = features[0]
        logits = reference.language(inputs_embeds=x[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(targets[1:]), ignore_index=IGNORE, reduction="sum"))
    count = sum(label != IGNORE for labels in V1_LABELS for label in labels[1:])
    kernel, bias, rows = torch.autograd.grad(sum(losses) / count, [projector.weight, projector.bias, table])
    return {"projector/linear_0/kernel": kernel.numpy().T, "projector/linear_0/bias": bias.numpy(),
            "decoder/embed_tokens/embedding": rows.numpy()}


# Ten models: what differs from hf.llava()'s Mistral with 4 query and 2 key heads.
RANDOM = {
    "GQA Mistral": dict(),
    "LLaMA": dict(architecture="llama", text=dict(num_key_value_heads=4, rms_norm_eps=1e-6)),
    "LLaMA, grouped, theta 5e5": dict(architecture="llama", text=dict(num_key_value_heads=1, rope_theta=5e5)),
    "window of 5": dict(text=dict(sliding_window=5)),
    "window of 20, theta 1e6": dict(text=dict(sliding_window=20, rope_theta=1e6)),
    "projector without bias": dict(multimodal_projector_bias=False),
    "class token kept": dict(vision_feature_select_strategy="full"),
    "class token kept, last layer, exact GELU, window of 5": dict(
        vision_feature_select_strategy="full", vision_feature_layer=-1, vision=dict(hidden_act="gelu"), text=dict(sliding_window=5)),
    "wide heads, tied": dict(text=dict(head_dim=32, tie_word_embeddings=True, num_hidden_layers=3)),
    "deep tower, first layers": dict(vision=dict(num_hidden_layers=5), vision_feature_layer=-4),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if "window" in name else pytest.mark.slow) for name in RANDOM])
def test_random_models_equal_transformers(name, tmp_path, measured):
    """Logits of text, an image, several images to 1e-4 of their scale; greedy tokens of the last exactly."""
    seed = list(RANDOM).index(name)
    theirs, cfg = hf.llava(**RANDOM[name], seed=seed)
    theirs.save_pretrained(tmp_path / "hf")
    ours = load(tmp_path / "hf", dtype="float32")
    rng = np.random.default_rng(seed)
    text = lambda n: rng.integers(3, 90, n).tolist()
    image = [IMAGE_TOKEN] * cfg.tokens_per_image
    rows = [[1] + text(11), [1, *text(3), *image, *text(9)], [1, *image, *text(2), *image, *text(5)]]
    pixels = [hf.images(count, seed=seed) for count in range(3)]
    T = max(map(len, rows))
    found = ours.logits([row + [PAD_TOKEN] * (T - len(row)) for row in rows], np.concatenate(pixels))
    for row, images, logits in zip(rows, pixels, found):
        images = images if len(images) else None
        wanted = hf.torch_logits(theirs, [row], images)[0]
        measured(logits[: len(row)], wanted, TOLERANCE, scale=np.abs(wanted).max())
    ids = torch.tensor([[hf.IMAGE_ID if i == IMAGE_TOKEN else i for i in row]])
    greedy = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10,
                             pixel_values=torch.tensor(images).permute(0, 3, 1, 2))
    assert ours.generate_tokens([row], [list(images)], max_new_tokens=10) == [greedy[0, len(row):].tolist()]


def test_a_random_model_with_a_linear_projector_equals_torch(tmp_path, measured):
    """transformers' llava has no linear projector; the reference is torch code of these tests' own."""
    rng = np.random.default_rng(3)
    config = originals.V1 | dict(num_key_value_heads=2, rms_norm_eps=1e-5)
    shapes = originals.text_shapes(config) | originals.projector_shapes(config)

    def draw(name, shape):
        values = rng.standard_normal(shape, np.float32)
        if "norm" in name:
            return 1 + 0.3 * values
        return values if "embed" in name else 0.2 * values if len(shape) == 1 else values * np.float32(shape[1] ** -0.5)
    tensors = {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}
    tower = originals.filled(originals.clip_shapes(originals.V1_TOWER, "vision_model."), 0.05)
    originals.write(tmp_path / "tiny-tower", originals.V1_TOWER, tower)
    model = load(originals.write(tmp_path / "v1", config, tensors), dtype="float32")
    reference = originals.Reference(config, originals.V1_TOWER, tensors | tower)
    rows = [[1, 5, 9, 30], [1, 62, IMAGE_TOKEN, 63, 8, 9], [1, 4, IMAGE_TOKEN, 6, IMAGE_TOKEN, 7]]
    pixels = [originals.PIXELS[:count] for count in range(3)]
    for row, images in zip(rows, pixels):
        wanted = reference.logits(row, images)
        found = model.logits([expand_images(row, P)], images if len(images) else None)[0]
        measured(found, wanted, TOLERANCE, scale=np.abs(wanted).max())
    wanted = [reference.greedy(row, images, 10) for row, images in zip(rows, pixels)]
    assert model.generate_tokens(rows, list(map(list, pixels)), max_new_tokens=10) == wanted


_FREQUENCIES = """
import numpy as np, sys, torch
for line in sys.stdin.read().split():
    head_dim, theta = int(line.split(",")[0]), float(line.split(",")[1])
    sys.stdout.buffer.write((1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))).numpy().tobytes())
"""


def test_rope_frequencies_are_torchs_bit_for_bit_with_the_c_librarys_power():
    """torch's vectorised power differs by a last bit here and there, elsewhere on AVX2 than on AVX-512; its plain one does not."""
    grid = [(head_dim, theta) for head_dim in (8, 16, 32, 48, 64, 80, 96, 128, 160, 256) for theta in (1e4, 2e4, 1e5, 5e5, 1e6, 1e7)]
    done = subprocess.run([sys.executable, "-c", _FREQUENCIES], input="\n".join(f"{h},{t}" for h, t in grid).encode(), check=True,
                          stdout=subprocess.PIPE, env=os.environ | {"ATEN_CPU_CAPABILITY": "default"})
    assert done.stdout == b"".join(layers.rope_frequencies(head_dim, theta).tobytes() for head_dim, theta in grid)
