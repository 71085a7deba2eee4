"""experiments/figures.py - Figure 4: what several models find in one video.
    python -m experiments.figures --video NAME --checkpoint FULL VISION_ONLY --qa"""
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from data import load_test_data, make_dataset
from evaluate import Detections, detect, open_checkpoint
from experiments.question_answering import answer
from support.annotations import expect, first_ten
from support.commands import checkpoint_flags, run_command
from support.figures import one_video
from support.flags import real
from support.video import single_video

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument
    checkpoint_flags(flag, nargs="+", required=True)
    flag("--video", required=True, help="a video of the test set by its name, or a file")
    flag("--qa", action="store_true", help="a row for the answers of the first language model")
    flag("--min-score", type=real(-1e9), default=0.3, help="lowest score that is drawn")
    return run_command("figures.py", compare, parser.parse_args(argv))

def compare(args) -> None:
    """Draw a row for every model, the last checkpoint on top as in the paper."""
    found, answers = {}, {}
    for folder in reversed(args.checkpoint):
        model, train_args, out = open_checkpoint(Namespace(**{**vars(args), "checkpoint": folder}))
        width, path = model.config.feature_dim, Path(args.video)
        if path.is_file():
            videos = [single_video(path, width, train_args, train_args.fps)]
        else:
            test = load_test_data(train_args, model.config).videos
            videos = [one for one in test if one.name == args.video]
            expect(videos, f"--video {path}", "a file, or a video of the test set", "neither",
                   f"there are {first_ten([one.name for one in test])}")
        dataset = make_dataset(videos, model.config.classes, train_args, width)
        name = "vision only" if model.language is None else train_args.ablation or "full"
        if name in found:
            name = f"{name}, {folder}"
        found[name] = detect(model, dataset, train_args)
        if args.qa and model.language is not None:
            predictions, _ = answer(model, dataset, train_args)
            answers = {"question answering": Detections(predictions, {}, {})}
    expect(answers or not args.qa, "--qa", "a checkpoint with language", "none", "give one")
    video = dataset.videos[0]
    picture = out / f"figure4-{video.name}.png"
    one_video(picture, video, {**answers, **found}, model.config.descriptions, args.min_score)
    print(f"wrote {picture}")

if __name__ == "__main__":
    raise SystemExit(main())
