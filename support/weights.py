"""weights.py - published vision encoders -> our modules.

    encoder = VisionEncoder(vision_config(path, image_size))     # what the encoder is: stands in Config.vision
    unused = encoder.load(path)                                  # its weights, every tensor of the file accounted for

path: a file as the authors of VideoMAE (v1, v2) publish it (.pth), or a Hugging Face folder (config.json and weights)
of a VideoMAE, an InternViT, or a whole InternVL, of which the vision part is taken. Code beside weights is never run.
"""
import argparse
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from annotations import InputError, is_number, read_json, shorten

HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}          # of VideoMAE S, B, L, H, g by width
FOLDERS = {                                                       # model_type -> kind, defaults of the code it is from
    "videomae": ("videomae", dict(image_size=224, patch_size=16)),
    "internvl_vision": ("internvit", dict(image_size=448, patch_size=14)),
    "intern_vit_6b": ("internvit", dict(image_size=224, patch_size=14, norm_type="rms_norm", attention_bias=False,
                                        use_qk_norm=True))}
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "patch_size",
          "layer_norm_eps", "num_frames", "tubelet_size", "norm_type", "attention_bias", "use_qk_norm")
WHOLE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "num_frames",
         "tubelet_size", "image_size")
UNUSED = ("norm.", "fc_norm.", "layernorm.", "head.", "classifier.",          # tokens are pooled without a final norm
          "decoder.", "encoder_to_decoder.", "mask_token", "pos_embed",       # of pre-training; positions are computed
          "language_model.", "lm_head.", "mlp1.", "multi_modal_projector.",   # the rest of InternVL
          "model.language_model.", "model.multi_modal_projector.")


# ------------------------------------------------------------------------------------------------ what the encoder is
def vision_config(path, image_size: int, num_frames: int = 16) -> dict:
    """What a published encoder is, as plain values for Config.vision (see model.VisionEncoder).

    image_size: side of our frames, pixels. num_frames: clip length of a VideoMAE file; a folder says its own.
    InputError if the path is no such encoder, or if its patches do not fill the image.
    """
    config = folder_config(Path(path)) if Path(path).is_dir() else file_config(path) | {"num_frames": num_frames}
    patch, whole = config["patch_size"], image_size // config["patch_size"]
    if image_size % patch:
        raise InputError(f"{path}: expected an image size that is a multiple of its patches of {patch} pixels, "
                         f"found {image_size}; take {whole * patch} or {(whole + 1) * patch}")
    return config | {"image_size": image_size}


