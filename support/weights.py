"""support/weights.py - published vision encoders -> our modules.
A path is a file of VideoMAE (v1, v2; of its authors or mmaction2) or InternVideo2, or the folder
of a VideoMAE, InternViT or InternVL on Hugging Face. Code beside weights is never run."""
import argparse
import re
from pathlib import Path, PurePath

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from einops import rearrange
from safetensors.torch import load_file
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from support.annotations import InputError, expect, read_json, shorten
from support.checkpoint import part

TINY_VISION, DEFAULTS, LAYOUTS = read_json(Path(__file__).with_name("weights.json")).values()
ORIGINAL_VIDEOMAE, MMACTION_VIDEOMAE, FOLDER_VIDEOMAE = LAYOUTS["videomae"]
WHOLE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "patch_size", "num_frames", "tubelet_size", "image_size")
FIELDS = (*WHOLE, "hidden_act", "layer_norm_eps", "norm_type", "attention_bias", "use_qk_norm")
UNUSED = re.compile(
    r"norm\.|fc_norm\.|layernorm\.|(cls_)?head\.|classifier\.|clip_projector\."   # after the layers
    r"|(\w+_)?decoder\.|mask_token|(\w+_)?pos_embed"                     # of pre-training
    r"|(model\.)?(language_model|multi_modal_projector)\.|lm_head\.|mlp1\."    # rest of InternVL
    r"|vision_align\.|text_encoder\.|temp$"                              # rest of InternVideo2
    r"|.*attention\.key\.bias$")       # softmax drops it: the same for all logits of a query
PATCHES = "embeddings.patch_embeddings.projection.weight"

def vision_config(path, image_size: int) -> dict:
    """Describe a published encoder, or "tiny", by plain values for Config.vision (build_encoder).
    image_size: side of our frames, pixels. Raises InputError, also if patches do not fill it."""
    config = TINY_VISION
    if path != "tiny":
        config = folder_config(Path(path)) if Path(path).is_dir() else file_config(path)
    patch = config["patch_size"]
    smaller = image_size // patch * patch
    expect(smaller == image_size, "--image-size", f"a multiple of {patch}", image_size,
           f"{path} has patches of {patch} pixels: take {smaller} or {smaller + patch}")
    return dict(config, image_size=image_size)

