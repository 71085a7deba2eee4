"""experiments/question_answering.py - the answers that the language model writes (Table 2).

    python -m experiments.question_answering --checkpoint out

It scores the answers, counts hallucinations, writes answers.json and boundaries.png (Fig. 6).
"""
import argparse
import json
import re
import sys
from collections import Counter

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from data import batch_loader, load_data
from evaluate import merge_windows, open_checkpoint, score
from experiments.bias import report_lap, unmatched_descriptions
from support.annotations import InputError
from support.commands import checkpoint_flags, run_command
from support.flags import integer
from support.results import write_figures
from vlm import ANSWER

CUT = "…"                            # closes a generated answer that did not end by itself


def main(argv=None) -> int:
    """Returns the exit code: 0, or 2 for a mistake in the flags or files."""
    return run_command("question_answering.py", score_answers, get_args(argv))


def score_answers(args) -> None:
    """Print the test table of the answers, their hallucination rates, and LAP."""
    model, train_args, out = open_checkpoint(args)
    if model.language is None:
        raise InputError(f"--checkpoint {args.checkpoint}: expected a model with language, found "
                         f"one trained with --lambda-lang 0; it cannot write answers")
    test = load_data(train_args, model.config.feature_dim)[1]
    tiou = args.tiou or train_args.tiou
    predictions, answers = answer(model, test, train_args, args.max_new_tokens)
    result = score(out / "result-qa.json", test, predictions, tiou)
    result["hallucination"] = report_answers(out, answers, test)
    model.language.set_descriptions(unmatched_descriptions(model.config.descriptions))
    unmatched, _ = answer(model, test, train_args, args.max_new_tokens)
    result["LAP"] = report_lap(result["average"], unmatched, test, tiou)
    write_figures(args.json, train_args.test_subset, tiou, result)


@torch.no_grad()
def answer(model, test, args, max_new_tokens: int = 256) -> tuple:
    """Let the language model write about every window -> (predictions, answers).

    args: flags of the training.
    predictions: {video: {"segments": (M, 2) seconds, "labels": [str], "scores": (M,)}}. A
    proposal has the score 1 / (1 + its place in the answer). Windows are merged as in `detect`.
    answers: one {"video", "start" (step), "length" (steps), "text", "proposals"} per window.
    """
    model.eval()
    device, classes = next(model.parameters()).device, model.config.classes
    found, answers = {video.name: [] for video in test.videos}, []
    loader = batch_loader(test, model.multiple, args.workers, batch_size=args.batch_size)
    for batch in tqdm(loader, "answer", leave=False, dynamic_ncols=True, disable=None):
        batch = batch.to(device)
        texts = generate(model.language, model.visual(batch), batch.mask, max_new_tokens)
        for window, text in zip(batch.windows, texts):
            proposals = parse_proposals(text, classes)
            segments = torch.tensor([row[1:] for row in proposals], dtype=torch.float32)
            labels = torch.tensor([classes.index(row[0]) for row in proposals], dtype=torch.long)
            scores = 1 / (1 + torch.arange(len(proposals)))
            moved = segments.reshape(-1, 2) + window.start              # in steps of the video
            found[window.video.name].append((moved, scores, labels))
            answers.append({"video": window.video.name, "start": window.start,
                            "length": window.length, "text": text, "proposals": proposals})
    return merge_windows(found, test, classes, args), answers


@torch.no_grad()
def generate(language, f_vis, mask, max_new_tokens: int = 256) -> list:
    """Write the answer T_pred of B windows: at every step the most likely token.

    language: a LanguageModel in eval mode. f_vis: (B, L, D) vision features. mask: (B, L) bool.
    Returns B texts. A text that is not complete after max_new_tokens (>= 1) ends with CUT.
    """
    B, L = mask.size()
    lead = torch.tensor(language.tokenize(ANSWER), device=mask.device).expand(B, -1)  # (B, A)
    tokens, valid = language.sequence(f_vis, mask, lead, torch.ones_like(lead).bool())
    cache, eos = transformers.DynamicCache(), language.tokenizer.eos_token_id
    ended = torch.zeros_like(mask[:, 0])                                             # (B,)
    written = []
    while len(written) < max_new_tokens and not ended.all():
        hidden = language.hidden_states(tokens, valid, language.prefix(L), cache)[:, -1]
        token = language.logits(hidden).argmax(-1).masked_fill(ended, eos)           # (B,)
        written.append(token)
        ended = ended | (token == eos)
        # The next step reads this token alone. The cache holds everything before it.
        tokens = language.embed(token[:, None])
        valid = F.pad(valid, (0, 1), value=True)
    texts = []
    for row, end in zip(torch.stack(written, 1).tolist(), ended.tolist()):
        row = row[:row.index(eos)] if end else row
        text = language.tokenizer.decode(row, skip_special_tokens=True,
                                         clean_up_tokenization_spaces=False)
        texts.append(text if end else text + CUT)
    return texts


