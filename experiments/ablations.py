"""experiments/ablations.py - the rows of Tables 2, 4 and 9, each a change to a finished model.
`train.py --ablation` takes a name of ABLATIONS, below; `--lambda-lang` a weight, or "generated".
`--lambda-lang 0`, vision only, needs no change: there is no language model then."""
import torch

def ablate(model, args) -> None:
    """Change a model, and the weights of Eq. 9 in the flags of its training."""
    change = generated_weight if args.lambda_lang == "generated" else fixed_weight
    ABLATIONS.get(args.ablation, change)(model, args)

def only_language(model, args) -> None:
    """Table 2: F_cls and F_loc are the language features, without F_vis."""
    model.aggregate = lambda f_vis, f_lang, weight: f_lang
    model.language_weight = torch.ones_like
    args.lambda_adv = 0.0

def fixed_weight(model, args) -> None:
    """Table 4: one weight for all frames, that of --lambda-lang; no advantage is learnt."""
    model.language_weight = lambda advantage: torch.full_like(advantage, args.lambda_lang)
    args.lambda_adv = 0.0

def generated_weight(model, args) -> None:
    """Table 4: the weight is the probability of "yes" against "no" after [adv]: the sigmoid of how
    much more the output layer says "yes". Its two rows take the place of FC; nothing is learnt."""
    language, fc = model.language, model.predict_advantage.fc
    ids = [language.tokenize(f" {word}")[-1] for word in ("yes", "no")]
    yes, no = language.lm.get_output_embeddings().weight[ids].detach().float()      # (D,) each
    fc.bias = None
    del fc.weight
    fc.register_buffer("weight", (yes - no)[None], persistent=False)
    # The output layer reads raw hidden states. torch keeps a module's name for modules: hence del.
    del model.standardise_adv
    model.standardise_adv = lambda f_adv, mask: f_adv
    model.language_weight = torch.sigmoid
    args.lambda_adv = 0.0

def labels_only(model, args) -> None:
    """Table 9 (a): the prompt has the names of the actions without their descriptions."""
    model.config.descriptions = dict.fromkeys(model.config.descriptions, "")
    model.language.set_descriptions(model.config.descriptions)

def shuffled_descriptions(model, args) -> None:
    """A control: training and test describe every action by the sentence of another class."""
    third = max(1, len(model.config.descriptions) // 3)
    model.language.set_descriptions(rotated(model.config.descriptions, third))

def rotated(descriptions: dict, distance: int) -> dict:
    """Each label gets the sentence of the label that stands `distance` places after it."""
    labels, texts = zip(*descriptions.items())
    return dict(zip(labels, texts[distance:] + texts[:distance]))

def vision_tokens(model, args) -> None:
    """Table 9 (b): all features are hidden states of the vision tokens v_l."""
    model.language.read_out = lambda frame, cls, loc, adv: (frame, frame, frame)

def shared_token(model, args) -> None:
    """Table 9 (b): all features are hidden states of one special token."""
    model.language.read_out = lambda frame, cls, loc, adv: (cls, cls, cls)

def without_tg(model, args) -> None:
    """Table 9 (c): no text generation loss in Eq. 9."""
    args.lambda_tg = 0.0

def without_adv(model, args) -> None:
    """Table 4: no advantage loss in Eq. 9; the detection loss alone moves lambda."""
    args.lambda_adv = 0.0

ABLATIONS = {"only-language": only_language, "labels-only": labels_only,
             "shuffled-descriptions": shuffled_descriptions, "vision-tokens": vision_tokens,
             "shared-token": shared_token, "without-tg": without_tg, "without-adv": without_adv}