def file_config(path) -> dict:
    """Read the sizes of a VideoMAE or InternVideo2 file; the latter has tubelets of 1 frame."""
    tensors = read_tensors(path)
    prefix, layout = find_layout(path, tensors, [ORIGINAL_VIDEOMAE, MMACTION_VIDEOMAE])
    tensors, patches = part(tensors, prefix), rename(PATCHES, layout)
    shape = tuple(tensors[patches].shape)
    expect(len(shape) == 5, f"{path}: {prefix}{patches}", "5 dimensions", shape, "name another")
    V, _, tubelet, _, patch = shape
    layers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    # A bias that is missing is an error later.
    hidden = tensors.get(rename("encoder.layer.0.intermediate.dense.bias", layout), range(4 * V))
    heads = {1280: 16, 1408: 16}.get(V, max(1, V // 64))       # VideoMAE H and g have wider heads
    fields = dict(kind="videomae", pretrained_image_size=224, num_frames=16)
    if tubelet == 1:                                           # 1 + 8 n n positions
        positions = tensors.get("pos_embed", torch.empty(2049, V)).numel() // V
        side = round(max(1, (positions - 1) / 8) ** 0.5)
        fields = dict(kind="internvideo2", num_frames=8, pretrained_image_size=side * patch,
                      norm_type="rms_norm", use_qk_norm=True, attention_bias=False,
                      hidden_act="gelu_pytorch_tanh")          # as in the kernel of training
    return dict(fields, patch_size=patch, tubelet_size=tubelet, hidden_size=V,
                num_hidden_layers=len(layers), intermediate_size=len(hidden),
                num_attention_heads=heads, layer_norm_eps=1e-6)

def folder_config(folder: Path) -> dict:
    """Read the fields of config.json that make the encoder, under their names in transformers."""
    content = read_json(folder / "config.json")
    content = content.get("vision_config", content)                    # of a whole InternVL
    found = content.get("model_type") if isinstance(content, dict) else content
    expect(found in list(DEFAULTS), f"{folder}/config.json",
           f"model_type {', '.join(DEFAULTS)}, or an InternVL", shorten(found), "give its folder")
    values = {**DEFAULTS[found], **content}
    if found == "intern_vit_6b":
        values |= dict(attention_bias=values["qkv_bias"], use_qk_norm=values["qk_normalization"])
    fields = {name: values[name] for name in FIELDS if name in values}
    for name, value in fields.items():
        if isinstance(value, list) and value:
            fields[name] = value = value[0]                            # images are square
        whole = type(value) in (int, float) and value >= 1 and value % 1 == 0
        expect(whole or name not in WHOLE, f"{folder}/config.json: {name}",
               "a whole number of at least 1", shorten(value))
    return dict(fields, kind=values["kind"], pretrained_image_size=fields["image_size"])

def build_encoder(config: dict) -> tuple[torch.nn.Module, int, int]:
    """Build (module of transformers, frames of a clip, frames of a step in time), without weights.
    config: kind (of LAYOUTS; default "videomae"), fields of its class in transformers, and
    pretrained_image_size, whose grid of positions is interpolated (default: image_size)."""
    config = dict(config, use_mean_pooling=True)               # no norm after the layers
    kind = config.pop("kind", "videomae")
    pretrained = config.pop("pretrained_image_size", config["image_size"])
    if kind != "videomae":                                     # they interpolate at every call
        config = transformers.InternVLVisionConfig(**dict(config, image_size=pretrained))
        encoder = transformers.InternVLVisionModel(config)
        if kind == "internvit":
            return encoder, 1, 1
        encoder.embeddings = ClipEmbeddings(config)
        return encoder, config.num_frames, 1
    config = transformers.VideoMAEConfig(**config)
    videomae = transformers.VideoMAEModel(config)
    for layer in videomae.encoder.layer:
        layer.attention.attention.key.bias = None      # VideoMAE has none, and it has no effect
    steps, side = config.num_frames // config.tubelet_size, config.image_size // config.patch_size
    count = steps * (pretrained // config.patch_size) ** 2
    table = get_sinusoid_encoding_table(count, config.hidden_size)             # (1, n, V)
    videomae.embeddings.position_embeddings = resize_positions(table, steps, side)
    return videomae, config.num_frames, config.tubelet_size

class ClipEmbeddings(torch.nn.Module):
    """InternVideo2: a class token, then the patches by frame, row and column, and their positions.
    Source: OpenGVLab/InternVideo, folder InternVideo2/single_modality. The table keeps the file's
    size. config: InternVLVisionConfig with num_frames."""
    def __init__(self, config):
        super().__init__()
        width, patch, self.frames = config.hidden_size, config.patch_size[0], config.num_frames
        projection = torch.nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch))
        self.patch_embeddings = torch.nn.ModuleDict({"projection": projection})   # InternViT's
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        count = 1 + self.frames * (config.image_size[0] // patch) ** 2
        self.position_embeddings = torch.nn.Parameter(torch.zeros(1, count, width))

    def forward(self, clips, bool_masked_pos=None):
        """(B, T, 3, H, H) -> (B, 1 + T h h, V). transformers passes bool_masked_pos, here None."""
        patches = self.patch_embeddings["projection"](clips.transpose(1, 2))    # (B, V, T, h, h)
        first, rest = self.position_embeddings.tensor_split([1], dim=1)
        rest = resize_positions(rest, self.frames, patches.size(-1))
        class_token = (self.cls_token + first).expand(len(clips), -1, -1)
        return torch.cat([class_token, patches.flatten(2).mT + rest], 1)

def resize_positions(positions, steps: int, side: int):
    """Interpolate (1, T h h, V) to (1, T side side, V), each of T steps by itself."""
    old = round((positions.size(1) / steps) ** 0.5)
    grid = rearrange(positions, "() (t h w) v -> t v h w", t=steps, h=old)
    grid = F.interpolate(grid, (side, side), mode="bicubic")
    return rearrange(grid, "t v h w -> () (t h w) v")

def rename(name: str, layout: dict) -> str:
    """A name of our module -> the name in a file."""
    for ours, theirs in layout.items():
        name = re.sub(ours, theirs, name)
    return name

def find_layout(path, tensors: dict, layouts: list) -> tuple:
    """Find (prefix of every name of the encoder, its layout) by the patch embedding."""
    markers = {rename(PATCHES, layout): layout for layout in layouts}
    for marker, layout in markers.items():
        for name in tensors:
            if f".{name}".endswith(f".{marker}"):
                return name.removesuffix(marker), layout
    raise InputError(f"{path}: expected a tensor {' or '.join(markers)}, found "
                     f"{list(tensors)[:3]}; give a file of VideoMAE or InternVideo2, or a folder")

def vision_tensors(path, kind: str, expected: dict) -> tuple:
    """Read (weights by the names in `expected`, a state_dict; tensors that are left out by design).
    InputError names a tensor that is missing or misshapen."""
    tensors = read_tensors(path)
    prefix, layout = find_layout(path, tensors, LAYOUTS[kind])
    weights, unused = {}, dict.fromkeys(tensors)
    for name, ours in expected.items():
        source = prefix + rename(name, layout)
        # Biases of query, key and value in one tensor, or as transformers 5.17 wrote them.
        for other in (re.sub("[qv]_bias$", "qkv.bias", source), prefix + name):
            if source not in tensors and other in tensors:
                source = other
        parts, part = 1, 0
        if ".qkv." in source:                      # query, key, value in one tensor, in this order
            parts, part = 3, "qkv".index(name.split(".")[-2][0])
        shape, tensor = f"shape {(parts * len(ours), *ours.shape[1:])}", tensors.get(source)
        found = "none" if tensor is None else f"shape {tuple(tensor.shape)}"
        expect(found == shape, path, f"a tensor {source} of {shape}", found,
               "the file is incomplete or of another model")
        weights[name] = tensor.chunk(parts)[part]
        unused.pop(source, None)
    for name in unused:
        known = UNUSED.match(name.removeprefix(prefix))
        expect(known, path, f"the tensors of {kind} only", name, "the file is of another model")
    if prefix + "pos_embed" in unused:
        positions = tensors[prefix + "pos_embed"]              # (1, n, V)
        sinusoids = get_sinusoid_encoding_table(*positions.shape[1:])
        expect(torch.allclose(positions, sinusoids, atol=1e-3), path, "the sinusoids of VideoMAE",
               f"other numbers as {prefix}pos_embed", "learned positions are not supported")
    return weights, list(unused)

def read_tensors(path) -> dict:
    """Read {name: tensor} of a .pth, .pt, .bin or .safetensors file, or of a Hugging Face folder.
    InputError for a file that is missing, cut short, or pickles more than tensors and values."""
    path, tensors = Path(path), {}
    if path.is_dir():
        files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        expect(files, path, "model*.safetensors or pytorch_model*.bin", "none", "fetch them")
        for file in files:
            tensors.update(read_tensors(file))
        return tensors
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(plain_classes()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                     # a damaged pickle can fail in any way
        foreign = re.findall(r"GLOBAL (\S+) w", str(error))
        expect(not foreign, path, "tensors and plain values", f"objects of {', '.join(foreign)}",
               "if you trust it: torch.save(torch.load(FILE, weights_only=False)['model'], NEW)")
        reason = f"{type(error).__name__}: {error}".split(". ")[0]     # no advice to unpickle
        raise InputError(f"{path}: expected weights (.pth, .pt, .bin, .safetensors) or a folder, "
                         f"found {reason}; check the path, or fetch the file again") from error
    for level in ("module", "model", "model_ema", "state_dict"):
        if isinstance(content, dict):
            content = content.get(level, content)
    named = isinstance(content, dict) and all(map(torch.is_tensor, content.values()))
    expect(named, path, "named tensors", "something else", "give a file with weights")
    return content

def plain_classes() -> list:
    """What a file may hold beside tensors, for torch.load: they keep values and run no code."""
    scalar, array = (value.__reduce__()[0] for value in (np.float64(), np.empty(0)))
    classes = [argparse.Namespace, np.dtype, np.ndarray]
    classes += {type(np.dtype(code)) for code in np.typecodes["All"]}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        classes += [(scalar, f"{module}.scalar"), (array, f"{module}._reconstruct")]
    for module in ("pathlib", "pathlib._local"):               # the latter of Python 3.13
        classes += [(PurePath, f"{module}.{system}Path") for system in ("Posix", "Windows")]
    return classes