def file_config(path) -> dict:
    """Sizes of a VideoMAE file from the shapes of its tensors; heads, which no shape shows, by width (else V / 64)."""
    tensors = read_tensors(path)
    prefix, _ = find_layout(path, tensors, [original_videomae])
    shape = tensors[prefix + "patch_embed.proj.weight"].shape                 # (V, 3, tubelet, patch, patch)
    if len(shape) != 5:
        raise InputError(f"{path}: {prefix}patch_embed.proj.weight: expected the 5 dimensions of a video encoder, "
                         f"found {tuple(shape)}; give a VideoMAE file")
    layers = {name.split("blocks.")[1].split(".")[0] for name in tensors if name.startswith(prefix + "blocks.")}
    fc1 = tensors.get(prefix + "blocks.0.mlp.fc1.bias", range(4 * shape[0]))  # if missing, vision_tensors says so
    return dict(kind="videomae", pretrained_image_size=224, patch_size=shape[3], tubelet_size=shape[2],
                hidden_size=shape[0], num_hidden_layers=len(layers), intermediate_size=len(fc1), layer_norm_eps=1e-6,
                num_attention_heads=HEADS.get(shape[0], max(1, shape[0] // 64)))


def folder_config(folder: Path) -> dict:
    """The fields of config.json that make the encoder, under their names in transformers. Images are square."""
    content = read_json(folder / "config.json")
    kind = content.get("model_type") if isinstance(content, dict) else content
    if kind in ("internvl", "internvl_chat"):                                 # transformers' and the authors' layout
        content = content.get("vision_config")
        kind = content.get("model_type") if isinstance(content, dict) else content
    if not isinstance(kind, str) or kind not in FOLDERS:
        raise InputError(f"{folder}/config.json: expected model_type {', '.join(FOLDERS)}, internvl or internvl_chat, "
                         f"found {shorten(kind)}; give the folder of such a model")
    kind, defaults = FOLDERS[content["model_type"]]
    if content["model_type"] == "intern_vit_6b":
        theirs = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}
        content = {theirs.get(name, name): value for name, value in content.items()}
    content = {name: value[0] if isinstance(value, list) else value for name, value in (defaults | content).items()}
    fields = {name: content[name] for name in FIELDS if name in content}
    for name, value in (fields | {"image_size": content["image_size"]}).items():
        if name in WHOLE and not (is_number(value) and value >= 1 and value % 1 == 0):
            raise InputError(f"{folder}/config.json: {name}: expected a whole number of at least 1, "
                             f"found {shorten(value)}")
    return {"kind": kind, "pretrained_image_size": content["image_size"]} | fields


# ------------------------------------------------------------------------------------------------ names in the files
def original_videomae(name: str) -> str:
    """VideoMAE of its authors: patch_embed.proj, blocks.N.{norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2}.

    attn.qkv.weight holds query, key and value; the biases are attn.q_bias and attn.v_bias, and keys have none.
    """
    return rename(name, {"embeddings.patch_embeddings.projection": "patch_embed.proj", "encoder.layer": "blocks",
                         "attention.attention.(query|key|value).weight": "attn.qkv.weight",
                         "attention.attention.query.bias": "attn.q_bias",
                         "attention.attention.value.bias": "attn.v_bias", "attention.output.dense": "attn.proj",
                         "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
                         "layernorm_before": "norm1", "layernorm_after": "norm2"})


def folder_videomae(name: str) -> str:
    """VideoMAE in Hugging Face folders: the module's names, but for the biases attention.q_bias and v_bias."""
    return rename(name, {"query.bias": "q_bias", "value.bias": "v_bias"})


def original_internvit(name: str) -> str:
    """InternViT of its authors: embeddings.{class_embedding, position_embedding, patch_embedding} and
    encoder.layers.N.{norm1, attn.qkv, attn.q_norm, attn.k_norm, attn.proj, ls1, norm2, mlp.fc1, mlp.fc2, ls2}."""
    return rename(name, {"cls_token": "class_embedding", "position_embeddings": "position_embedding",
                         "patch_embeddings.projection": "patch_embedding", "encoder.layer": "encoder.layers",
                         "attention.[qkv]_proj": "attn.qkv", "attention.projection_layer": "attn.proj",
                         "attention": "attn", "lambda_": "ls", "layernorm_before": "norm1", "layernorm_after": "norm2"})


def folder_internvit(name: str) -> str:
    """InternViT as transformers writes it: the module's names."""
    return name


def rename(name: str, table: dict) -> str:
    """A name of our module -> the name in a file, by patterns that are replaced in turn."""
    for ours, theirs in table.items():
        name = re.sub(ours, theirs, name)
    return name


LAYOUTS = {"videomae": [original_videomae, folder_videomae], "internvit": [original_internvit, folder_internvit]}


def find_layout(path, tensors: dict, layouts: list) -> tuple:
    """(what stands before every name of the encoder, function of its layout), told by the patch embedding."""
    markers = [layout("embeddings.patch_embeddings.projection.weight") for layout in layouts]
    for layout, marker in zip(layouts, markers):
        for name in tensors:
            if f".{name}".endswith(f".{marker}"):
                return name.removesuffix(marker), layout
    raise InputError(f"{path}: expected a tensor {' or '.join(markers)}, found {', '.join(list(tensors)[:3])}, ...; "
                     f"give a VideoMAE file, or a folder with config.json")


# ------------------------------------------------------------------------------------------------ tensors
def vision_tensors(path, kind: str, expected: dict) -> tuple:
    """(weights under the names of our module, names of the file's tensors that are left out by design).

    expected: state_dict of transformers' VideoMAEModel or InternVLVisionModel. InputError names a tensor that is
    missing, unknown or of another shape.
    """
    tensors = read_tensors(path)
    prefix, layout = find_layout(path, tensors, LAYOUTS[kind])
    weights, unused = {}, dict.fromkeys(tensors)
    for name, ours in expected.items():
        source = prefix + layout(name)
        if source not in tensors and prefix + name in tensors:
            source = prefix + name                         # transformers 5.17 writes biases under the module's names
        parts = 3 if ".qkv." in source else 1              # query, key and value in one tensor, one after the other
        shape = (parts * ours.shape[0], *ours.shape[1:])
        if source not in tensors or tensors[source].shape != shape:
            found = f"shape {tuple(tensors[source].shape)}" if source in tensors else "none"
            raise InputError(f"{path}: expected a tensor {source} of shape {shape}, found {found}; "
                             f"the file is incomplete or of another model")
        part = "qkv".index(name.split(".")[-2][0]) if parts == 3 else 0       # by query, key, value or q_proj, ...
        weights[name] = tensors[source].chunk(parts)[part]
        unused.pop(source, None)
    for name in unused:
        # A bias of keys, which transformers 5.17 writes, adds the same to all logits of a query: softmax drops it.
        if not name.removeprefix(prefix).startswith(UNUSED) and not name.endswith("attention.key.bias"):
            raise InputError(f"{path}: expected the tensors of {kind} only, found {name}; the file is of another model")
    positions = tensors.get(prefix + "pos_embed")          # (1, N, V)
    if positions is not None and not torch.allclose(positions[0], sinusoids(*positions[0].shape), atol=1e-3):
        raise InputError(f"{path}: expected the sinusoids of VideoMAE as {prefix}pos_embed, found other positions; "
                         f"learned ones are not supported")
    return weights, list(unused)


def sinusoids(n: int, width: int) -> torch.Tensor:
    """VideoMAE's positions (n, V): sine in even channels j, cosine in odd ones, of n / 10000^(2 (j // 2) / V)."""
    channel = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(n)[:, None] / 10000 ** (2 * (channel // 2) / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def read_tensors(path) -> dict:
    """{name: tensor} of a .pth, .pt, .bin or .safetensors file, or of the weights in a Hugging Face folder.

    A level "module", "model" or "state_dict" is taken off. Pickled files may hold tensors and plain values only.
    InputError names the file that is missing, cut short, or something else.
    """
    path = Path(path)
    if path.is_dir():
        return {name: tensor for file in weight_files(path) for name, tensor in read_tensors(file).items()}
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):          # VideoMAE keeps its flags in the file
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                             # a damaged pickle can fail in any way
        reason = f"{type(error).__name__}: {error}".split(". ")[0]            # without torch's advice to unpickle all
        raise InputError(f"{path}: expected weights (.pth, .pt, .bin, .safetensors) or a Hugging Face folder, found "
                         f"{reason}; check the path, or fetch the file again") from error
    if isinstance(content, dict):
        content = next((content[key] for key in ("module", "model", "state_dict") if key in content), content)
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise InputError(f"{path}: expected named tensors, found something else; give a file with weights")
    return content


def weight_files(folder: Path) -> list:
    """The file that holds a Hugging Face folder's weights, or the several ones that its index lists."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            return sorted({folder / part for part in read_json(index).get("weight_map", {}).values()})
    raise InputError(f"{folder}: expected model.safetensors, pytorch_model.bin or an index of several, found none; "
                     f"fetch the weights into this folder")
