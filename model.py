"""model.py - ActionVLM (paper §3.1, §3.4): vision encoder -> language features -> aggregation -> detection head.

Dimensions: B batch, L frames (steps) of a window, D feature width (the language model's hidden width), V width of the
vision encoder or of the feature files, C classes, S pyramid levels, N tokens.
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import weights
from advantage import AdvantagePredictor, ClassMeanLoss
from head import DetectionHead
from vlm import LanguageModel, enable_checkpointing, proposal_text

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # of VideoMAE and InternViT


@dataclass
class Config:
    """Everything that builds the model; a checkpoint holds it."""
    descriptions: dict                  # {label: T_desc}, in class order
    lm: str                             # folder of the language model
    dim: int                            # D, its hidden width
    feature_dim: int = 0                # V of the feature files; 0 = frames through the vision encoder
    vision: dict = field(default_factory=dict)   # what the vision encoder is, see VisionEncoder
    lora_rank: int = 128
    lora_alpha: int = 256
    dtype: str = "float32"              # or "bfloat16": of frozen weights, and of arithmetic before the head
    layout: str = "frames-first"        # or "text-first", see vlm.py
    lang_tokens: str = "special"        # or "shared", "vision": whose hidden states are F_lang (Table 9)
    lambda_lang: float | str | None = None   # None: predicted (Eq. 4); "generated", a number (Table 4); 0: vision only
    use_vision: bool = True             # False: F_lang without F_vis in Eq. 5 (Table 2)
    width: int = 512                    # of the detection head
    levels: int = 6                     # S
    head_window: int = 19               # attention window of the head in steps, 0 = global
    ranges: list | None = None          # of the pyramid's levels, see DetectionHead
    class_agnostic: bool = False        # the head finds actions; external video-level scores say which
    drop_path: float = 0.1              # of the head: probability that a residual branch is skipped in training
    prior: float = 0.01                 # probability that every class starts at

    @property
    def classes(self) -> list:
        return list(self.descriptions)


class Output(NamedTuple):
    """What the model predicts for a batch. Level s of S has L_s = L / 2^s steps."""
    cls_logits: list                    # S x (B, L_s, C)
    offsets: list                       # S x (B, L_s, 2) >= 0, distances to start and end in units of the stride
    points: list                        # S x (L_s, 4) rows [t, range_lo, range_hi, stride]
    mask: list                          # S x (B, L_s) bool, False on padding
    advantage: torch.Tensor | None      # (B, L) predicted language advantage (Eq. 2); None without language
    lambda_lang: torch.Tensor | None    # (B, L) in [0, 1); None without language
    text_loss: torch.Tensor | None      # () L_tg (Eq. 8), in training with language


class ActionVLM(nn.Module):
    """The method: F_vis -> F_lang -> (F_cls, F_loc) -> proposals."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        C, D = len(config.descriptions), config.dim
        self.vision = VisionEncoder(config.vision) if not config.feature_dim else None
        self.project = nn.Linear(config.feature_dim or self.vision.dim, D)
        self.language = None
        if config.lambda_lang != 0:
            self.language = LanguageModel(config.lm, config.descriptions, config.lora_rank, config.lora_alpha,
                                          config.layout, config.lang_tokens, config.dtype)
        self.predict_advantage = AdvantagePredictor(D)
        self.head = DetectionHead(D, 1 if config.class_agnostic else C, config.width, config.levels,
                                  window=config.head_window, drop_path=config.drop_path, ranges=config.ranges,
                                  prior=config.prior)
        self.class_mean = ClassMeanLoss(C)

    @property
    def multiple(self) -> int:
        """What a window's padded length is a multiple of: the pyramid halves it, VideoMAE cuts it into clips."""
        return math.lcm(2 ** (self.config.levels - 1), self.vision.clip if self.vision else 1)

    def forward(self, batch, use_language: bool = True) -> Output:
        """batch: data.Batch. Without language the language model is not run at all."""
        f_vis = self.normalise(self.project(self.features(batch)))                             # (B, L, D)
        if not use_language or self.language is None:
            return Output(*self.head(f_vis, f_vis, batch.mask), None, None, None)
        lang = self.language(f_vis, batch.mask, self.answers(batch) if self.training else None, batch.padded)
        advantage = self.predict_advantage(lang.f_adv)                                         # Eq. 2
        lambda_lang = self.weight(advantage, lang.f_adv) * batch.mask                          # Eq. 4
        if not self.config.use_vision:                                                         # Table 2
            f_vis = torch.zeros_like(f_vis)
        f_cls = aggregate(f_vis, self.normalise(lang.f_lang_cls), lambda_lang)                 # Eq. 5
        f_loc = aggregate(f_vis, self.normalise(lang.f_lang_loc), lambda_lang)
        return Output(*self.head(f_cls, f_loc, batch.mask), advantage, lambda_lang, lang.text_loss)

    def weight(self, advantage, f_adv) -> torch.Tensor:
        """lambda_lang (B, L): Eq. 4, or one of the ablations of Tables 2 and 4."""
        if self.config.lambda_lang is None and self.config.use_vision:
            return language_weight(advantage)                                                  # Eq. 4
        if self.config.lambda_lang == "generated":
            return self.language.probability_of_yes(f_adv)
        return torch.full_like(advantage, self.config.lambda_lang if self.config.use_vision else 1.0)

    def features(self, batch) -> torch.Tensor:
        """(B, L, V): what the vision encoder makes of the frames, or the features of the files as they are."""
        if self.vision is None:
            return batch.inputs
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return self.vision(batch.inputs, batch.mask).float()

    def checkpointing(self) -> None:
        """From now on compute activations of encoder and language model again in the backward pass."""
        for part in (self.vision, self.language):
            if part is not None:
                part.checkpointing()

    def compile_layers(self, **options) -> None:
        """From now on run the layers of encoder and language model as compiled code, of one kind for sequences of any
        length; to be called after `checkpointing`. options: of torch.compile."""
        # The layers of both share one function of transformers. Beyond the usual 8 kinds (training and test, padded or
        # not, each of both) it would go on uncompiled.
        torch._dynamo.config.recompile_limit = 64
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile(dynamic=True, **options)

    @torch.no_grad()
    def calibrate(self, batches) -> None:
        """Start the projection at zero mean and unit variance of each of its inputs, as seen in a few batches.

        What is constant in the features of an encoder or a file would otherwise dominate F_vis after `normalise`.
        """
        x = torch.cat([self.features(batch)[batch.mask] for batch in batches]).double()        # (frames, V)
        scale = 1 / x.std(0, correction=0).clamp(min=1e-6 * float(x.abs().max()) + 1e-12)
        self.project.weight.mul_(scale)
        self.project.bias.copy_(-self.project.weight.double() @ x.mean(0))

    def normalise(self, f):
        """LayerNorm without parameters on both streams, so that lambda weighs like against like."""
        return F.layer_norm(f, f.shape[-1:])

    def answers(self, batch) -> list:
        """The ground truth of each window as the text T_pred. The windows hold it on the CPU: no GPU is waited for."""
        names = self.config.classes
        truth = [(w.segments, w.labels) for w in batch.windows] or zip(batch.segments, batch.labels)
        return [proposal_text(s.tolist(), [names[i] for i in l.tolist()]) for s, l in truth]


