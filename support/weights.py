"""support/weights.py - published vision encoders -> our modules.

    config = vision_config(path, image_size)                   # plain values for Config.vision
    backbone, clip, tubelet = build_encoder(config)            # the module, without weights
    tensors, unused = vision_tensors(path, config["kind"], backbone.state_dict())

path: a file as the authors of VideoMAE (v1, v2) publish it (.pth), or a Hugging Face folder
(config.json and weights) of a VideoMAE, an InternViT, or a whole InternVL. Of an InternVL, only
the vision part is taken. Code beside weights is never run.
"""
import argparse
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import nn

from support.annotations import InputError, is_number, read_json, shorten

# A VideoMAE that a CPU can train from scratch. The usual range of 0.02 suits wide layers only.
TINY_VISION = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
                   intermediate_size=192, image_size=32, patch_size=16, num_frames=16,
                   tubelet_size=2, initializer_range=0.2)
HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}        # of VideoMAE S, B, L, H, g by width
# model_type -> our kind, and the defaults of the code that the model is from
FOLDERS = {
    "videomae": ("videomae", dict(image_size=224, patch_size=16)),
    "internvl_vision": ("internvit", dict(image_size=448, patch_size=14)),
    "intern_vit_6b": ("internvit", dict(image_size=224, patch_size=14, norm_type="rms_norm",
                                        attention_bias=False, use_qk_norm=True))}
WHOLE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "patch_size", "num_frames", "tubelet_size", "image_size")
FIELDS = (*WHOLE, "hidden_act", "layer_norm_eps", "norm_type", "attention_bias", "use_qk_norm")
UNUSED = ("norm.", "fc_norm.", "layernorm.", "head.", "classifier.",       # no norm before pooling
          "decoder.", "encoder_to_decoder.", "mask_token", "pos_embed",    # of pre-training
          "language_model.", "lm_head.", "mlp1.", "multi_modal_projector.",    # rest of InternVL
          "model.language_model.", "model.multi_modal_projector.")

# Patterns that turn a name of our module into the name in a file. They are replaced in turn.
# The authors' VideoMAE has one attn.qkv.weight for query, key and value, and no bias for keys.
ORIGINAL_VIDEOMAE = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj", "encoder.layer": "blocks",
    "attention.attention.(query|key|value).weight": "attn.qkv.weight",
    "attention.attention.query.bias": "attn.q_bias",
    "attention.attention.value.bias": "attn.v_bias", "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    "layernorm_before": "norm1", "layernorm_after": "norm2"}
FOLDER_VIDEOMAE = {"query.bias": "q_bias", "value.bias": "v_bias"}
ORIGINAL_INTERNVIT = {
    "cls_token": "class_embedding", "position_embeddings": "position_embedding",
    "patch_embeddings.projection": "patch_embedding", "encoder.layer": "encoder.layers",
    "attention.[qkv]_proj": "attn.qkv", "attention.projection_layer": "attn.proj",
    "attention": "attn", "lambda_": "ls", "layernorm_before": "norm1", "layernorm_after": "norm2"}
LAYOUTS = {"videomae": [ORIGINAL_VIDEOMAE, FOLDER_VIDEOMAE], "internvit": [ORIGINAL_INTERNVIT, {}]}


def vision_config(path, image_size: int, num_frames: int = 16) -> dict:
    """Describe a published encoder by plain values for Config.vision (see build_encoder).

    image_size: side of our frames, pixels. num_frames: clip length of a VideoMAE file; a folder
    says its own. InputError if the path is no such encoder, or if patches do not fill the image.
    """
    if Path(path).is_dir():
        config = folder_config(Path(path))
    else:
        config = file_config(path)
        config["num_frames"] = num_frames
    patch = config["patch_size"]
    smaller = image_size // patch * patch
    if smaller != image_size:
        raise InputError(f"{path}: expected an image size that is a multiple of its patches of "
                         f"{patch} pixels, found {image_size}; take {smaller} or {smaller + patch}")
    config["image_size"] = image_size
    return config