def parse_proposals(text: str, classes: list) -> list:
    """Read any text of a language model -> [(label, start, end)], in the order written.

    Entries other than `label: start-end` with a known label (in any case) are passed over.
    """
    known = {name.lower(): name for name in classes}
    # ++ and *+ never go back: endless spaces would take minutes otherwise.
    entries = re.findall(r"([^,.;:\n]++):\s*+(\d{1,9})\s*+-\s*+(\d{1,9})", text)
    named = [(known.get(label.strip().lower()), start, end) for label, start, end in entries]
    return [(name, int(start), int(end)) for name, start, end in named if name is not None]


def report_answers(out, answers: list, test) -> dict:
    """Print the hallucination rates and return them; write answers.json and boundaries.png."""
    # A feature sees half its frames beyond the window, and so does the ground truth.
    beyond = 0.5 * test.num_frames / test.stride
    lengths = [round(row["length"] + beyond) for row in answers]
    lists = [row["proposals"] for row in answers]
    rates = hallucination_rates([row["text"] for row in answers], lists, lengths)
    print(f"\nhallucinations in {len(answers)} windows: fixed {100 * rates['fixed']:.2f} %, "
          f"infinite {100 * rates['infinite']:.2f} %; wrote answers.json, boundaries.png to {out}")
    (out / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")
    boundaries(out / "boundaries.png", [row for rows in lists for row in rows])
    return rates


def hallucination_rates(texts: list, proposals: list, lengths: list) -> dict:
    """The two hallucinations of Table 2, each as a share of the W windows, in [0, 1].

    texts: W answers from `generate`. proposals: for each of them the list that `parse_proposals`
    reads there, in steps of the window. lengths: W last possible ends of a proposal, in steps.

    The paper names the hallucinations without a formula. Here a window counts as
    "fixed"     "fixed outputs with obviously fake boundaries regardless of input": its answer
                names a proposal, and either the very same list answers another window, too, or
                a proposal is impossible: it ends before it starts, or after the window
    "infinite"  "infinite listing or repeating segments": the answer did not end by itself (it
                closes with CUT), or names the same proposal three times or more.
    """
    lists = [tuple(map(tuple, rows)) for rows in proposals]
    same_list = Counter(lists)
    fixed = infinite = 0
    for text, rows, length in zip(texts, lists, lengths):
        impossible = any(end < start or end > length for _, start, end in rows)
        repeats = max(Counter(rows).values(), default=0)
        fixed += bool(rows) and (same_list[rows] > 1 or impossible)
        infinite += text.endswith(CUT) or repeats >= 3
    windows = max(1, len(lists))
    return {"fixed": fixed / windows, "infinite": infinite / windows}


def boundaries(path, proposals: list) -> None:
    """Fig. 6: how often a step of a window is a start or end; arrows at the eight highest bars."""
    steps = np.array([row[1:] for row in proposals], dtype=np.int64).reshape(-1)
    values, counts = np.unique(steps, return_counts=True)
    figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
    axis.bar(values, counts, width=0.9, color="tab:blue")
    for i in np.argsort(-counts, kind="stable")[:8]:
        axis.annotate(str(values[i]), (values[i], counts[i]), (0, 14), textcoords="offset points",
                      ha="center", fontsize=8, arrowprops={"arrowstyle": "->"})
    axis.margins(y=0.25)
    axis.set(xlabel="step of the window", ylabel="boundaries",
             title=f"{len(steps)} boundaries in the answers")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    checkpoint_flags(parser.add_argument)
    parser.add_argument("--max-new-tokens", type=integer(1), default=256,
                        help="longest answer of the language model (%(default)s)")
    args = parser.parse_args(argv)
    if not args.checkpoint:
        parser.error("expected --checkpoint DIR")
    return args


if __name__ == "__main__":
    sys.exit(main())
