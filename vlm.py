"""vlm.py - language feature generation (paper §3.2, Eq. 7-8, Appendix B).

For every frame l the language model reads the vision feature v_l and three special tokens. It also
reads an instruction that holds the description of every action:

    frames-first:  v_1 [cls] [loc] [adv]  ...  v_L [cls] [loc] [adv]  T_ins(T_desc)  |  T_pred
    text-first:    T_ins(T_desc)  v_1 [cls] [loc] [adv]  ...  v_L [cls] [loc] [adv]  |  T_pred

Left of the bar, frames-first tokens see each other in both directions (a prefix language model).
Under a causal mask no special token could see a description that follows it. The answer T_pred is
causal, and no other token sees it. Text-first has an ordinary causal mask.
Dimensions beside those of model.py: T tokens of the prompt, A of the answer, N of the whole
sequence, n that one call reads."""
import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import DynamicCache

from support import language_models
from support.annotations import expect
from support.arithmetic import mean_of_groups, stretch

SPECIAL_TOKENS = ("[cls]", "[loc]", "[adv]")
ANSWER = "\nAnswer: "                # stands between prompt and T_pred
NO_ACTION = "No action."             # T_pred of a window without actions
LONGEST_ANSWER = 256                 # tokens that the check of the length leaves for T_pred

class LanguageFeatures(NamedTuple):
    """What the language model gives for a batch."""
    f_lang_cls: Tensor               # (B, L, D) last hidden states of [cls]
    f_lang_loc: Tensor               # (B, L, D) of [loc]
    f_adv: Tensor                    # (B, L, D) of [adv]
    text_loss: Tensor | None         # () L_tg, Eq. 8; None without answers

def instruction(descriptions):
    """T_ins with T_desc in its place (Appendix B.2).
    descriptions: {label: sentence}; an empty sentence leaves the label alone."""
    lines = []
    for label, sentence in descriptions.items():
        lines.append(f"{label}: {sentence}" if sentence else label)
    return ("This is a video reasoning task for action localization. Identify the start and end "
            "frames of each action in the given video, and output the list of action proposals. "
            "The candidate actions include:\n" + "\n".join(lines))

def proposal_text(segments, labels):
    """Eq. 7: the answer T_pred for ground truth, "LongJump: 12-48, Diving: 60-75."
    segments: (N, 2) in frames of the window. labels: N names. The paper ranks proposals by their
    confidence. Ground truth has none, so they stand in order of start."""
    rows = []
    for (start, end), label in zip(segments, labels):
        start = max(0, round(float(start)))               # a feature sees beyond its window
        rows.append((start, round(float(end)), label))
    if not rows:
        return NO_ACTION
    return ", ".join(f"{label}: {start}-{end}" for start, end, label in sorted(rows)) + "."

def prefix_lm_mask(valid, prefix):
    """Attention mask of a prefix language model: (B, 1, N, N), True where row may see column.
    valid: (B, N) bool, False on padding. The first `prefix` tokens see each other in both
    directions; every later token sees the prefix and the tokens before it. Only padding itself
    sees padding, so that no row is empty. prefix = 0 gives the causal mask."""
    N = valid.size(1)
    allowed = valid.new_ones(N, N).tril()
    allowed[:prefix, :prefix] = True
    itself = torch.eye(N, dtype=torch.bool, device=valid.device)
    allowed = allowed & valid[:, None, :] | itself                                # (B, N, N)
    return allowed[:, None]

