"""support/internvideo2.py - what InternVideo2 (S, B, L) has beyond the layers of InternViT.
Source: OpenGVLab/InternVideo, folder InternVideo2/single_modality."""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

FRAMES = 8                      # of a clip in training; no tensor of a file tells them

def clip_fields(positions: int, patch: int) -> dict:
    """Fields of the config that a file with 1 + 8 n n positions has, and VideoMAE has not."""
    side = round(max(1, (positions - 1) / FRAMES) ** 0.5)
    return dict(kind="internvideo2", num_frames=FRAMES, pretrained_frames=FRAMES,
                pretrained_image_size=side * patch, norm_type="rms_norm", use_qk_norm=True,
                attention_bias=False, hidden_act="gelu_pytorch_tanh")    # as in training's kernel

class ClipEmbeddings(nn.Module):
    """A class token, then the patches by frame, row and column; the positions of all are added.
    The table keeps the file's size. config: InternVLVisionConfig with fields of `clip_fields`."""
    def __init__(self, config):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size[0]
        self.frames, self.side = config.pretrained_frames, config.image_size[0] // patch
        projection = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch))
        self.patch_embeddings = nn.ModuleDict({"projection": projection})      # names of InternViT
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        count = 1 + self.frames * self.side ** 2
        self.position_embeddings = nn.Parameter(torch.zeros(1, count, width))

    def forward(self, clips, bool_masked_pos=None):
        """(B, T, 3, H, H) -> (B, 1 + T h h, V). transformers passes bool_masked_pos, here None."""
        patches = self.patch_embeddings["projection"](clips.transpose(1, 2))    # (B, V, T, h, h)
        first, rest = self.position_embeddings.tensor_split([1], dim=1)
        rest = resize_positions(rest, (self.frames, self.side), patches.shape[2:4])
        class_token = (self.cls_token + first).expand(len(clips), -1, -1)
        return torch.cat([class_token, patches.flatten(2).mT + rest], 1)

def resize_positions(positions, old, new):
    """Interpolate (1, T h h, V) in time, then in space. old, new: (T, h) before and after."""
    grid = rearrange(positions, "() (t h w) v -> (h w) v t", t=old[0], h=old[1])
    grid = F.interpolate(grid, new[0], mode="linear")
    grid = rearrange(grid, "(h w) v t -> t v h w", h=old[1])
    grid = F.interpolate(grid, (new[1], new[1]), mode="bicubic")
    return rearrange(grid, "t v h w -> () (t h w) v")
