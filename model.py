"""model.py - ActionVLM (paper §3.1, §3.4): vision encoder -> language -> aggregation -> head.
The dimensions of all files:
    B batch                          L frames (steps) of a window
    C classes                        D feature width = hidden width of the language model
    V width of the vision encoder or of the feature files
    S levels of the pyramid          N tokens of a sequence, or segments of a window"""
import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from advantage import AdvantagePredictor, ClassMeans
from head import DetectionHead
from support.arithmetic import stretch
from support.language_models import enable_checkpointing
from support.weights import build_encoder, vision_tensors
from vlm import LanguageModel

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # of all published encoders

@dataclass
class Config:
    """All that builds the model; a checkpoint holds it."""
    descriptions: dict                  # {label: T_desc}, in class order
    lm: str = ""                        # folder of the language model; "" = vision only
    dim: int = 128                      # D
    feature_dim: int = 0                # V of the feature files; 0 = frames and a vision encoder
    vision: dict = field(default_factory=dict)   # of the vision encoder, see VisionEncoder
    lora_rank: int = 128
    lora_alpha: float = 256
    dtype: str = "float32"              # or "bfloat16": frozen weights, arithmetic before the head
    layout: str = "frames-first"        # or "text-first", see vlm.py
    language_stride: int = 1            # K: the language model reads the mean of K frames
    width: int = 512                    # of the detection head
    levels: int = 6                     # S
    head_window: int = 19               # attention window of the head in steps, 0 = global
    ranges: list | None = None          # of the pyramid's levels, see DetectionHead
    class_agnostic: bool = False        # one class; external video-level scores say which it is
    drop_path: float = 0.1              # of the head, see DetectionHead
    prior: float = 0.01                 # probability that every class starts at
    lambda_loc: float = 1.0             # weight of the DIoU loss, Eq. 6
    label_smoothing: float = 0.0        # share of the class targets spread over all classes

    @property
    def classes(self):
        return list(self.descriptions)

