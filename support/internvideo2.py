"""support/internvideo2.py - what InternVideo2 (S, B, L) has beyond the layers of InternViT.
Source: OpenGVLab/InternVideo, folder InternVideo2/single_modality."""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

class ClipEmbeddings(nn.Module):
    """A class token, then the patches by frame, row and column; the positions of all are added.
    The table keeps the file's size. config: InternVLVisionConfig with num_frames."""
    def __init__(self, config):
        super().__init__()
        width, patch, self.frames = config.hidden_size, config.patch_size[0], config.num_frames
        projection = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch))
        self.patch_embeddings = nn.ModuleDict({"projection": projection})      # names of InternViT
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        count = 1 + self.frames * (config.image_size[0] // patch) ** 2
        self.position_embeddings = nn.Parameter(torch.zeros(1, count, width))

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
