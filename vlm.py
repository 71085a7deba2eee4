"""vlm.py - language feature generation (paper §3.2, Eq. 7-8, Appendix B).

The language model reads, for every frame l, the vision feature and three special tokens, and an instruction that
holds the description of every action:

    frames-first:  v_1 [cls] [loc] [adv]  ...  v_L [cls] [loc] [adv]  T_ins(T_desc)  |  answer T_pred
    text-first:    T_ins(T_desc)  v_1 [cls] [loc] [adv]  ...  v_L [cls] [loc] [adv]  |  answer T_pred

Left of the bar, frames-first tokens see each other in both directions (a prefix language model): under a causal
mask no special token could see a description that follows it. The answer is causal, and nothing sees it but itself.
"""
import re
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from einops import rearrange, repeat
from torch import nn

from annotations import InputError
from data import mean_over_all, send

transformers.logging.disable_progress_bar()
SPECIAL_TOKENS = ("[cls]", "[loc]", "[adv]")
NO_ACTION = "No action."
ANSWER = "\nAnswer: "
CUT = "…"                             # closes a generated answer that did not end by itself


class LanguageFeatures(NamedTuple):
    """What the language model returns. D is its hidden width."""
    f_lang_cls: torch.Tensor          # (B, L, D) last hidden states of [cls]
    f_lang_loc: torch.Tensor          # (B, L, D) of [loc]
    f_adv: torch.Tensor               # (B, L, D) of [adv]
    text_loss: torch.Tensor | None    # () L_tg, Eq. 8; None without answers


def instruction(descriptions: dict) -> str:
    """T_ins with T_desc in its place (Appendix B.2); descriptions: {label: sentence, or "" for the label alone}."""
    lines = "\n".join(f"{label}: {text}" if text else label for label, text in descriptions.items())
    return ("This is a video reasoning task for action localization. Identify the start and end frames of each "
            "action in the given video, and output the list of action proposals. "
            f"The candidate actions include:\n{lines}")


def proposal_text(segments, labels: list) -> str:
    """The answer T_pred (Eq. 7) for ground truth: "LongJump: 12-48, Diving: 60-75." in order of start.

    segments: (N, 2) in frames of the window; labels: N names. A fixed sentence when N is 0.
    """
    rows = sorted((max(0, round(float(start))), round(float(end)), label)        # a feature sees beyond its window
                  for (start, end), label in zip(segments, labels))
    return ", ".join(f"{label}: {start}-{end}" for start, end, label in rows) + "." if rows else NO_ACTION


def parse_proposals(text: str, classes: list) -> list:
    """Read what a language model wrote -> [(label, start, end)], in the order written.

    Accepts any text: entries that are not `label: start-end` with a known label (in any case) are passed over.
    """
    known = {c.lower(): c for c in classes}
    # ++ and *+ never go back: endless spaces would take minutes otherwise.
    found = re.findall(r"([^,.;:\n]++):\s*+(\d{1,9})\s*+-\s*+(\d{1,9})", text)
    return [(known[label.strip().lower()], int(start), int(end))
            for label, start, end in found if label.strip().lower() in known]


def prefix_lm_mask(valid: torch.Tensor, prefix: int) -> torch.Tensor:
    """Attention mask of a prefix language model.

    valid: (B, N) bool, False on padding. The first `prefix` tokens see each other in both directions; every later
    token sees the prefix and what precedes it. Padding is seen by nothing (but itself, so no row is empty).
    Returns (B, 1, N, N) bool, True where query (row) may see key (column). prefix = 0 is the causal mask.
    """
    N = valid.size(1)
    i = torch.arange(N, device=valid.device)
    allowed = (i[None, :] <= i[:, None]) | ((i[:, None] < prefix) & (i[None, :] < prefix))       # (N, N)
    allowed = (allowed & valid[:, None, :]) | torch.eye(N, dtype=torch.bool, device=valid.device)
    return allowed[:, None]


class Visibility(NamedTuple):
    """Which tokens see which: `prefix_lm_mask` without its N x N entries. P tokens of the prefix, A of the answer."""
    causal: bool                      # the prefix; False: its tokens see each other in both directions
    prefix: torch.Tensor | None       # (B, 1, 1, P) bool, False on padding; None where nothing has to be hidden
    answer: torch.Tensor | None       # (B, 1, A, P + A) bool: what each token of the answer sees; None without one


