"""experiments/question_answering.py - answers that the language model writes (Table 2, Fig. 6).

    python -m experiments.question_answering --checkpoint out"""
import json
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter

import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import DynamicCache

from data import batch_loader
from evaluate import merge_windows, score
from experiments.bias import add_lap, open_run
from support.commands import checkpoint_flags, run_command
from support.flags import integer
from support.results import write_figures
from vlm import ANSWER

CUT = "…"                            # closes a generated answer that did not end by itself

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    checkpoint_flags(parser.add_argument, required=True)
    parser.add_argument("--max-new-tokens", type=integer(1), default=256, help="longest answer")
    return run_command("question_answering.py", score_answers, parser.parse_args(argv))

def score_answers(args) -> None:
    """Print the test table of the answers, their hallucination rates, and LAP."""
    model, train_args, out, test = open_run(args)
    def predict():
        return answer(model, test, train_args, args.max_new_tokens)
    predictions, answers = predict()
    result = score(out / "result-qa.json", test, predictions, train_args.tiou)
    beyond = 0.5 * test.num_frames / test.stride                     # steps that a feature sees
    rates = result["hallucination"] = hallucination_rates(answers, beyond)
    (out / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")
    boundaries(out / "boundaries.png", [row for one in answers for row in one["proposals"]])
    print(f"\nhallucinations in {len(answers)} windows: fixed {100 * rates['fixed']:.2f} %, "
          f"infinite {100 * rates['infinite']:.2f} %; wrote answers.json, boundaries.png to {out}")
    add_lap(result, model, predict, test, train_args.tiou)
    write_figures(args.json, train_args.test_subset, train_args.tiou, result)

@torch.no_grad()
def answer(model, test, args, max_new_tokens: int = 256) -> tuple:
    """Let the language model write about every window -> predictions as of `detect`, with scores
    1, 1/2, 1/3 ..., and [{"video", "start", "length" (steps), "text", "proposals"}]."""
    model.eval()
    device, classes = next(model.parameters()).device, model.config.classes
    found, answers = {video.name: [] for video in test.videos}, []
    loader = batch_loader(test, model.multiple, args.workers, batch_size=args.batch_size)
    for batch in tqdm(loader, "answer", leave=False, dynamic_ncols=True, disable=None):
        batch = batch.to(device)
        texts = generate(model.language, model.visual(batch), batch.mask, max_new_tokens)
        for window, text in zip(batch.windows, texts):
            proposals = parse_proposals(text, classes)
            segments = torch.tensor([times for _, *times in proposals]).reshape(-1, 2).float()
            labels = torch.tensor([classes.index(label) for label, *_ in proposals]).long()
            scores = 1 / (1 + torch.arange(len(proposals)))
            found[window.video.name].append((segments + window.start, scores, labels))
            answers.append(dict(video=window.video.name, start=window.start, length=window.length,
                                text=text, proposals=proposals))
    return merge_windows(found, test, classes, args), answers

def generate(language, f_vis, mask, max_new_tokens: int = 256) -> list:
    """Write B answers, greedily; CUT closes unended ones. f_vis: (B, L, D). mask: (B, L) bool."""
    lead = torch.tensor([language.tokenize(ANSWER)] * len(mask), device=mask.device)  # (B, A)
    tokens, valid = language.sequence(f_vis, mask, lead, torch.ones_like(lead).bool())
    cache, eos = DynamicCache(), language.tokenizer.eos_token_id
    written, ended = lead[:, :0], torch.zeros_like(lead[:, :1]).bool()       # (B, 0), (B, 1)
    while written.size(1) < max_new_tokens and not ended.all():
        hidden = language.hidden_states(tokens, valid, language.prefix(mask.size(1)), cache)
        token = language.logits(hidden[:, -1:]).argmax(-1).masked_fill(ended, eos)   # (B, 1)
        ended = ended | (token == eos)
        written = torch.cat([written, token], 1)
        valid = torch.cat([valid, torch.ones_like(token).bool()], 1)
        tokens = language.embed(token)               # alone: the cache holds everything before it
    texts = language.tokenizer.batch_decode(written, skip_special_tokens=True,
                                            clean_up_tokenization_spaces=False)
    return [text if end else text + CUT for text, end in zip(texts, ended.flatten().tolist())]

def parse_proposals(text: str, classes: list) -> list:
    """Any text -> its entries `label: start-end` with a known label as (label, start, end).
    Case counts where two labels differ in nothing else. Of labels that fit, the longest is read."""
    known = {name.casefold(): name for name in classes} | {name: name for name in classes}
    labels = "|".join(map(re.escape, sorted(classes, key=len, reverse=True)))
    # Before an entry stands nothing, ", " (Eq. 7), a mark, or an entry. *+ never tries twice.
    entries = re.findall(r"(?:^|, |(?<![^,.;:\n\d]) *)"
                         rf"({labels})\s*+:\s*+(\d{{1,9}})\s*+-\s*+(\d{{1,9}})", text, re.I)
    named = [(known.get(label, known.get(label.casefold())), *times) for label, *times in entries]
    return [(name, int(start), int(end)) for name, start, end in named if name is not None]

def hallucination_rates(answers: list, beyond: float) -> dict:
    """Table 2: shares of windows with a hallucination; the paper has no formula. Fixed: the answer
    is that of another window, too, or a proposal ends before it starts, or more than `beyond` steps
    after the window. Infinite: no end by itself, or one proposal three times."""
    same_list = Counter(tuple(one["proposals"]) for one in answers)
    fixed = infinite = 0
    for one in answers:
        rows, last = tuple(one["proposals"]), round(one["length"] + beyond)
        impossible = any(end < start or end > last for _, start, end in rows)
        fixed += bool(rows) and (same_list[rows] > 1 or impossible)
        infinite += one["text"].endswith(CUT) or max(Counter(rows).values(), default=0) >= 3
    return {"fixed": fixed / len(answers), "infinite": infinite / len(answers)}

def boundaries(path, proposals: list) -> None:
    """Fig. 6: how often a step of a window is a start or end; arrows at the eight highest bars."""
    counts = Counter(row[1] for row in proposals) + Counter(row[2] for row in proposals)
    axis = Figure(figsize=(9, 3), layout="constrained").subplots()
    axis.bar(list(counts), list(counts.values()))
    for step, count in counts.most_common(8):
        axis.annotate(str(step), (step, count), (0, 14), textcoords="offset points", ha="center",
                      arrowprops={"arrowstyle": "->"})
    axis.set(xlabel="step of the window", ylabel="boundaries in the answers", ymargin=0.25)
    axis.figure.savefig(path, dpi=90)

if __name__ == "__main__":
    raise SystemExit(main())