class LanguageModel(nn.Module):
    """M_lang: a causal language model with LoRA, frozen otherwise, and three special tokens.
    folder: see `support.language_models`. descriptions: {label: sentence}, in class order.
    layout: "frames-first" (the paper's order) or "text-first", see the top of this file.
    dtype: "float32" or "bfloat16", of frozen weights and arithmetic; the rest stays float32.
    stride: K frames share one mean v_l and its special tokens; the paper has K = 1."""
    def __init__(self, folder, descriptions, lora_rank=128, lora_alpha=256,
                 layout="frames-first", dtype="float32", stride=1):
        super().__init__()
        self.layout, self.stride, self.classes = layout, stride, list(descriptions)
        base, self.tokenizer = language_models.load_language_model(folder, getattr(torch, dtype))
        self.lm = language_models.add_lora(base, lora_rank, lora_alpha)
        embeddings = base.get_input_embeddings()
        table = embeddings(torch.arange(len(embeddings.weight)))       # Gemma's are scaled
        self.dim = table.size(1)
        self.embedding_scale = float(table.float().std())
        special_tokens = torch.randn(len(SPECIAL_TOKENS), self.dim) * self.embedding_scale
        self.special_tokens = nn.Parameter(special_tokens)
        self.register_buffer("prompt_ids", torch.empty(0, dtype=torch.long), persistent=False)
        self.set_descriptions(descriptions)

    def set_descriptions(self, descriptions):
        """Read other descriptions from now on (unmatched ones measure modality bias, §4.3)."""
        self.prompt_ids = self.prompt_ids.new_tensor(self.tokenize(instruction(descriptions)))
        self.kept_prompt = None

    def forward(self, f_vis, mask, answers=None):
        """f_vis: (B, L, D) of unit scale. mask: (B, L) bool. answers: B texts T_pred, or None."""
        L = f_vis.size(1)
        steps = math.ceil(L / self.stride)
        answer_ids, answer_valid, labels = self.answer_tokens(answers, mask)
        tokens, valid = self.sequence(f_vis, mask, answer_ids, answer_valid)      # (B, N, D)
        cache = None
        if self.kept_prompt is not None:
            tokens = tokens[:, len(self.prompt_ids):]
            cache = DynamicCache((layer.keys, layer.values) for layer in self.kept_prompt.layers)
            cache.batch_repeat_interleave(len(tokens))
        hidden = self.hidden_states(tokens, valid, self.prefix(L), cache)         # (B, n, D)
        hidden, answer = hidden.tensor_split([hidden.size(1) - answer_ids.size(1)], dim=1)
        frames = hidden[:, -4 * steps:]
        if self.layout == "frames-first":
            frames = hidden[:, :4 * steps]
        frame, cls, loc, adv = rearrange(frames.float(), "b (l four) d -> four b l d", four=4)
        features = self.read_out(frame, cls, loc, adv)
        if self.stride > 1:
            real = (mask.sum(1) / self.stride).ceil().long()                      # (B,)
            features = [stretch(f, real, steps * self.stride)[:, :L] for f in features]
        text_loss = None if answers is None else self.text_loss(answer, labels)
        return LanguageFeatures(*features, text_loss)

    def read_out(self, frame, cls, loc, adv):
        """The hidden states of v_l, [cls], [loc], [adv] -> F_lang,cls, F_lang,loc, F_adv."""
        return cls, loc, adv

    def text_loss(self, hidden, labels):
        """Eq. 8: cross-entropy of the answer. hidden: (B, A, D). labels: (B, A), -100 = none."""
        logits = self.logits(hidden).float().flatten(0, 1)                        # (B A, vocab)
        return F.cross_entropy(logits, labels.flatten(), ignore_index=-100)       # Eq. 8

    def sequence(self, f_vis, mask, answer_ids, answer_valid):
        """Frames and prompt in order of the layout, then the answer (answer_ids: (B, A)).
        Returns embeddings (B, N, D) and which of them are real (B, N)."""
        f_vis, mask = mean_of_groups(f_vis, mask, self.stride)
        B, L = mask.size()
        special = repeat(self.special_tokens, "three d -> b l three d", b=B, l=L)
        v = f_vis[:, :, None] * self.embedding_scale           # the scale of the embeddings
        frames = torch.cat([v, special], dim=2)                                   # (B, L, 4, D)
        frames = rearrange(frames, "b l four d -> b (l four) d")                  # (B, 4L, D)
        prompt = repeat(self.embed(self.prompt_ids), "t d -> b t d", b=B)         # (B, T, D)
        real = repeat(mask, "b l -> b (l four)", four=4)
        tokens = [frames, prompt]
        valid = [real, mask.new_ones(prompt.shape[:2])]
        if self.layout == "text-first":
            tokens.reverse()
            valid.reverse()
        tokens.append(self.embed(answer_ids))
        valid.append(answer_valid)
        return torch.cat(tokens, dim=1), torch.cat(valid, dim=1)

    def answer_tokens(self, answers, mask):
        """Token ids of the answers, which of them are real, and labels; all (B, A).
        A label is the next token where it counts for Eq. 8, else -100."""
        lead = self.tokenize(ANSWER)
        eos = self.tokenizer.eos_token_id
        rows = [lead + self.tokenize(text) + [eos] for text in answers or []]
        longest = max(map(len, rows), default=0)
        rows = [row + [-100] * (longest - len(row)) for row in rows]
        ids = torch.tensor(rows, device=mask.device).long().view(len(mask), longest)
        labels = ids.roll(-1, dims=1)                          # the token that follows
        labels[:, :len(lead) - 1] = -100
        labels[:, -1:] = -100
        return ids.clamp(min=0), ids >= 0, labels

    def hidden_states(self, tokens, valid, prefix, cache=None):
        """Last hidden states (B, n, D) of tokens (B, n, D), the last n of a sequence.
        valid: (B, N), the real tokens of the whole sequence. prefix: see `prefix_lm_mask`.
        cache: keys and values of the tokens before; the new ones are added to it."""
        n = tokens.size(1)
        position = (valid.cumsum(1) - 1).clamp(min=0)                             # (B, N)
        mask = prefix_lm_mask(valid, prefix)[:, :, -n:]                           # (B, 1, n, N)
        decoder = self.lm.get_base_model().base_model
        before = {} if cache is None else {language_models.name_of_cache(decoder): cache}
        # A compiled layer would be compiled again for every layer's place in the cache.
        eager = nullcontext() if cache is None else torch.compiler.set_stance("force_eager")
        with self.autocast(tokens.device), eager:
            masks = language_models.attention_masks(self.lm.config, mask, position)
            return decoder(inputs_embeds=tokens.to(self.lm.dtype), position_ids=position[:, -n:],
                           attention_mask=masks, use_cache=cache is not None,
                           **before).last_hidden_state

    def prefix(self, L):
        """Number of tokens that see each other in both directions."""
        return self.sequence_length(L) if self.layout == "frames-first" else 0

    def sequence_length(self, L):
        """Tokens of a window of L frames with the prompt, without the answer: 4 L/K + T."""
        return 4 * math.ceil(L / self.stride) + len(self.prompt_ids)

    def check_length(self, L):
        """Raises InputError where the language model has too few positions for L frames."""
        found = self.sequence_length(L) + LONGEST_ANSWER
        limit = self.lm.config.max_position_embeddings
        expect(found <= limit, "descriptions", f"at most {limit} tokens (positions of --lm)",
               f"{found}, of these {len(self.prompt_ids)} of the {len(self.classes)} descriptions "
               f"and up to {LONGEST_ANSWER} of an answer",
               f"shorten the sentences, lower --window ({L} frames), or raise --language-stride")

    def tokenize(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def embed(self, ids):
        """Token ids -> frozen embeddings."""
        return self.lm.get_input_embeddings()(ids)

    def logits(self, hidden):
        """Last hidden states (..., D) -> scores of the next token (..., vocabulary)."""
        with self.autocast(hidden.device):
            return language_models.logits(self.lm, hidden)

    def autocast(self, device):
        """bfloat16 arithmetic if the frozen weights are bfloat16."""
        enabled = self.lm.dtype == torch.bfloat16
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

    def checkpointing(self):
        """Compute activations again in the backward pass from now on, with the same results."""
        language_models.enable_checkpointing(self.lm.get_base_model())

    @torch.no_grad()
    def keep_prompt(self):
        """Text-first: read the prompt once for all windows, until train() or eval() is called."""
        if self.layout == "text-first":
            ids = self.prompt_ids[None]                                           # (1, T)
            valid = torch.ones_like(ids, dtype=torch.bool)
            cache = DynamicCache()
            self.hidden_states(self.embed(ids), valid, 0, cache)
            self.kept_prompt = cache

    def train(self, mode=True):
        self.kept_prompt = None                 # weights change in training
        return super().train(mode)