def prefix_attention(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, visibility=None,
                     **options):
    """Attention of one layer in fused kernels, none of which is given an N x N mask.

    query (B, H, n, d), of the last n of N = P + A tokens; key, value (B, H', N, d), H' divides H.
    Returns (B, n, H, d), and None. transformers calls it; raises InputError where a model asks for something else.
    """
    if visibility is None or any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise InputError(f"--lm: expected a language model with plain softmax attention, found model_type "
                         f"{module.config.model_type}")
    # Repeated, not by enable_gqa: on CUDA that rules out the one fused kernel that takes a mask, or float32.
    key, value = (repeat(x, "b h n d -> b (h same) n d", same=query.size(1) // x.size(1)) for x in (key, value))
    A = 0 if visibility.answer is None else visibility.answer.size(2)
    n, P, parts = query.size(2) - A, key.size(2) - A, []                    # n queries of the prefix, P keys
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    if n > 0 and visibility.causal:
        # is_causal aligns the first query with the first key: zeros stand for the queries that a cache spares.
        first = F.pad(query[:, :, :n], (0, 0, P - n, 0)) if n < P else query[:, :, :n]
        parts.append(attend(first, key[:, :, :P], value[:, :, :P], is_causal=True)[:, :, P - n:])
    elif n > 0:
        parts.append(attend(query[:, :, :n], key[:, :, :P], value[:, :, :P], attn_mask=visibility.prefix))
    if A:
        parts.append(attend(query[:, :, n:], key, value, attn_mask=visibility.answer))
    return torch.cat([part.transpose(1, 2) for part in parts], 1), None


class LanguageModel(nn.Module):
    """M_lang: a causal language model of transformers with LoRA (peft), frozen otherwise, and three special tokens.

    folder: what `load_language_model` takes.
    descriptions: {label: sentence}, in class order.
    layout: "frames-first" (the paper's order) or "text-first" (the module's docstring).
    tokens: whose last hidden states are the features (Table 9 b): "special", the three special tokens; "shared", [cls]
        for all three; "vision", the vision tokens v_l.
    dtype: "float32", or "bfloat16": of the frozen weights and the arithmetic; what is trained stays float32.
    """

    def __init__(self, folder, descriptions: dict, lora_rank=128, lora_alpha=256, layout="frames-first",
                 tokens="special", dtype="float32"):
        super().__init__()
        from peft import LoraConfig, get_peft_model
        self.layout, self.tokens, self.classes = layout, tokens, list(descriptions)
        base, self.tokenizer = load_language_model(folder, getattr(torch, dtype))
        use_prefix_attention(base, folder)
        with warnings.catch_warnings():                  # peft asks transformers by an old name
            warnings.simplefilter("ignore", FutureWarning)
            self.lm = get_peft_model(base, LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear"))
        for module in self.lm.modules():                 # autocast does; peft would cast up first, autocast down again
            if hasattr(module, "lora_A"):
                module.cast_input_dtype_enabled = False
        table = base.get_input_embeddings().weight
        self.dim, self.embedding_scale = table.size(1), float(table.float().std())
        self.special_tokens = nn.Parameter(torch.randn(len(SPECIAL_TOKENS), self.dim) * self.embedding_scale)
        self.register_buffer("prompt_ids", torch.empty(0, dtype=torch.long), persistent=False)
        self.cached = None                               # see cached_prompt
        self.set_descriptions(descriptions)

    def set_descriptions(self, descriptions: dict) -> None:
        """Read other descriptions from now on (unmatched ones measure modality bias, §4.3)."""
        ids = self.tokenizer(instruction(descriptions), add_special_tokens=False).input_ids
        self.prompt_ids = torch.tensor(ids, device=self.prompt_ids.device)
        self.cached = self.cached and []

    def forward(self, f_vis: torch.Tensor, mask: torch.Tensor, answers: list | None = None,
                padded: bool = True) -> LanguageFeatures:
        """f_vis (B, L, D) vision features of unit scale, mask (B, L) bool, answers: B texts or None.

        padded: False promises a mask without False, which saves the attention from looking at it.
        """
        B, L, _ = f_vis.size()
        answer_ids, answer_valid, *target = self.answer_tokens(answers, B, mask.device)
        tokens, valid = self.sequence(f_vis, mask, answer_ids, answer_valid)        # (B, N, D), (B, N)
        cache, A = self.prompt_cache(B), answer_ids.size(1)
        if cache is not None:
            tokens = tokens[:, len(self.prompt_ids):]
        hidden = self.hidden_states(tokens, valid, self.visibility(valid, A, padded), cache)
        answer = hidden.size(1) - A                                                 # where it begins
        begin = answer - 4 * L if self.layout == "text-first" else 0
        v, cls, loc, adv = rearrange(hidden[:, begin:begin + 4 * L].float(), "b (l four) d -> four b l d", four=4)
        features = {"special": (cls, loc, adv), "shared": (cls, cls, cls), "vision": (v, v, v)}[self.tokens]
        text_loss = None if answers is None else self.text_loss(hidden[:, answer:], *target)
        return LanguageFeatures(*features, text_loss)

    @contextmanager
    def cached_prompt(self):
        """Within: no gradients, and in eval mode the keys and values of a prompt that comes first are computed once.

        Weights must not change inside. Does nothing for frames-first, where the prompt sees the frames.
        """
        self.cached = [] if self.layout == "text-first" else None
        try:
            with torch.no_grad():
                yield
        finally:
            self.cached = None

    def prompt_cache(self, B: int):
        """What B windows go on from inside `cached_prompt`: a cache of their own that holds the prompt. Or None."""
        if self.cached is None or self.training:
            return None
        if not self.cached:
            cache, prompt = transformers.DynamicCache(), self.embed(self.prompt_ids)[None]        # (1, T, D)
            self.hidden_states(prompt, torch.ones_like(self.prompt_ids[None]), Visibility(True, None, None), cache)
            self.cached += [(layer.keys, layer.values) for layer in cache.layers]
        cache = transformers.DynamicCache()
        for layer, (key, value) in enumerate(self.cached):
            cache.update(key.expand(B, -1, -1, -1), value.expand(B, -1, -1, -1), layer)
        return cache

    @torch.no_grad()
    def generate(self, f_vis: torch.Tensor, mask: torch.Tensor, max_new_tokens: int = 256) -> list[str]:
        """Write the answer T_pred of B windows (question answering, Table 2): at every step the most likely token.

        f_vis (B, L, D), mask (B, L) as in forward. An answer that goes on after max_new_tokens (>= 1) ends with CUT.
        """
        lead = torch.tensor(self.tokenizer(ANSWER, add_special_tokens=False).input_ids, device=mask.device)
        lead, eos = repeat(lead, "a -> b a", b=len(mask)), self.tokenizer.eos_token_id
        tokens, valid = self.sequence(f_vis, mask, lead, torch.ones_like(lead, dtype=torch.bool))
        visibility, cache, written = self.visibility(valid, lead.size(1)), transformers.DynamicCache(), []
        ended = torch.zeros_like(mask[:, 0])                                        # (B,)
        while len(written) < max_new_tokens and not ended.all():
            hidden = self.hidden_states(tokens, valid, visibility, cache)[:, -1]    # (B, D)
            with self.autocast(mask.device):
                token = self.lm.get_base_model().lm_head(hidden).argmax(-1)         # (B,)
            written.append(token.masked_fill(ended, eos))
            ended = ended | (token == eos)
            # The next step reads this token alone; everything before it is in the cache.
            tokens, valid = self.embed(written[-1][:, None]), F.pad(valid, (0, 1), value=True)
            visibility = visibility._replace(answer=valid[:, None, None])
        rows = [row[:row.index(eos)] if eos in row else row for row in torch.stack(written, 1).tolist()]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text if end else text + CUT for text, end in zip(texts, ended.tolist())]

    def sequence(self, f_vis, mask, answer_ids, answer_valid):
        """Frames and prompt in order of the layout, then the answer: embeddings (B, N, D), which are real (B, N)."""
        prompt = repeat(self.embed(self.prompt_ids), "t d -> b t d", b=len(mask))   # (B, T, D)
        first = [self.frame_tokens(f_vis, mask), (prompt, mask.new_ones(prompt.shape[:2]))]
        if self.layout == "text-first":
            first.reverse()
        tokens, valid = zip(*first, (self.embed(answer_ids), answer_valid))
        return torch.cat(tokens, 1), torch.cat(valid, 1)

    def visibility(self, valid, A: int, padded: bool = True) -> Visibility:
        """Of the layout, for sequences (B, N) that end with A tokens of an answer. Text-first needs no mask for padded
        frames: they come last in the prefix, where no real token of it sees them."""
        causal, P = self.layout == "text-first", valid.size(1) - A
        own = prefix_lm_mask(valid[:, P:], 0)                                       # (B, 1, A, A)
        before = valid[:, None, None, :P]                                           # (B, 1, 1, P)
        return Visibility(causal, before if padded and not causal else None,
                          torch.cat([before.expand(-1, -1, A, -1), own], 3) if A else None)

    def hidden_states(self, tokens, valid, visibility, cache=None):
        """Last hidden states (B, n, D) of tokens (B, n, D), the last n of the sequence whose real tokens are `valid`
        (B, N). cache: keys and values of what was read before; it is added to."""
        position = (valid.cumsum(1) - 1).clamp(min=0)[:, -tokens.size(1):]
        # Compiled layers would be compiled again for every layer's place in the cache.
        stance = nullcontext() if cache is None else torch.compiler.set_stance("force_eager")
        model = self.lm.get_base_model().model
        before = {} if cache is None else {name_of_cache(model): cache}
        with self.autocast(tokens.device), stance:
            return model(inputs_embeds=tokens.to(self.lm.dtype), position_ids=position, visibility=visibility,
                         use_cache=cache is not None, **before).last_hidden_state

    def autocast(self, device):
        """Arithmetic in bfloat16 if that is the dtype of the frozen weights; LoRA's float32 weights are cast there."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.lm.dtype == torch.bfloat16)

    def checkpointing(self) -> None:
        """From now on compute activations again in the backward pass instead of keeping them, with the same results."""
        enable_checkpointing(self.lm.get_base_model())

    def sequence_length(self, L: int) -> int:
        """Tokens of a window of L frames with the prompt, without the answer: 4L + T."""
        return 4 * L + len(self.prompt_ids)

    def check_length(self, L: int) -> None:
        """Raises InputError where a window of L frames, the descriptions and an answer are too long for the model."""
        limit, answer = self.lm.config.max_position_embeddings, 256
        if self.sequence_length(L) + answer > limit:
            raise InputError(f"descriptions: a window of {L} frames takes {4 * L} tokens, the {len(self.classes)} "
                             f"descriptions {len(self.prompt_ids)} and an answer up to {answer}; expected at most "
                             f"{limit}, what the language model has positions for. Shorten the sentences, or "
                             f"lower --window")

    def frame_tokens(self, f_vis, mask):
        """v_l [cls] [loc] [adv] for every frame, v_l on the scale of the model's own embeddings: (B, 4L, D)."""
        B, L, _ = f_vis.size()
        special = repeat(self.special_tokens, "three d -> b l three d", b=B, l=L)
        tokens = torch.cat([f_vis[:, :, None] * self.embedding_scale, special], dim=2)
        return rearrange(tokens, "b l four d -> b (l four) d"), repeat(mask, "b l -> b (l four)", four=4)

    def answer_tokens(self, answers, B, device):
        """Token ids (B, A) of the answers, padded; which are real (B, A); which of the B A have a next token that
        counts (n,), and that token (n,). All are found on the CPU, so that no GPU is waited for."""
        if answers is None:
            empty = torch.zeros(B, 0, dtype=torch.long, device=device)
            return empty, empty.bool()
        lead = self.tokenizer(ANSWER, add_special_tokens=False).input_ids
        rows = [self.tokenizer(text, add_special_tokens=False).input_ids + [self.tokenizer.eos_token_id]
                for text in answers]
        A, here, targets = len(lead) + max(map(len, rows)), [], []
        ids, valid = torch.zeros(B, A, dtype=torch.long), torch.zeros(B, A, dtype=torch.bool)
        for b, row in enumerate(rows):
            n = len(lead) + len(row)
            ids[b, :n], valid[b, :n] = torch.tensor(lead + row), True
            here += range(b * A + len(lead) - 1, b * A + n - 1)
            targets += row
        return [send(t, device) for t in (ids, valid, torch.tensor(here), torch.tensor(targets))]

    def text_loss(self, hidden, here, targets):
        """Eq. 8: cross-entropy of the answer; logits only where there is a target. hidden (B, A, D); see
        answer_tokens. With several processes: see `mean_over_all`."""
        with self.autocast(hidden.device):
            logits = self.lm.get_base_model().lm_head(hidden.flatten(0, 1).index_select(0, here))    # (n, vocabulary)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        return mean_over_all(loss, torch.full((), len(targets), device=loss.device))    # Eq. 8

    def probability_of_yes(self, f_adv: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L): what the output layer gives "yes" against "no" at [adv] (Table 4, generated lambda)."""
        yes, no = (self.tokenizer(f" {word}", add_special_tokens=False).input_ids[-1] for word in ("yes", "no"))
        weight = self.lm.get_base_model().lm_head.weight
        return torch.sigmoid(f_adv @ (weight[yes].float() - weight[no].float()))

    def embed(self, ids):
        """Token ids -> frozen embeddings."""
        return self.lm.get_input_embeddings()(ids)


def use_prefix_attention(model, folder) -> None:
    """Let all layers attend by `prefix_attention`. Raises InputError where the architecture does not allow it."""
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(f"--lm {folder}: expected an architecture whose attention can be exchanged (Qwen2, Qwen3, "
                         f"Llama, Mistral and most newer ones of transformers), found model_type "
                         f"{model.config.model_type}")
    transformers.AttentionInterface.register("prefix", prefix_attention)
    model.set_attn_implementation("prefix")


def name_of_cache(model) -> str:
    """What a model of transformers calls the keys and values of what it read before; the first is the newer name."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def enable_checkpointing(model) -> None:
    """Activation checkpointing of a model of transformers; the first name is that of its newer versions."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def language_config(folder):
    """The transformers configuration of the causal language model in a folder (or of a name on the Hugging Face hub);
    of an InternVL folder, of the language model in it. Raises InputError."""
    try:
        content = transformers.PretrainedConfig.get_config_dict(folder)[0]
        inner = content.get("text_config") or content.get("llm_config") or content       # InternVL: native, original
        config = transformers.AutoConfig.for_model(**inner)
    except Exception as error:                           # a damaged folder can fail in any way
        found = "" if Path(folder).is_dir() else "no such folder, and as a name: "
        raise InputError(f"--lm {folder}: expected the folder or name of a causal language model of transformers, with "
                         f"config.json, weights, tokenizer, found: {found}{first_line(error)}") from error
    if not hasattr(config, "hidden_size"):
        raise InputError(f"--lm {folder}: expected a causal language model, found model_type {config.model_type}")
    return config


def load_language_model(folder, dtype: torch.dtype):
    """(causal language model, tokenizer) of a folder, or of a name on the hub. Code of the folder is never run.

    Of InternVL3 the language model alone is read, from the native layout (language_model.model.*) or the original one.
    Raises InputError where a tensor is missing or does not fit, naming it.
    """
    config = language_config(folder)
    inner = {r"^(model\.)?language_model\.(model\.)?(?!lm_head)": "model.", r"^language_model\.lm_head": "lm_head"}
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()           # it would list the tensors of InternVL's vision encoder
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, key_mapping=inner, output_loading_info=True, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:                           # a damaged folder can fail in any way
        raise InputError(f"--lm {folder}: expected weights and tokenizer of a {config.model_type} language model, "
                         f"found: {first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(level)
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if not tokenizer("a").input_ids or tokenizer.eos_token_id is None:       # transformers makes up what is missing
        raise InputError(f"--lm {folder}: expected a tokenizer with an end-of-text token, found none; "
                         f"fetch tokenizer.json and tokenizer_config.json, too")
    if missing == {"lm_head.weight"}:                    # a file without it can only mean tied embeddings
        model.lm_head.weight, missing = model.get_input_embeddings().weight, set()
    if missing:
        raise InputError(f"--lm {folder}: expected all weights of a {config.model_type} language model, missing or of "
                         f"another shape are {len(missing)}, among them {sorted(missing)[:3]}")
    return model, tokenizer


def make_tiny_lm(folder, texts: list, dim=128, layers=2, seed=0) -> None:
    """Write a small Qwen2 with random weights and a byte-level BPE tokenizer learnt from `texts`, as a model folder.

    It knows nothing: it lets the whole method run, and be tested, without a download. Does nothing if it is there.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    folder = Path(folder)
    if (folder / "config.json").exists():
        return
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
            initializer_range=dim ** -0.5,
            # No pad_token_id: its embedding would be 0, and with tied embeddings the end could never be written.
            eos_token_id=tokenizer.eos_token_id, pad_token_id=None, bos_token_id=None))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
