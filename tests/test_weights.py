"""Published vision encoders: files in the layouts of their authors against the plain arithmetic of the encoder."""
import argparse
import json
import math
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model import VisionEncoder
from support import weights
from support.annotations import InputError

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "internvideo2"      # absent in CI
V, LAYERS, HEADS, MLP = 128, 2, 2, 512                  # two heads: 128 / 64


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are slower with threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ plain arithmetic
def bicubic(n: int, m: int) -> torch.Tensor:
    """(m, n): Keys' cubic kernel with a = -0.75 between the centres of n and m cells, edges repeated."""
    matrix = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        x = (i + 0.5) * n / m - 0.5
        for k in range(math.floor(x) - 1, math.floor(x) + 3):
            d = abs(x - k)
            weight = 1.25 * d ** 3 - 2.25 * d ** 2 + 1 if d <= 1 else -0.75 * (d ** 3 - 5 * d ** 2 + 8 * d - 4)
            matrix[i, min(max(k, 0), n - 1)] += weight
    return matrix


def resize(grid: torch.Tensor, m: int) -> torch.Tensor:
    """(n * n, V) positions -> (m * m, V)."""
    n = math.isqrt(len(grid))
    if n == m:
        return grid
    matrix = bicubic(n, m)
    return torch.einsum("ih,jw,hwv->ijv", matrix, matrix, grid.double().view(n, n, -1)).flatten(0, 1).float()


