"""support/tiny_lm.py - train the language model of `--lm tiny` on this repository's own texts.

    python -m support.tiny_lm                 # writes support/tiny-lm/, minutes on one CPU core

First it learns to look back: of random vectors, each with three placeholders after it, the hidden
state of a placeholder has to be nearest to its own. Then it also reads text."""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from support.language_models import TINY_LM
from vlm import ANSWER, NO_ACTION, instruction, prefix_lm_mask, proposal_text

DIM, BATCH, LENGTH, FRAMES, END = 128, 16, 256, 16, "<|endoftext|>"

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=900, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=TINY_LM, help="(%(default)s)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    sets, held_out = read_descriptions()
    model, tokenizer = make_tiny_lm(args.out, [*map(instruction, sets), ANSWER, NO_ACTION])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps, pct_start=0.05)
    for step in range(args.steps):
        text, frames = torch.zeros(()), frame_loss(model, prefix=step % 2 * 4 * FRAMES)
        if step >= 0.33 * args.steps:              # it learns to look back first
            text = text_loss(model, tokenizer, sets, rng)
        (frames + 0.1 * text).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: text {text:.3f}, frames {frames:.3f}")
    rows = [torch.tensor(tokenizer(END + sentence).input_ids) for sentence in held_out]
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    with torch.no_grad():
        loss = model(labels.clamp(min=0), labels=labels).loss
    print(f"{len(held_out)} held-out sentences: {loss:.3f} nats a token")
    model.to(torch.bfloat16).save_pretrained(args.out)

def read_descriptions():
    """[{label: sentence}] of descriptions/, and every 20th line, which training does not see."""
    sets, held_out = [], []
    for path in sorted((TINY_LM.parents[1] / "descriptions").glob("*.json")):
        lines = list(json.loads(path.read_text()).items())
        held_out += lines[7::20]
        del lines[7::20]
        sets.append(dict(lines))
    return sets, [f"{label}: {sentence}" for label, sentence in held_out if sentence]

def make_tiny_lm(folder, texts, dim=DIM):
    """Write an untrained model with a tokenizer of `texts` into a folder -> both."""
    tokenizer = make_tokenizer(texts)
    # With a pad_token_id, the embedding of END would be 0, and the tied output could not write it.
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=dim, intermediate_size=3 * dim, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32768,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=None))
    # Wider than transformers' 0.02, or the layers drown what they read.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=dim ** -0.5)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return model, tokenizer

def make_tokenizer(texts):
    """Byte-level BPE, digit by digit; it takes any text."""
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2000, special_tokens=[END], show_progress=False, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)

def text_loss(model, tokenizer, sets, rng):
    """Instructions and answers; half of the rows repeat a piece of text or of random tokens."""
    rows = []
    for _ in range(BATCH):
        ids = []
        while len(ids) < LENGTH:
            descriptions = sets[rng.integers(len(sets))]
            labels = rng.permutation(list(descriptions))[:rng.integers(2, 13)]
            some = {str(label): descriptions[label] for label in labels}
            times = np.sort(rng.integers(0, 300, (rng.integers(6), 2)))
            answer = proposal_text(times, rng.choice(labels, len(times)))
            ids += tokenizer(instruction(some) + ANSWER + answer + END).input_ids
        kind, piece = rng.integers(4), rng.integers(8, LENGTH // 2)
        if kind == 3:
            ids = rng.integers(0, len(tokenizer), LENGTH).tolist()
        if kind >= 2:
            ids = ids[:piece] * (LENGTH // piece + 1)
        rows.append(ids[:LENGTH])
    rows = torch.tensor(rows)
    return model(rows, labels=rows).loss

def frame_loss(model, prefix):
    """Cross-entropy over the frames of a sequence: whose vector is nearest to a placeholder's
    hidden state? Random vectors in place of frames; prefix: see vlm.prefix_lm_mask."""
    scale = model.get_input_embeddings().weight.std().detach()
    vectors = torch.randn(BATCH, FRAMES, 1, DIM)
    placeholders = torch.randn(BATCH, 1, 3, DIM).expand(-1, FRAMES, -1, -1)
    tokens = scale * torch.cat([vectors, placeholders], 2).flatten(1, 2)     # (B, 4 L, D)
    mask = prefix_lm_mask(torch.ones(tokens.shape[:2], dtype=torch.bool), prefix)
    hidden = model.model(inputs_embeds=tokens, attention_mask=mask).last_hidden_state
    hidden = F.normalize(hidden.unflatten(1, (FRAMES, 4))[:, :, 1:], dim=-1)  # (B, L, 3, D)
    cosine = torch.einsum("bltd,bmd->blmt", hidden, F.normalize(vectors[:, :, 0], dim=-1))
    own = torch.arange(FRAMES)[:, None].expand(BATCH, -1, 3)                 # (B, L, 3)
    return F.cross_entropy((10 * cosine).flatten(0, 1), own.flatten(0, 1))

if __name__ == "__main__":
    main()