def language_weight(advantage: torch.Tensor) -> torch.Tensor:
    """Eq. 4: lambda_lang = 2 sigmoid(ReLU(A)) - 1, (B, L) -> (B, L) in [0, 1).

    clamp is ReLU with slope 1 (not 0) at exactly 0, where the predictor starts: the detection loss reaches it there.
    """
    return 2 * torch.sigmoid(advantage.clamp(min=0)) - 1                                       # Eq. 4


def aggregate(f_vis: torch.Tensor, f_lang: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eq. 5: language as a weighted residual. f_vis, f_lang (B, L, D), weight (B, L) -> (B, L, D)."""
    return f_vis + weight[..., None] * f_lang                                                  # Eq. 5


class VisionEncoder(nn.Module):
    """E_vis: one feature per frame, the mean over the patches of VideoMAE or InternViT, without a norm over them.

    VideoMAE reads clips of 16 frames; its steps of 2 frames are interpolated linearly in time. InternViT reads every
    frame by itself. config: kind ("videomae" if absent, or "internvit"), fields of transformers' VideoMAEConfig or
    InternVLVisionConfig (image_size, hidden_size, ...), and pretrained_image_size (if absent, image_size): positions
    are interpolated from its grid of patches. weights.vision_config makes the config of published weights.
    """

    def __init__(self, config: dict):
        super().__init__()
        config = dict(config)
        self.kind = config.pop("kind", "videomae")
        pretrained = config.pop("pretrained_image_size", None)
        if self.kind == "internvit":
            self.internvit = build_internvit(config, pretrained)
            self.clip = self.tubelet = 1
        else:
            self.videomae = build_videomae(config, pretrained)
            self.clip, self.tubelet = self.videomae.config.num_frames, self.videomae.config.tubelet_size
        self.dim = self.backbone.config.hidden_size
        for name, values in (("mean", IMAGE_MEAN), ("std", IMAGE_STD)):                  # moved to the device once
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @property
    def backbone(self) -> nn.Module:
        """The module of transformers: what stands in checkpoints is named after its kind."""
        return self.internvit if self.kind == "internvit" else self.videomae

    def load(self, path) -> list:
        """Take published weights, all of them or InputError; -> names in the file that are not used by design."""
        tensors, unused = weights.vision_tensors(path, self.kind, self.backbone.state_dict())
        self.backbone.load_state_dict(tensors)
        return unused

    def checkpointing(self) -> None:
        """From now on compute activations again in the backward pass: less memory, more time, the same gradients."""
        enable_checkpointing(self.backbone)

    def forward(self, frames: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """frames (B, L k, 3, H, W) uint8, mask (B, L) bool -> (B, L, V); L k is a multiple of the clip length."""
        L, k = mask.size(1), frames.size(1) // mask.size(1)                              # k frames a step
        if k * L % self.clip:
            raise ValueError(f"expected a multiple of {self.clip} frames, found {k * L}")
        pixels = (frames / 255 - self.mean) / self.std
        steps = self.each_frame(pixels) if self.kind == "internvit" else self.each_clip(pixels)
        # Padding takes the last real step, or interpolation would mix it into the last real frame.
        last = ((k * mask.sum(1) - 1) // self.tubelet).clamp(min=0)                          # (B,)
        index = torch.arange(steps.size(1), device=steps.device)[None].minimum(last[:, None])
        steps = steps.gather(1, index[..., None].expand_as(steps))                       # (B, L/tubelet, V)
        # As a product, because the gradient of `interpolate` itself is not deterministic on a GPU.
        linear = F.interpolate(torch.eye(steps.size(1), device=steps.device)[None], L, mode="linear")[0]
        return torch.einsum("btv,tl->blv", steps, linear.to(steps.dtype))

    def each_clip(self, pixels: torch.Tensor) -> torch.Tensor:
        """VideoMAE: (B, L, 3, H, W) -> (B, L/tubelet, V)."""
        clips = rearrange(pixels, "b (n f) c h w -> (b n) f c h w", f=self.clip)
        tokens = self.videomae(clips).last_hidden_state                                  # (B L/clip, tokens, V)
        return rearrange(tokens, "(b n) (t hw) v -> b (n t) hw v", b=len(pixels), t=self.clip // self.tubelet).mean(2)

    def each_frame(self, pixels: torch.Tensor) -> torch.Tensor:
        """InternViT: (B, L, 3, H, W) -> (B, L, V), the class token left out; 64 images at a time bound the memory."""
        images = rearrange(pixels, "b l c h w -> (b l) c h w").split(64)
        means = [self.internvit(part).last_hidden_state[:, 1:].mean(1) for part in images]
        return rearrange(torch.cat(means), "(b l) v -> b l v", b=len(pixels))


def build_videomae(config: dict, pretrained: int | None) -> nn.Module:
    """VideoMAEModel without weights; pretrained: image side (pixels) whose grid of positions is interpolated."""
    from transformers import VideoMAEConfig, VideoMAEModel
    videomae = VideoMAEModel(VideoMAEConfig(**config, use_mean_pooling=True))            # no norm over tokens
    for layer in videomae.encoder.layer:
        layer.attention.attention.key.bias = None      # transformers 5.17 has one, without effect; VideoMAE has none
    if pretrained and pretrained != videomae.config.image_size:
        videomae.embeddings.position_embeddings = videomae_positions(videomae.config, pretrained)
    return videomae


def videomae_positions(config, pretrained: int) -> torch.Tensor:
    """(1, t h w, V): the sinusoids of the pretrained grid, at every time step interpolated bicubically to ours."""
    steps, side = config.num_frames // config.tubelet_size, pretrained // config.patch_size
    grid = rearrange(weights.sinusoids(steps * side ** 2, config.hidden_size), "(t h w) v -> t v h w", t=steps, h=side)
    ours = F.interpolate(grid, [config.image_size // config.patch_size] * 2, mode="bicubic")
    return rearrange(ours, "t v h w -> () (t h w) v")


def build_internvit(config: dict, pretrained: int | None) -> nn.Module:
    """InternVLVisionModel without weights. It is built for the pretrained grid, and interpolates at every call."""
    from transformers import InternVLVisionConfig, InternVLVisionModel
    config = config | {"image_size": pretrained or config["image_size"], "use_mean_pooling": True}
    return InternVLVisionModel(InternVLVisionConfig(**config))


# A VideoMAE small enough to train from scratch on a CPU; a wide start, since the usual 0.02 suits wide layers.
TINY_VISION = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192,
                   image_size=32, patch_size=16, num_frames=16, tubelet_size=2, initializer_range=0.2)
