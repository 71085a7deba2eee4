"""support/language_models.py - language models: load one, and steer its attention."""
import warnings
from inspect import signature
from pathlib import Path

import torch
import transformers

from support.annotations import InputError, expect

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()      # it would list the tensors of InternVL's encoder

TINY_LM = Path(__file__).with_name("tiny-lm")           # --lm tiny, see support/tiny_lm.py

def language_config(folder):
    """Read transformers' configuration of a language model, also of the one inside an InternVL.
    folder: a path, a name on the Hugging Face hub, or "tiny". Raises InputError."""
    folder = TINY_LM if folder == "tiny" else folder
    try:
        content = transformers.PretrainedConfig.get_config_dict(folder)[0]
        if not content:
            raise ValueError("no config.json")
        # InternVL's native layout says text_config, its original layout llm_config.
        inner = content.get("text_config") or content.get("llm_config") or content
        config = transformers.AutoConfig.for_model(**inner)
        int(config.hidden_size)                            # not every kind of model has one
        return config
    except Exception as error:                             # a damaged folder can fail in any way
        found = "" if Path(folder).is_dir() else "no such folder, and as a name: "
        raise InputError(f"--lm {folder}: expected a folder or name of a causal language model, "
                         f"with weights, tokenizer; found: {found}{first_line(error)}") from error

def load_language_model(folder, dtype: torch.dtype):
    """Load (causal language model, tokenizer); folder as for `language_config`. Of an InternVL3 in
    its native or original layout, only the language model is read. Code in a folder is never run.
    Raises InputError, also for a tensor that is missing or does not fit."""
    config = language_config(folder)
    folder = TINY_LM if folder == "tiny" else folder
    inner = {r"^(model\.)?language_model\.(model\.)?(?!lm_head)": "model.",
             r"^language_model\.lm_head": "lm_head"}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation="sdpa",
            key_mapping=inner, output_loading_info=True, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # transformers makes up a tokenizer where none is stored.
        if not tokenizer("a").input_ids or tokenizer.eos_token_id is None:
            raise ValueError("no tokenizer with an end token; fetch tokenizer*.json, too")
        rows = len(model.get_input_embeddings().weight)
        if max(tokenizer.eos_token_id, tokenizer.vocab_size - 1) >= rows:
            raise ValueError(f"a tokenizer of another model: it has ids beyond {rows} embeddings")
        missing = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        if missing == {"lm_head.weight"}:                  # a file without it has tied embeddings
            model.lm_head.weight = model.get_input_embeddings().weight
        elif missing:
            raise ValueError(f"{len(missing)} weights missing or misshapen: {sorted(missing)[:3]}")
        check_model(model)
        return model, tokenizer
    except Exception as error:             # a damaged folder or foreign model can fail in any way
        reason = first_line(error).split(". ")[0]          # without advice and addresses
        raise InputError(f"--lm {folder}: expected weights and tokenizer of a causal language "
                         f"model, with attention that takes a 4-D mask (Qwen, Llama, Mistral, "
                         f"Gemma, ...), found model_type {config.model_type}: {reason}") from error

def attention_masks(config, mask: torch.Tensor, position: torch.Tensor):
    """The attention_mask of a model: a mask if its layers are of one kind, else {kind: mask}.
    mask: (B, 1, n, N) bool, True where one of the last n tokens (row) may see a key. position:
    (B, N), without padding, which the window of sliding layers counts. InputError: other layers."""
    window = getattr(config, "sliding_window", None)
    alike = "sliding_attention" if window else "full_attention"         # as in Mistral, Llama
    kinds = getattr(config, "layer_types", None) or [alike]
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise InputError(f"expected layers of full or sliding attention, found {min(unknown)}")
    masks = dict.fromkeys(kinds, mask)
    if "sliding_attention" in masks:
        distance = (position[:, -mask.size(2):, None] - position[:, None]).abs()    # (B, n, N)
        masks["sliding_attention"] = mask & (distance < window)[:, None]
    return masks if len(masks) > 1 else masks[kinds[0]]

def logits(model, hidden):
    """Last hidden states (..., D) -> scores of the next token, which Cohere and Granite scale."""
    scale = getattr(model.config, "logit_scale", 1) / getattr(model.config, "logits_scaling", 1)
    return model.get_output_embeddings()(hidden * scale)

@torch.no_grad()
def check_model(model) -> None:
    """Raise an error unless a model takes positions and a cache, a 4-D boolean mask decides which
    tokens its attention sees, and `logits` gives the scores of its own forward."""
    decoder = model.base_model
    if "position_ids" not in signature(decoder.forward).parameters:
        raise ValueError("it takes no position_ids")
    if getattr(model.config, "attn_logit_softcapping", None):
        raise ValueError("its attention caps its scores, and that of torch cannot")
    width = model.get_input_embeddings().weight.size(1)
    tokens = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1)
    tokens[1::2, -1] *= -1                                 # sequences 1 and 3 of 4
    mask = torch.ones(4, 1, 4, 4, dtype=torch.bool)
    mask[2:] = mask[2:].tril()
    position = torch.arange(4).expand(4, 4)
    inputs = dict(inputs_embeds=tokens.to(model.dtype), position_ids=position,
                  attention_mask=attention_masks(model.config, mask, position))
    cache = {name_of_cache(decoder): transformers.DynamicCache()}
    hidden = decoder(**inputs, **cache, use_cache=True).last_hidden_state
    first = hidden[:, 0].float()
    seen, leaked = (first[::2] - first[1::2]).abs().amax(1).tolist()
    if not 10 * leaked < seen:                             # rounding may leak
        raise ValueError("a 4-D mask does not decide what its attention sees")
    own = model(**inputs, use_cache=False).logits
    if not (logits(model, hidden) - own).abs().max() < 0.01 * own.abs().max():
        raise ValueError("its output layer does more than to multiply by a matrix and a number")

def name_of_cache(model) -> str:
    """The argument that hands a model its cache; transformers 5.17 calls it past_key_values."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"

def enable_checkpointing(model) -> None:
    """Compute activations of a model of transformers again in the backward pass."""
    expect(model.supports_gradient_checkpointing, "--grad-checkpoint on", "a model that allows it",
           type(model).__name__, "say --grad-checkpoint off")
    older = model.gradient_checkpointing_enable            # the name in transformers 5.17
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})

def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]

def add_lora(model, rank: int, alpha: float):
    """The model with LoRA matrices (peft) at all of its linear layers, frozen otherwise."""
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear",
                        exclude_modules=r".*\.router")     # PhiMoE's gives no tensor
    with warnings.catch_warnings(action="ignore"):         # of peft: an old name, no router
        model = get_peft_model(model, config)
    for module in model.modules():
        if hasattr(module, "lora_A"):                      # autocast casts; peft would cast first
            module.cast_input_dtype_enabled = False
    return model