def file_config(path) -> dict:
    """Read the sizes of a VideoMAE file from the shapes of its tensors.

    No shape shows the number of heads. The width V says it: see HEADS, and V / 64 otherwise.
    """
    tensors = read_tensors(path)
    prefix, _ = find_layout(path, tensors, [ORIGINAL_VIDEOMAE])
    shape = tensors[prefix + "patch_embed.proj.weight"].shape
    if len(shape) != 5:
        raise InputError(f"{path}: {prefix}patch_embed.proj.weight: expected the 5 dimensions of "
                         f"a video encoder, found {tuple(shape)}; give a VideoMAE file")
    V, _, tubelet, _, patch = shape
    start = prefix + "blocks."
    layers = {name[len(start):].split(".")[0] for name in tensors if name.startswith(start)}
    # If this bias is missing, vision_tensors says so later.
    hidden = tensors.get(start + "0.mlp.fc1.bias", range(4 * V))
    return dict(kind="videomae", pretrained_image_size=224, patch_size=patch, tubelet_size=tubelet,
                hidden_size=V, num_hidden_layers=len(layers), intermediate_size=len(hidden),
                num_attention_heads=HEADS.get(V, max(1, V // 64)), layer_norm_eps=1e-6)


def folder_config(folder: Path) -> dict:
    """Read the fields of config.json that make the encoder, under their names in transformers."""
    content = read_json(folder / "config.json")
    # The layout of transformers is called internvl, the layout of the authors internvl_chat.
    if isinstance(content, dict) and content.get("model_type") in ("internvl", "internvl_chat"):
        content = content.get("vision_config")
    found = content.get("model_type") if isinstance(content, dict) else content
    if not isinstance(found, str) or found not in FOLDERS:
        raise InputError(f"{folder}/config.json: expected model_type {', '.join(FOLDERS)}, "
                         f"internvl or internvl_chat, found {shorten(found)}; "
                         f"give the folder of such a model")
    names = {}
    if found == "intern_vit_6b":
        names = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}
    kind, defaults = FOLDERS[found]
    values = dict(defaults)
    for name, value in content.items():
        value = value[0] if isinstance(value, list) else value             # images are square
        values[names.get(name, name)] = value
    fields = {name: values[name] for name in FIELDS if name in values}
    for name in WHOLE:
        value = fields.get(name, 1)
        if not (is_number(value) and value >= 1 and value % 1 == 0):
            raise InputError(f"{folder}/config.json: {name}: expected a whole number of at least "
                             f"1, found {shorten(value)}")
    return {"kind": kind, "pretrained_image_size": fields.pop("image_size"), **fields}


def build_encoder(config: dict) -> tuple[nn.Module, int, int]:
    """Build (module of transformers, frames of a clip, frames of a step in time), without weights.

    config: kind ("videomae" if absent, or "internvit"), fields of transformers' VideoMAEConfig or
    InternVLVisionConfig (image_size, hidden_size, ...), and pretrained_image_size (if absent,
    image_size): positions are interpolated from its grid of patches.
    """
    config = dict(config)
    kind = config.pop("kind", "videomae")
    pretrained = config.pop("pretrained_image_size", None)
    if kind == "internvit":
        return build_internvit(config, pretrained), 1, 1
    videomae = build_videomae(config, pretrained)
    return videomae, videomae.config.num_frames, videomae.config.tubelet_size


def build_videomae(config: dict, pretrained: int | None) -> nn.Module:
    """VideoMAEModel without a final norm. pretrained: image side of its positions, pixels."""
    from transformers import VideoMAEConfig, VideoMAEModel
    videomae = VideoMAEModel(VideoMAEConfig(**config, use_mean_pooling=True))
    for layer in videomae.encoder.layer:
        # VideoMAE has no bias for keys. The one in transformers 5.17 has no effect.
        layer.attention.attention.key.bias = None
    if pretrained and pretrained != videomae.config.image_size:
        positions = videomae_positions(videomae.config, pretrained)
        videomae.embeddings.position_embeddings = positions
    return videomae


def videomae_positions(config, pretrained: int) -> torch.Tensor:
    """(1, t h w, V): sinusoids of the pretrained grid, bicubically interpolated at every step t."""
    steps = config.num_frames // config.tubelet_size
    side = pretrained // config.patch_size
    ours = config.image_size // config.patch_size
    grid = sinusoids(steps * side ** 2, config.hidden_size)
    grid = rearrange(grid, "(t h w) v -> t v h w", t=steps, h=side)
    grid = F.interpolate(grid, (ours, ours), mode="bicubic")
    return rearrange(grid, "t v h w -> () (t h w) v")


def sinusoids(n: int, width: int) -> torch.Tensor:
    """VideoMAE's positions (n, V): sine in even channels j, cosine in odd ones, of
    n / 10000^(2 (j // 2) / V)."""
    channel = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(n)[:, None] / 10000 ** (2 * (channel // 2) / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def build_internvit(config: dict, pretrained: int | None) -> nn.Module:
    """InternVLVisionModel, built for the pretrained grid. It interpolates at every call."""
    from transformers import InternVLVisionConfig, InternVLVisionModel
    config = dict(config, image_size=pretrained or config["image_size"])
    return InternVLVisionModel(InternVLVisionConfig(**config, use_mean_pooling=True))


def rename(name: str, layout: dict) -> str:
    """A name of our module -> the name in a file."""
    for ours, theirs in layout.items():
        name = re.sub(ours, theirs, name)
    return name


def find_layout(path, tensors: dict, layouts: list) -> tuple:
    """Find (prefix of every name of the encoder, its layout) by the patch embedding."""
    ours = "embeddings.patch_embeddings.projection.weight"
    markers = [rename(ours, layout) for layout in layouts]
    for layout, marker in zip(layouts, markers):
        for name in tensors:
            if f".{name}".endswith(f".{marker}"):
                return name.removesuffix(marker), layout
    raise InputError(f"{path}: expected a tensor {' or '.join(markers)}, found "
                     f"{', '.join(list(tensors)[:3])}, ...; give a VideoMAE file, or a folder "
                     f"with config.json")


def vision_tensors(path, kind: str, expected: dict) -> tuple:
    """Read (weights under the names of our module, names of tensors that are left out by design).

    expected: state_dict of transformers' VideoMAEModel or InternVLVisionModel. InputError names a
    tensor that is missing, unknown or of another shape.
    """
    tensors = read_tensors(path)
    prefix, layout = find_layout(path, tensors, LAYOUTS[kind])
    weights, unused = {}, dict.fromkeys(tensors)
    for name, ours in expected.items():
        source = prefix + rename(name, layout)
        if source not in tensors and prefix + name in tensors:
            source = prefix + name                 # biases that transformers 5.17 wrote
        parts, part = 1, 0
        if ".qkv." in source:                      # query, key, value in one tensor, in this order
            parts, part = 3, "qkv".index(name.split(".")[-2][0])
        shape = (parts * ours.shape[0], *ours.shape[1:])
        tensor = tensors.get(source)
        if tensor is None or tensor.shape != shape:
            found = "none" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise InputError(f"{path}: expected a tensor {source} of shape {shape}, found {found}; "
                             f"the file is incomplete or of another model")
        weights[name] = tensor.chunk(parts)[part]
        unused.pop(source, None)
    for name in unused:
        # transformers 5.17 writes a bias of keys. It adds the same to all logits of a query, and
        # softmax drops it.
        bias_of_keys = name.endswith("attention.key.bias")
        if not bias_of_keys and not name.removeprefix(prefix).startswith(UNUSED):
            raise InputError(f"{path}: expected the tensors of {kind} only, found {name}; "
                             f"the file is of another model")
    if prefix + "pos_embed" in tensors:
        positions = tensors[prefix + "pos_embed"][0]           # (N, V)
        if not torch.allclose(positions, sinusoids(*positions.shape), atol=1e-3):
            raise InputError(f"{path}: expected the sinusoids of VideoMAE as {prefix}pos_embed, "
                             f"found other positions; learned ones are not supported")
    return weights, list(unused)


def read_tensors(path) -> dict:
    """Read {name: tensor} of a .pth, .pt, .bin or .safetensors file, or of a Hugging Face folder.

    A level "module", "model" or "state_dict" is taken off. Pickled files may hold tensors and
    plain values only. InputError names the file that is missing, cut short, or something else.
    """
    path = Path(path)
    if path.is_dir():
        tensors = {}
        for file in weight_files(path):
            tensors.update(read_tensors(file))
        return tensors
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):       # VideoMAE's flags
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                     # a damaged pickle can fail in any way
        # Further sentences of torch advise to unpickle everything.
        reason = f"{type(error).__name__}: {error}".split(". ")[0]
        raise InputError(f"{path}: expected weights (.pth, .pt, .bin, .safetensors) or a Hugging "
                         f"Face folder, found {reason}; check the path, or fetch the file "
                         f"again") from error
    for level in ("module", "model", "state_dict"):
        if isinstance(content, dict) and level in content:
            content = content[level]
            break
    named = isinstance(content, dict)
    if not named or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise InputError(f"{path}: expected named tensors, found something else; "
                         f"give a file with weights")
    return content


def weight_files(folder: Path) -> list:
    """List the file that holds a Hugging Face folder's weights, or the several of its index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            parts = read_json(index).get("weight_map", {}).values()
            return sorted({folder / part for part in parts})
    raise InputError(f"{folder}: expected model.safetensors, pytorch_model.bin or an index of "
                     f"several, found none; fetch the weights into this folder")