class ActionVLM(nn.Module):
    """The method: F_vis -> F_lang -> (F_cls, F_loc) -> proposals."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        C, D = len(config.descriptions), config.dim
        self.vision = None if config.feature_dim else VisionEncoder(config.vision)
        self.project = nn.Linear(config.feature_dim or self.vision.dim, D)
        self.language = None
        if config.lm:
            self.language = LanguageModel(config.lm, config.descriptions, config.lora_rank,
                                          config.lora_alpha, config.layout, config.dtype,
                                          config.language_stride)
            self.standardise_cls, self.standardise_loc = Standardise(D), Standardise(D)
            self.standardise_adv = Standardise(D)
        self.predict_advantage = AdvantagePredictor(D)
        self.language_weight, self.aggregate = language_weight, aggregate   # ablations replace them
        self.head = DetectionHead(
            D, 1 if config.class_agnostic else C, config.width, config.levels,
            window=config.head_window, drop_path=config.drop_path, ranges=config.ranges,
            prior=config.prior, lambda_loc=config.lambda_loc,
            label_smoothing=config.label_smoothing)
        self.class_means = ClassMeans(C)

    def forward(self, batch, use_language=True):
        """batch: data.Batch. Without language the language model is not run at all."""
        f_vis = self.visual(batch)                                              # (B, L, D)
        if not use_language or self.language is None:
            return self.head(f_vis, f_vis, batch.mask)
        answers = batch.answers if self.training else None
        lang = self.language(f_vis, batch.mask, answers)                        # Eq. 7, 8
        f_lang_cls = self.standardise_cls(lang.f_lang_cls, batch.mask)
        f_lang_loc = self.standardise_loc(lang.f_lang_loc, batch.mask)
        f_adv = self.standardise_adv(lang.f_adv, batch.mask)
        advantage = self.predict_advantage(f_adv)                               # Eq. 2
        lambda_lang = self.language_weight(advantage) * batch.mask              # Eq. 4
        f_cls = self.aggregate(f_vis, f_lang_cls, lambda_lang)                  # Eq. 5
        f_loc = self.aggregate(f_vis, f_lang_loc, lambda_lang)
        output = self.head(f_cls, f_loc, batch.mask)
        return replace(output, advantage=advantage, lambda_lang=lambda_lang,
                       text_loss=lang.text_loss)

    def visual(self, batch):
        """F_vis (B, L, D), of unit scale by a LayerNorm without parameters."""
        f_vis = self.project(self.features(batch))
        return F.layer_norm(f_vis, f_vis.shape[-1:])

    def features(self, batch):
        """(B, L, V): the output of the vision encoder, or the rows of the feature files."""
        if self.vision is None:
            return batch.inputs
        half = self.config.dtype == "bfloat16"
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=half):
            return self.vision(batch.inputs, batch.mask).float()

    @torch.no_grad()
    def calibrate(self, batches):
        """Start the projection by standardising every input: mean 0, variance 1 over `batches`.
        Encoder features share a large offset. LayerNorm would keep it, and flatten the rest."""
        rows = [self.features(batch)[batch.mask] for batch in batches]
        x = torch.cat(rows).double()                                                     # (n, V)
        smallest = 1e-6 * float(x.abs().max()) + 1e-12
        scale = 1 / x.std(0, correction=0).clamp(min=smallest)
        weight = self.project.weight
        weight.mul_(scale)
        self.project.bias.copy_(-weight.double() @ x.mean(0))

    def running_means(self):
        """Buffers that every training step moves: M of Eq. 6, the statistics of `Standardise`."""
        moved = ("head.loss_normalizer", "standardise_")
        return [b for name, b in self.named_buffers() if name.startswith(moved)]

    @property
    def multiple(self):
        """A padded window is a multiple of it: the pyramid halves it, encoders cut it in clips."""
        clip = self.vision.clip if self.vision else 1
        return math.lcm(clip, 2 ** (self.config.levels - 1))

    def checkpointing(self):
        """Compute activations of encoder and language model again in the backward pass."""
        for part in (self.vision, self.language):
            if part is not None:
                part.checkpointing()

    def compile_layers(self, **options):
        """Compile the layers of both models, after `checkpointing`. options: of torch.compile."""
        # All layers share one function of transformers, and torch gives up after 8 kinds of calls:
        # training or test, one window or several, of both models.
        torch._dynamo.config.recompile_limit = 64
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile(dynamic=True, **options)

def language_weight(advantage):
    """Eq. 4: lambda_lang = 2 sigmoid(ReLU(A)) - 1, (B, L) -> (B, L) in [0, 1).
    The predictor starts at exactly 0. torch's ReLU has gradient 0 there, so the detection loss
    could never move it; clamp has gradient 1."""
    return 2 * torch.sigmoid(advantage.clamp(min=0)) - 1                        # Eq. 4

def aggregate(f_vis, f_lang, weight):
    """Eq. 5: language as a weighted residual. f_vis, f_lang (B, L, D), weight (B, L)."""
    return f_vis + weight[..., None] * f_lang                                   # Eq. 5

class Standardise(nn.Module):
    """Batch norm over real frames, without parameters: lambda weighs like against like.
    Hidden states of a language model have large components that are the same for every frame.
    LayerNorm would keep them, and shrink what differs. Training takes mean and variance of the
    batch; test time takes their running means."""
    def __init__(self, dim, momentum=0.1):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, f, mask):
        """f: (B, L, D), mask: (B, L) bool, False on padding -> (B, L, D)."""
        mean, variance = self.mean, self.variance
        if self.training:
            real, count = mask[..., None], mask.sum()
            mean = (f * real).sum((0, 1)) / count.clamp(min=1)                  # (D,)
            squared = (f - mean).square() * real
            variance = squared.sum((0, 1)) / count.clamp(min=1)
            # The first steps count alike, so the start does not matter.
            self.steps += count > 1
            share = (1 / self.steps.clamp(min=1)).clamp(min=self.momentum)
            share = share * (count > 1)
            self.mean.lerp_(mean.detach(), share)
            self.variance.lerp_(variance.detach(), share)
        return (f - mean) * (variance + 1e-6).rsqrt()

class VisionEncoder(nn.Module):
    """E_vis: one feature per frame, the mean over the patches, without a norm over them.
    VideoMAE reads clips of 16 frames, and its steps of 2 frames are interpolated linearly in time.
    InternVideo2 reads clips of 8 frames in steps of 1. InternViT reads every frame by itself.
    config: see support/weights.py:build_encoder."""
    def __init__(self, config):
        super().__init__()
        self.kind = config.get("kind", "videomae")
        self.backbone, self.clip, self.tubelet = build_encoder(config)
        self.dim = self.backbone.config.hidden_size
        for name, values in (("mean", IMAGE_MEAN), ("std", IMAGE_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, frames, mask):
        """frames: (B, k L, 3, H, W) uint8, k frames a step. mask: (B, L) bool -> (B, L, V).
        k L is a multiple of the clip length, or ValueError."""
        L = mask.size(1)
        k = frames.size(1) // L
        if k * L % self.clip:
            raise ValueError(f"expected a multiple of {self.clip} frames, found {k * L}")
        pixels = (frames / 255 - self.mean) / self.std
        steps = self.each_clip(pixels)                                      # (B, kL/tubelet, V)
        real = -(-k * mask.sum(1) // self.tubelet)                          # (B,), rounded up
        return stretch(steps, real, L)                                      # (B, L, V)

    def each_clip(self, pixels):
        """(B, L, 3, H, W) -> (B, L/tubelet, V), from L / clip clips; an image is a clip of one."""
        clips = rearrange(pixels, "b (n f) c h w -> (b n) f c h w", f=self.clip)
        if self.kind == "internvit":
            clips = clips.squeeze(1)
        means = []
        for part in clips.split(64):                                        # bounds the memory
            tokens = self.backbone(part).last_hidden_state                  # (64, patches, V)
            if self.kind != "videomae":
                tokens = tokens[:, 1:]                                      # no class token
            means.append(tokens.unflatten(1, (self.clip // self.tubelet, -1)).mean(2))
        return rearrange(torch.cat(means), "(b n) t v -> b (n t) v", b=len(pixels))

    def load(self, path):
        """Take all of a file's weights, or InputError; -> names that are unused by design."""
        tensors, unused = vision_tensors(path, self.kind, self.backbone.state_dict())
        self.backbone.load_state_dict(tensors)
        return unused

    def checkpointing(self):
        enable_checkpointing(self.backbone)
