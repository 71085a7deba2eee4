"""Shared fixtures: a tiny model on random features, small enough to run everywhere in milliseconds."""
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")                    # a test that wants the network is a wrong test
os.environ.setdefault("OMP_NUM_THREADS", "1")                   # threads that wait for each other crawl on a busy machine
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import vlm
from advantage import frame_classes
from data import Batch
from model import ActionVLM, Config
from support.tiny_lm import make_tokenizer

CLASSES = {"Jump": "The person bends the knees, then leaves the ground.", "Run": "Legs alternate quickly.",
           "Throw": "The arm swings forward and lets the ball go."}


def make_random_lm(folder, texts, dim=128) -> None:
    """Write a small random Qwen2 and a byte-level BPE tokenizer of texts."""
    tokenizer = make_tokenizer(texts)
    # With a pad_token_id, the embedding of the end would be 0. Embeddings are tied here, so the
    # model could never learn to write the end.
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=dim, intermediate_size=2 * dim,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32768, tie_word_embeddings=True, initializer_range=dim ** -0.5,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=None, bos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@pytest.fixture(autouse=True)
def no_report(request, monkeypatch):
    """Drawing report.png takes most of the time of a small run. These two files draw it, and so do commands of their own."""
    if request.module.__name__ not in ("test_commands", "test_figures"):
        monkeypatch.setattr("support.figures.report", lambda path, *_, **__: path.write_bytes(b"no picture"))


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm") / "tiny"
    make_random_lm(folder, [vlm.instruction(CLASSES), "Jump: 12-48, Run: 60-75."], dim=32)
    return str(folder)


@pytest.fixture
def make_model(lm_folder):
    """Factory of small models; keyword arguments go to Config."""
    def make(seed=0, **config):
        torch.manual_seed(seed)
        defaults = dict(descriptions=CLASSES, lm=lm_folder, dim=32, feature_dim=8, lora_rank=4, lora_alpha=8,
                        width=16, levels=3, head_window=0)
        return ActionVLM(Config(**(defaults | config)))
    return make


def feature_batch(lengths, L=None, V=8, seed=0, segments=None, labels=None):
    """A Batch of random features: one clip per length, padded to L."""
    rng = np.random.default_rng(seed)
    L = L or -(-max(lengths) // 4) * 4
    inputs = torch.zeros(len(lengths), L, V)
    for b, n in enumerate(lengths):
        inputs[b, :n] = torch.from_numpy(rng.normal(size=(n, V)).astype(np.float32))
    mask = torch.arange(L)[None] < torch.tensor(lengths)[:, None]
    segments = segments or [torch.tensor([[1.0, 6.0]])] * len(lengths)
    labels = labels or [torch.tensor([1])] * len(lengths)
    names = list(CLASSES)
    answers = [vlm.proposal_text(s.tolist(), [names[i] for i in y.tolist()]) for s, y in zip(segments, labels)]
    return Batch(inputs, mask, segments, labels, frame_classes(segments, labels, L, len(names)), answers,
                 [f"clip {b}" for b in range(len(lengths))], windows=[])


def language_model(lm_folder, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = vlm.LanguageModel(lm_folder, CLASSES, lora_rank=4, lora_alpha=8, **kwargs).eval()
    for name, parameter in model.named_parameters():                # LoRA's B starts at 0: make it count
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def language_inputs(lengths=(8,), L=8, D=32, seed=0):
    """(f_vis, mask) of random clips."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(len(lengths), L, D, generator=generator)
    mask = torch.arange(L)[None] < torch.tensor(lengths)[:, None]
    return f * mask[..., None], mask