def sinusoid(p: int, j: int) -> float:
    angle = p / 10000 ** (2 * (j // 2) / V)
    return math.cos(angle) if j % 2 else math.sin(angle)


@cache
def videomae_positions(side: int) -> torch.Tensor:
    """(8 * side * side, V): the sinusoids of 8 x 14 x 14 tubelets, each time step resized."""
    steps = [torch.tensor([[sinusoid(t * 196 + p, j) for j in range(V)] for p in range(196)]) for t in range(8)]
    return torch.cat([resize(step, side) for step in steps])


def attention(q, k, v):
    """q, k, v (N, V) -> (N, V)."""
    q, k, v = (x.view(len(x), HEADS, -1).transpose(0, 1) for x in (q, k, v))
    return ((q @ k.transpose(1, 2)) / math.sqrt(V // HEADS)).softmax(-1).matmul(v).transpose(0, 1).flatten(1)


def mlp(w, block, x, approximate="none"):
    x = F.gelu(F.linear(x, w[f"{block}.mlp.fc1.weight"], w[f"{block}.mlp.fc1.bias"]), approximate=approximate)
    return F.linear(x, w[f"{block}.mlp.fc2.weight"], w[f"{block}.mlp.fc2.bias"])


def normalised(frames):
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (frames / 255 - mean) / std


def plain_videomae(w, frames):
    """16 frames (16, 3, H, H) uint8 -> (16, V), from tensors in the original layout."""
    def norm(x, name):
        return F.layer_norm(x, (V,), w[name + ".weight"], w[name + ".bias"], 1e-6)
    patches = F.conv3d(normalised(frames).transpose(0, 1)[None], w["patch_embed.proj.weight"],
                       w["patch_embed.proj.bias"], stride=(2, 16, 16))[0]
    x = patches.flatten(1).T + videomae_positions(frames.size(2) // 16)
    for i in range(LAYERS):
        block = f"blocks.{i}"
        bias = torch.cat([w[block + ".attn.q_bias"], torch.zeros(V), w[block + ".attn.v_bias"]])
        qkv = F.linear(norm(x, block + ".norm1"), w[block + ".attn.qkv.weight"], bias)
        x = x + F.linear(attention(*qkv.split(V, 1)), w[block + ".attn.proj.weight"], w[block + ".attn.proj.bias"])
        x = x + mlp(w, block, norm(x, block + ".norm2"))
    s = x.view(8, -1, V).mean(1)
    before, after = torch.cat([s[:1], s[:-1]]), torch.cat([s[1:], s[-1:]])           # linear between centres of steps
    return torch.stack([0.75 * s + 0.25 * before, 0.75 * s + 0.25 * after], 1).flatten(0, 1)


def plain_internvit(w, frame, big=False):
    """One frame (3, H, H) uint8 -> (V,), from tensors in the original layout; big: as the 6B is built."""
    def norm(x, name):
        if big:
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"]
        return F.layer_norm(x, (V,), w[name + ".weight"], w[name + ".bias"], 1e-6)
    patches = F.conv2d(normalised(frame)[None], w["embeddings.patch_embedding.weight"],
                       w["embeddings.patch_embedding.bias"], stride=14)[0]
    positions = w["embeddings.position_embedding"][0]
    x = torch.cat([w["embeddings.class_embedding"][0] + positions[:1],
                   patches.flatten(1).T + resize(positions[1:], frame.size(1) // 14)])
    for i in range(LAYERS):
        block = f"encoder.layers.{i}"
        q, k, v = F.linear(norm(x, block + ".norm1"), w[block + ".attn.qkv.weight"],
                           w.get(block + ".attn.qkv.bias")).split(V, 1)
        if big:
            q, k = norm(q, block + ".attn.q_norm"), norm(k, block + ".attn.k_norm")
        out = F.linear(attention(q, k, v), w[block + ".attn.proj.weight"], w[block + ".attn.proj.bias"])
        x = x + w[block + ".ls1"] * out
        x = x + w[block + ".ls2"] * mlp(w, block, norm(x, block + ".norm2"))
    return x[1:].mean(0)


def plain_internvideo2(w, frames):
    """8 frames (8, 3, H, H) uint8 -> (8, V), from tensors in the original layout."""
    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"]
    patches = F.conv3d(normalised(frames).transpose(0, 1)[None], w["patch_embed.proj.weight"],
                       w["patch_embed.proj.bias"], stride=(1, 14, 14))[0]
    first, *grids = w["pos_embed"][0].split([1] + [(w["pos_embed"].size(1) - 1) // 8] * 8)
    x = torch.cat([w["cls_token"][0] + first,
                   patches.flatten(1).T + torch.cat([resize(grid, frames.size(2) // 14) for grid in grids])])
    for i in range(LAYERS):
        block = f"blocks.{i}"
        q, k, v = F.linear(norm(x, block + ".norm1"), w[block + ".attn.qkv.weight"]).split(V, 1)
        out = attention(norm(q, block + ".attn.q_norm"), norm(k, block + ".attn.k_norm"), v)
        x = x + w[block + ".ls1.gamma"] * F.linear(out, w[block + ".attn.proj.weight"], w[block + ".attn.proj.bias"])
        x = x + w[block + ".ls2.gamma"] * mlp(w, block, norm(x, block + ".norm2"), "tanh")
    return x[1:].view(8, -1, V).mean(1)


# ------------------------------------------------------------------------------------------------ files
def draw(shapes: dict) -> dict:
    """Random tensors; norms around 1, everything else, biases too, far enough from 0 to be missed."""
    generator = torch.Generator().manual_seed(0)
    scale = {name: 0.2 if len(shape) == 1 or "pos" in name else shape[1:].numel() ** -0.5
             for name, shape in shapes.items()}
    return {name: torch.randn(shape, generator=generator) * scale[name]
            + ("norm" in name and name.endswith("weight")) for name, shape in shapes.items()}


def block_shapes(block: str) -> dict:
    """What both families have in a block."""
    linear = {"attn.proj": (V, V), "mlp.fc1": (MLP, V), "mlp.fc2": (V, MLP)}
    norm = {f"{block}.{name}.{kind}": (V,) for name in ("norm1", "norm2") for kind in ("weight", "bias")}
    return norm | {f"{block}.attn.qkv.weight": (3 * V, V)} | {
        f"{block}.{name}.{kind}": shape if kind == "weight" else shape[:1]
        for name, shape in linear.items() for kind in ("weight", "bias")}


def videomae_file() -> dict:
    """Tensors of a VideoMAE in the original layout."""
    shapes = {"patch_embed.proj.weight": (V, 3, 2, 16, 16), "patch_embed.proj.bias": (V,)}
    for i in range(LAYERS):
        shapes |= block_shapes(f"blocks.{i}") | {f"blocks.{i}.attn.{x}_bias": (V,) for x in "qv"}
    return draw({name: torch.Size(shape) for name, shape in shapes.items()})


def internvit_file(big=False) -> dict:
    """Tensors of an InternViT of 42 pixels in the original layout."""
    shapes = {"embeddings.class_embedding": (1, 1, V), "embeddings.position_embedding": (1, 10, V),
              "embeddings.patch_embedding.weight": (V, 3, 14, 14), "embeddings.patch_embedding.bias": (V,)}
    for i in range(LAYERS):
        block = f"encoder.layers.{i}"
        shapes |= block_shapes(block) | {f"{block}.ls1": (V,), f"{block}.ls2": (V,)}
        if big:
            shapes |= {f"{block}.attn.{x}_norm.weight": (V,) for x in "qk"}
            shapes = {name: s for name, s in shapes.items() if ".norm" not in name or name.endswith("weight")}
        else:
            shapes[f"{block}.attn.qkv.bias"] = (3 * V,)
    return draw({name: torch.Size(shape) for name, shape in shapes.items()})


def internvideo2_file() -> dict:
    """Tensors of an InternVideo2 of 42 pixels in the original layout."""
    shapes = {"cls_token": (1, 1, V), "pos_embed": (1, 73, V), "patch_embed.proj.weight": (V, 3, 1, 14, 14),
              "patch_embed.proj.bias": (V,)}
    for i in range(LAYERS):
        own = ("attn.q_norm.weight", "attn.k_norm.weight", "ls1.gamma", "ls2.gamma")
        shapes |= block_shapes(f"blocks.{i}") | {f"blocks.{i}.{name}": (V,) for name in own}
    return draw({name: torch.Size(s) for name, s in shapes.items() if ".norm" not in name or name.endswith("weight")})


def native_internvit(w: dict) -> dict:
    """The original layout -> names as in OpenGVLab/InternVL3-1B-hf."""
    names = {"class_embedding": "cls_token", "position_embedding": "position_embeddings",
             "patch_embedding": "patch_embeddings.projection", "encoder.layers": "encoder.layer",
             "attn.proj": "attention.projection_layer", "ls1": "lambda_1", "ls2": "lambda_2",
             "norm1": "layernorm_before", "norm2": "layernorm_after"}
    out = {}
    for name, tensor in w.items():
        for theirs, native in names.items():
            name = name.replace(theirs, native)
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", tensor.split(V)):
                out[name.replace("attn.qkv", f"attention.{letter}_proj")] = part.clone()
        else:
            out[name] = tensor
    return out


def folder(path, config: dict, tensors: dict):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


SIZES = dict(hidden_size=V, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=MLP)
NATIVE = SIZES | dict(model_type="internvl_vision", image_size=[42, 42], patch_size=[14, 14], attention_bias=True,
                      norm_type="layer_norm", layer_norm_eps=1e-6, use_qk_norm=False, hidden_act="gelu")
ORIGINAL = SIZES | dict(model_type="intern_vit_6b", image_size=42, patch_size=14, qkv_bias=True, drop_path_rate=0.1,
                        norm_type="layer_norm", layer_norm_eps=1e-6, qk_normalization=False, use_flash_attn=True,
                        auto_map={"AutoModel": "modeling_intern_vit.InternVisionModel"})
REST = {"language_model.model.norm.weight": torch.ones(4), "mlp1.0.weight": torch.ones(4)}
NATIVE_REST = {"language_model.model.norm.weight": torch.ones(4), "multi_modal_projector.linear_1.bias": torch.ones(4)}


def under(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def frames_of(n: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def features(path, frames) -> tuple:
    """(features (n, V), unused names) of a published encoder."""
    encoder = VisionEncoder(weights.vision_config(path, frames.size(-1))).eval()
    unused = encoder.load(path)
    with torch.no_grad():
        return encoder(frames[None], torch.ones(1, len(frames), dtype=torch.bool))[0], unused


def assert_same(path, frames, expected) -> list:
    found, unused = features(path, frames)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    return unused


# ------------------------------------------------------------------------------------------------ VideoMAE
PRETRAINING = {"decoder.blocks.0.attn.qkv.weight": torch.ones(6, 2), "decoder.norm.bias": torch.ones(2),
               "encoder_to_decoder.weight": torch.ones(2, 2), "mask_token": torch.ones(1, 1, 2)}
CLASSIFIER = {"fc_norm.weight": torch.ones(V), "fc_norm.bias": torch.ones(V), "head.weight": torch.ones(3, V)}


def of_mmaction2(w: dict) -> dict:
    """The original layout -> names as in the files of mmaction2 and OpenTAD."""
    names = {"patch_embed.proj": "patch_embed.projection", "mlp.fc1": "mlp.layers.0.0", "mlp.fc2": "mlp.layers.1"}
    for theirs, ours in names.items():
        w = {name.replace(theirs, ours): tensor for name, tensor in w.items()}
    return under("backbone.", w)


def with_one_bias(w: dict) -> dict:
    """Biases of query, key and value in one tensor; that of the key changes nothing."""
    rest = {name: tensor for name, tensor in w.items() if not name.endswith(("q_bias", "v_bias"))}
    return rest | {f"blocks.{i}.attn.qkv.bias": torch.cat([w[f"blocks.{i}.attn.q_bias"], torch.ones(V), w[f"blocks.{i}.attn.v_bias"]])
                   for i in range(LAYERS)}


MM_HEAD = {"cls_head.fc_cls.weight": torch.ones(3, V), "cls_head.fc_cls.bias": torch.ones(3), "backbone.fc_norm.bias": torch.ones(V)}
SIDE = {"args": argparse.Namespace(lr=0.1, path=Path("a/b")), "best": np.float64(0.5), "epoch": np.int64(3),
        "random": ("MT19937", np.arange(624, dtype=np.uint32), 624), "on": np.bool_(True), "names": np.array(["a"])}


@pytest.mark.parametrize("wrap", [
    lambda w: (w, []),
    lambda w: ({"module": w | CLASSIFIER}, sorted(CLASSIFIER)),                      # as the distilled v2 files
    lambda w: ({"model": w} | SIDE, []),
    lambda w: ({"model_ema": with_one_bias(w)}, []),
    lambda w: ({"state_dict": of_mmaction2(w) | MM_HEAD, "meta": {"epoch": 3}}, sorted(MM_HEAD)),
    lambda w: ({"state_dict": of_mmaction2(with_one_bias(w))}, []),
    lambda w: ({"model": under("encoder.", w | {"norm.bias": torch.ones(V)}) | PRETRAINING},
               sorted([*PRETRAINING, "encoder.norm.bias"])),
], ids=["bare", "module", "model", "one bias", "mmaction2", "mmaction2, one bias", "pre-training"])
def test_original_videomae_gives_the_features_of_plain_arithmetic(tmp_path, wrap):
    w, frames = videomae_file(), frames_of(16, 48)
    content, unused = wrap(w)
    torch.save(content, tmp_path / "vit.pth")
    assert sorted(assert_same(tmp_path / "vit.pth", frames, plain_videomae(w, frames))) == unused
    assert weights.vision_config(tmp_path / "vit.pth", 48)["layer_norm_eps"] == 1e-6


def test_original_videomae_at_its_own_image_size(tmp_path):
    w, frames = videomae_file(), frames_of(16, 224)
    torch.save(w, tmp_path / "vit.pth")
    assert_same(tmp_path / "vit.pth", frames, plain_videomae(w, frames))


def test_hugging_face_videomae_as_on_the_hub_keeps_its_biases(tmp_path):
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks": "encoder.layer",
             "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "attn.q_bias": "attention.attention.q_bias",
             "attn.v_bias": "attention.attention.v_bias"}
    w, hub = videomae_file(), {}
    for name, tensor in w.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        parts = zip(("query", "key", "value"), tensor.split(V)) if "attn.qkv" in name else [("", tensor)]
        hub |= {"videomae." + name.replace("attn.qkv", f"attention.attention.{p}"): t.clone() for p, t in parts}
    rest = {"classifier.bias": torch.ones(3), "fc_norm.bias": torch.ones(V)}
    config = SIZES | dict(model_type="videomae", image_size=224, patch_size=16, num_frames=16, tubelet_size=2,
                          layer_norm_eps=1e-6, qkv_bias=True, hidden_act="gelu")
    path, frames = folder(tmp_path / "hub", config, hub | rest), frames_of(16, 48)
    assert sorted(assert_same(path, frames, plain_videomae(w, frames))) == sorted(rest)


def test_hugging_face_videomae_as_transformers_saves_it(tmp_path):
    from transformers import VideoMAEConfig, VideoMAEForPreTraining
    torch.manual_seed(0)
    config = VideoMAEConfig(**SIZES, image_size=32, num_frames=8, decoder_num_hidden_layers=1, layer_norm_eps=1e-5,
                            decoder_hidden_size=32, decoder_num_attention_heads=2, decoder_intermediate_size=32)
    model = VideoMAEForPreTraining(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "hf")
    encoder = VisionEncoder(weights.vision_config(tmp_path / "hf", 32)).eval()
    unused, frames = encoder.load(tmp_path / "hf"), frames_of(8, 32)
    assert "mask_token" in unused and "encoder_to_decoder.weight" in unused
    with torch.no_grad():
        tokens = model.videomae(normalised(frames)[None]).last_hidden_state[0]
        steps = encoder(frames[None], torch.ones(1, 8, dtype=torch.bool))[0]
    assert encoder.backbone.config.layer_norm_eps == 1e-5 and encoder.clip == 8
    torch.testing.assert_close(steps[0], tokens.view(4, 4, V).mean(1)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("width, layers, heads, hidden, patch", [
    (384, 12, 6, 1536, 16), (768, 12, 12, 3072, 16), (1024, 24, 16, 4096, 16), (1280, 32, 16, 5120, 16),
    (1408, 40, 16, 6144, 14), (192, 3, 3, 600, 16), (48, 1, 1, 96, 16)])
def test_sizes_of_a_videomae_file(tmp_path, width, layers, heads, hidden, patch):
    tensors = {f"blocks.{i}.norm1.weight": torch.ones(width) for i in range(layers)}
    tensors |= {"patch_embed.proj.weight": torch.ones(width, 3, 2, patch, patch),
                "blocks.0.mlp.fc1.bias": torch.ones(hidden)}
    torch.save({"module": of_mmaction2(tensors) if width == 192 else tensors}, tmp_path / "vit.pth")
    config = weights.vision_config(tmp_path / "vit.pth", 14 * patch)
    assert config == dict(kind="videomae", pretrained_image_size=224, image_size=14 * patch, patch_size=patch,
                          tubelet_size=2, num_frames=16, hidden_size=width, num_hidden_layers=layers,
                          num_attention_heads=heads, intermediate_size=hidden, layer_norm_eps=1e-6)


def test_positions_in_a_videomae_file_have_to_be_the_sinusoids(tmp_path):
    w, frames = videomae_file(), frames_of(16, 48)
    torch.save(w | {"pos_embed": videomae_positions(14)[None]}, tmp_path / "same.pth")
    assert assert_same(tmp_path / "same.pth", frames, plain_videomae(w, frames)) == ["pos_embed"]
    torch.save(w | {"pos_embed": torch.ones(1, 1568, V)}, tmp_path / "learned.pth")
    with pytest.raises(InputError, match="pos_embed.*learned"):
        features(tmp_path / "learned.pth", frames)


# ------------------------------------------------------------------------------------------------ InternViT
@pytest.mark.parametrize("config, convert, rest", [
    (ORIGINAL, dict, {}),
    ({"model_type": "internvl_chat", "vision_config": ORIGINAL, "llm_config": {}}, lambda w: under("vision_model.", w),
     REST),
    (NATIVE, native_internvit, {}),
    ({"model_type": "internvl", "vision_config": NATIVE, "text_config": {}},
     lambda w: under("vision_tower.", native_internvit(w)), NATIVE_REST),
    ({"model_type": "internvl", "vision_config": NATIVE},
     lambda w: under("model.vision_tower.", native_internvit(w)), under("model.", NATIVE_REST)),
], ids=["original", "original chat", "native", "native whole", "native model."])
@pytest.mark.parametrize("side", [42, 70])
def test_internvit_gives_the_features_of_plain_arithmetic(tmp_path, config, convert, rest, side):
    w, frames = internvit_file(), frames_of(3, side)
    path = folder(tmp_path / "vit", config, convert(w) | rest)
    unused = assert_same(path, frames, torch.stack([plain_internvit(w, frame) for frame in frames]))
    assert sorted(unused) == sorted(rest)


def test_internvit_6b_has_other_norms_which_an_old_config_leaves_out(tmp_path):
    w, frames = internvit_file(big=True), frames_of(2, 42)
    config = {k: v for k, v in ORIGINAL.items() if k not in ("norm_type", "qkv_bias", "qk_normalization")}
    path = folder(tmp_path / "6b", config, w)
    assert_same(path, frames, torch.stack([plain_internvit(w, frame, big=True) for frame in frames]))


def test_weights_in_several_files(tmp_path):
    w, frames = internvit_file(), frames_of(2, 42)
    path, names = folder(tmp_path / "vit", ORIGINAL, {}), sorted(w)
    (path / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: w[name] for name in part}, path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = torch.stack([plain_internvit(w, frame) for frame in frames])
    assert_same(path, frames, expected)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=f"expected a tensor {names[9]} of shape .*, found none; the file is incomplete"):
        features(path, frames)
    (path / "model-00001-of-00002.safetensors").unlink()
    torch.save(w, path / "pytorch_model.bin")
    assert_same(path, frames, expected)


def test_internvit_frames_do_not_see_each_other(tmp_path):
    path, frames = folder(tmp_path / "vit", ORIGINAL, internvit_file()), frames_of(70, 28)
    encoder = VisionEncoder(weights.vision_config(path, 28)).eval()
    encoder.load(path)
    assert encoder.clip == 1 and encoder.dim == V
    batch = torch.stack([frames[:66], torch.cat([frames[66:], torch.zeros(62, 3, 28, 28, dtype=torch.uint8)])])
    with torch.no_grad():
        both = encoder(batch, torch.arange(66)[None] < torch.tensor([[66], [4]]))
        for b, i in ((0, 0), (0, 63), (0, 64), (0, 65), (1, 0), (1, 3)):
            alone = encoder(batch[b, i][None, None], torch.ones(1, 1, dtype=torch.bool))[0, 0]
            torch.testing.assert_close(both[b, i], alone, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ InternVideo2
PROJECTOR = {"clip_projector.norm1_q.weight": torch.ones(V), "clip_projector.cross_attn.k_bias": torch.ones(V)}
DISTILLED = PROJECTOR | {"clip_pos_embed": torch.ones(1, 73, V), "clip_decoder.0.head.0.weight": torch.ones(V, V),
                         "final_clip_decoder.norm.bias": torch.ones(V), "mae_decoder.0.norm.bias": torch.ones(V),
                         "mae_pos_embed": torch.ones(1, 72, V), "img_pos_embed": torch.ones(1, 10, V)}
CLIP = {"vision_align.0.weight": torch.ones(V), "text_encoder.model.norm.weight": torch.ones(4), "temp": torch.ones(1)}


@pytest.mark.parametrize("wrap", [
    lambda w: (w, []),
    lambda w: ({"module": w | PROJECTOR | CLASSIFIER}, sorted(PROJECTOR | CLASSIFIER)),
    lambda w: ({"model": under("backbone.", w | DISTILLED)}, sorted(under("backbone.", DISTILLED))),
    lambda w: ({"module": under("vision_encoder.", w | PROJECTOR) | CLIP}, sorted(under("vision_encoder.", PROJECTOR) | CLIP)),
], ids=["bare", "fine-tuned", "distilled", "clip"])
@pytest.mark.parametrize("side", [42, 70])
def test_internvideo2_gives_the_features_of_plain_arithmetic(tmp_path, wrap, side):
    w, frames = internvideo2_file(), frames_of(16, side)
    content, unused = wrap(w)
    torch.save(content, tmp_path / "b14.bin")
    expected = torch.cat([plain_internvideo2(w, clip) for clip in frames.split(8)])
    assert sorted(assert_same(tmp_path / "b14.bin", frames, expected)) == unused


def test_internvideo2_in_halves_is_read_as_float32(tmp_path):
    w, frames = {name: tensor.bfloat16() for name, tensor in internvideo2_file().items()}, frames_of(8, 42)
    torch.save({"module": w}, tmp_path / "b14.pth")
    assert_same(tmp_path / "b14.pth", frames, plain_internvideo2({name: t.float() for name, t in w.items()}, frames))


@pytest.mark.parametrize("width, layers, heads, count", [      # counts of the authors' code, for 8 frames of 224 pixels
    (384, 12, 6, 22_302_336), (768, 12, 12, 87_072_000), (1024, 24, 16, 304_987_136)], ids="SBL")
def test_sizes_of_an_internvideo2_file(tmp_path, width, layers, heads, count):
    def ones(*shape):
        return torch.ones(1).expand(shape)                     # takes no space in the file
    tensors = {f"blocks.{i}.norm1.weight": ones(width) for i in range(layers)}
    tensors |= {"patch_embed.proj.weight": ones(width, 3, 1, 14, 14), "pos_embed": ones(1, 2049, width),
                "blocks.0.mlp.fc1.bias": ones(4 * width)}
    torch.save({"module": tensors}, tmp_path / "b14.pth")
    config = weights.vision_config(tmp_path / "b14.pth", 168)
    assert config == dict(
        kind="internvideo2", pretrained_image_size=224, image_size=168, patch_size=14, tubelet_size=1,
        num_frames=8, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        layer_norm_eps=1e-6, norm_type="rms_norm", use_qk_norm=True, attention_bias=False, hidden_act="gelu_pytorch_tanh")
    with torch.device("meta"):
        encoder, clip, tubelet = weights.build_encoder(config)
    assert (clip, tubelet) == (8, 1) and sum(p.numel() for p in encoder.parameters()) == count
    with pytest.raises(InputError, match="--image-size: expected a multiple of 14, found 160; .* has patches of 14 pixels: take 154 or 168"):
        weights.vision_config(tmp_path / "b14.pth", 160)


@pytest.mark.parametrize("name, change", [
    ("cls_token", None), ("pos_embed", None), ("patch_embed.proj.bias", None), ("blocks.1.ls2.gamma", None),
    ("blocks.0.attn.q_norm.weight", None), ("blocks.0.mlp.fc1.bias", None), ("blocks.0.norm1.bias", (V,)),
    ("blocks.0.attn.qkv.bias", (3 * V,)), ("blocks.1.attn.qkv.weight", (2 * V, V)), ("blocks.1.ls1.gamma", (1,)),
    ("pos_embed", (1, 72, V)), ("pos_embed", (1, 0, V)), ("pos_embed", (1, 1, V)), ("pos_embed", (73, V)),
    ("patch_embed.proj.weight", (V, 3, 14, 14))])
def test_an_internvideo2_file_with_a_wrong_tensor_is_refused_by_its_name(tmp_path, name, change):
    w = internvideo2_file()
    w.pop(name, None)
    if change:
        w[name] = torch.ones(change)
    torch.save({"module": under("backbone.", w)}, tmp_path / "b14.pth")
    with pytest.raises(InputError, match=f"b14.pth: .*backbone.{name}.*") as error:
        features(tmp_path / "b14.pth", frames_of(8, 42))
    if change is None:
        assert "found none" in str(error.value)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no outputs of the authors' code at {GOLDEN}")
@pytest.mark.parametrize("name, frames, pretrained", [("a", 4, 42), ("b", 8, 56)])
def test_internvideo2_gives_the_outputs_of_the_authors_code(tmp_path, name, frames, pretrained):
    golden = {key: torch.from_numpy(array) for key, array in np.load(GOLDEN / f"internvideo2_small_{name}.npz").items()
              if array.dtype == np.float32}
    torch.save({key[3:]: tensor for key, tensor in golden.items() if key.startswith("sd.")}, tmp_path / "b14.pth")
    torch.save(internvideo2_file(), tmp_path / "other.pth")
    config = weights.vision_config(tmp_path / "other.pth", 42) | dict(           # 4 frames, narrow heads: not as published
        hidden_size=48, intermediate_size=192, num_frames=frames,
        pretrained_image_size=pretrained, num_hidden_layers=3 if name == "a" else 2, num_attention_heads=4 if name == "a" else 3)
    encoder = VisionEncoder(config).eval()
    assert len(encoder.load(tmp_path / "b14.pth")) == 18
    with torch.no_grad():
        found = encoder.each_clip(golden["x"].transpose(1, 2))
    torch.testing.assert_close(found, golden["out_tanh.frames"], atol=2e-5, rtol=0)
    for key in golden:
        if key.startswith("pos_interp.t"):                                       # pos_interp.t{frames}_g{side}
            steps, side = map(int, key.removeprefix("pos_interp.t").split("_g"))
            if steps != 8:
                continue                                                         # clips have the 8 frames of training
            found = weights.resize_positions(golden["pos_pretrained"][:, 1:], steps, side)
            torch.testing.assert_close(found, golden[key][:, 1:], atol=2e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ all
def encoders(tmp_path):
    """(config, path) of one published encoder per kind, at another image size than its own."""
    torch.save(videomae_file(), tmp_path / "vit.pth")
    path = folder(tmp_path / "internvit", NATIVE, native_internvit(internvit_file()))
    torch.save(internvideo2_file(), tmp_path / "b14.pth")
    return [(weights.vision_config(tmp_path / "vit.pth", 48), tmp_path / "vit.pth"),
            (weights.vision_config(path, 28), path), (weights.vision_config(tmp_path / "b14.pth", 28), tmp_path / "b14.pth")]


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["videomae", "internvit", "internvideo2"])
def test_checkpointing_recomputes_and_changes_no_output_or_gradient(tmp_path, kind):
    config, path = encoders(tmp_path)[kind]
    encoder = VisionEncoder(config).train()
    encoder.load(path)
    encoder.backbone.embeddings.requires_grad_(False)      # reentrant checkpointing would lose the gradients then
    frames, calls, results = frames_of(16, config["image_size"])[None], [], []
    norm = encoder.backbone.encoder.layer[0].layernorm_after
    norm.register_forward_hook(lambda *args: calls.append(1))
    for on, expected in ((False, 1), (True, 2)):
        if on:
            encoder.checkpointing()
        encoder.zero_grad()
        calls.clear()
        out = encoder(frames, torch.ones(1, 16, dtype=torch.bool))
        out.square().sum().backward()
        assert len(calls) == expected
        results.append([out.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)])
    assert len(results[1]) > 20 and all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["videomae", "internvit", "internvideo2"])
def test_an_encoder_is_rebuilt_from_its_config_alone(tmp_path, kind):
    config, path = encoders(tmp_path)[kind]
    first, again = VisionEncoder(config).eval(), VisionEncoder(json.loads(json.dumps(config))).eval()
    first.load(path)
    again.load_state_dict(first.state_dict())
    if kind == 0:
        torch.testing.assert_close(again.backbone.embeddings.position_embeddings[0], videomae_positions(3))
    frames, mask = frames_of(16, config["image_size"])[None], torch.ones(1, 16, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(first(frames, mask), again(frames, mask))


def test_positions_at_160_pixels():
    config = SIZES | dict(image_size=160, pretrained_image_size=224, num_hidden_layers=1)
    positions = VisionEncoder(config).backbone.embeddings.position_embeddings
    torch.testing.assert_close(positions[0], videomae_positions(10))


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("blocks.1.attn.v_bias"), r"blocks\.1\.attn\.v_bias of shape \(128,\), found none"),
    (lambda w: w.pop("blocks.0.mlp.fc1.bias"), r"blocks\.0\.mlp\.fc1\.bias of shape \(512,\), found none"),
    (lambda w: w.update({"blocks.0.gamma_1": torch.ones(V)}), r"found blocks\.0\.gamma_1"),
    (lambda w: w.update({"blocks.0.mlp.fc2.weight": torch.ones(V, 3)}),
     r"blocks\.0\.mlp\.fc2\.weight of shape \(128, 512\), found shape \(128, 3\)"),
    (lambda w: w.update({"blocks.1.attn.qkv.weight": torch.ones(2 * V, V)}),
     r"blocks\.1\.attn\.qkv\.weight of shape \(384, 128\), found shape \(256, 128\)"),
    (lambda w: w.update({"patch_embed.proj.weight": torch.ones(V, 3, 16, 16)}), "expected 5 dimensions"),
    (lambda w: w.pop("patch_embed.proj.weight"), r"expected a tensor patch_embed\.proj\.weight"),
    (lambda w: w.update({"patch_embed.proj.bias": 1.0}), "expected named tensors"),
])
def test_a_file_that_is_not_the_encoder_is_named_with_its_tensor(tmp_path, change, message):
    w = videomae_file()
    change(w)
    torch.save(w, tmp_path / "vit.pth")
    with pytest.raises(InputError, match=message) as error:
        features(tmp_path / "vit.pth", frames_of(16, 48))
    assert str(tmp_path / "vit.pth") in str(error.value)


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("vision_model.encoder.layers.1.ls2"), r"vision_model\.encoder\.layers\.1\.ls2"),
    (lambda w: w.update({"vision_model.encoder.layers.0.ls3": torch.ones(V)}), r"found vision_model\..*ls3"),
    (lambda w: w.update({"vision_model.embeddings.position_embedding": torch.ones(1, 5, V)}),
     r"position_embedding of shape \(1, 10, 128\), found shape \(1, 5, 128\)"),
])
def test_a_folder_that_is_not_the_encoder_is_named_with_its_tensor(tmp_path, change, message):
    tensors = under("vision_model.", internvit_file())
    change(tensors)
    path = folder(tmp_path / "chat", {"model_type": "internvl_chat", "vision_config": ORIGINAL}, tensors)
    with pytest.raises(InputError, match=message):
        features(path, frames_of(1, 42))


def test_weights_of_another_kind_are_refused(tmp_path):
    (config, _), (_, path), _ = encoders(tmp_path)
    with pytest.raises(InputError, match="encoder.layer.0.attention.attention.query|embeddings.patch_embeddings"):
        VisionEncoder(config).load(path)


@pytest.mark.parametrize("name", ["vit.pth", "vit.safetensors"])
def test_a_truncated_missing_or_foreign_file(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(InputError, match=f"{name}: .*No such file"):
        weights.vision_config(path, 48)
    if name.endswith("pth"):
        torch.save(videomae_file(), path)
    else:
        save_file(videomae_file(), path)
    weights.vision_config(path, 48)
    whole = path.read_bytes()
    for content in (whole[:-1000], whole[:100], b"", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: expected weights"):
            weights.vision_config(path, 48)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return open, (Trap.path, "w")


def test_nothing_in_a_file_is_run(tmp_path):
    Trap.path = str(tmp_path / "ran")
    torch.save({"module": videomae_file(), "extra": Trap()}, tmp_path / "vit.pth")
    with pytest.raises(InputError, match="vit.pth: expected tensors and plain values, found objects of .*open; if you trust it"):
        weights.read_tensors(tmp_path / "vit.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", ["MT19937", np.float64(0.5), Path("a"), np.array([{"a": 1}, None], object)])
def test_a_file_of_an_older_numpy_or_a_newer_python_is_read(tmp_path, value):
    torch.save({"model": {"w": torch.ones(2)}, "side": value}, tmp_path / "new.pth")
    for old, new in ((b"numpy._core.multiarray", b"numpy.core.multiarray"), (b"cpathlib\n", b"cpathlib._local\n"), (b"PosixPath", b"WindowsPath")):
        with zipfile.ZipFile(tmp_path / "new.pth") as source, zipfile.ZipFile(tmp_path / "old.pth", "w") as target:
            for item in source.infolist():
                target.writestr(item, source.read(item).replace(old, new))
        assert weights.read_tensors(tmp_path / "old.pth")["w"].tolist() == [1, 1]


class History:
    """A class of a training framework, whose objects its files hold."""


def test_an_object_of_a_foreign_class_is_named(tmp_path):
    torch.save({"state_dict": videomae_file(), "history": History()}, tmp_path / "vit.pth")
    with pytest.raises(InputError, match=r"found objects of \S*test_weights\.History; if you trust it: torch\.save\(.*, NEW\)$") as error:
        weights.vision_config(tmp_path / "vit.pth", 48)
    assert "\n" not in str(error.value) and "fetch the file" not in str(error.value)


def test_folders_without_weights_or_of_an_unknown_model(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        weights.vision_config(tmp_path, 48)
    (tmp_path / "config.json").write_text(json.dumps(NATIVE))
    encoder = VisionEncoder(weights.vision_config(tmp_path, 42))
    with pytest.raises(InputError, match="expected model.*safetensors or pytorch_model.*bin, found none"):
        encoder.load(tmp_path)
    for content in ({"model_type": "dinov2"}, {"model_type": "internvl", "vision_config": {"model_type": "dinov2"}}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="videomae, internvl_vision, intern_vit_6b.*found 'dinov2'"):
            weights.vision_config(tmp_path, 42)


def test_patches_have_to_fill_the_image(tmp_path):
    path = folder(tmp_path / "vit", NATIVE, {})
    with pytest.raises(InputError, match="--image-size: expected a multiple of 14, found 160; .* has patches of 14 pixels: take 154 or 168"):
        weights.vision_config(path, 160)
