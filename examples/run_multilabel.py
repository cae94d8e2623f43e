r"""Train BalanceMix on any multi-label image data set: from the Hub, or a folder of images with a CSV.

    python examples/run_multilabel.py --dataset_name user/set --label_column tags
    python examples/run_multilabel.py --dataset_name user/boxes --objects_column objects
    python examples/run_multilabel.py --train_dir images --train_csv train.csv \
        --label_column labels --separator ","

A CSV has a column `file_name`, and either --label_column or one 0/1 column a class. Without an evaluation split, a
tenth of the training set is held out, stratified by labels, before any noise is added.
"""

from __future__ import annotations

from hf_balancemix import BalanceMixTrainer
from hf_balancemix.data import class_names
from hf_balancemix.methods import METHODS, trainer_for
from hf_balancemix.scripts.arguments import parse_script
from hf_balancemix.scripts.parser import run
from hf_balancemix.scripts.train import (
    add_noise,
    args_of,
    draw_model,
    figures_of,
    freeze_backbone,
    print_results,
    say,
    usable,
)


def main(argv: list[str] | None = None) -> None:
    data, noise, model_args, args = parse_script("any", argv, description=__doc__)

    with args.main_process_first():  # the other ranks then find what rank 0 has made
        # By `from_csv`, `from_tags` or `from_detection`, and `iterative_split`; in a script of your own, such as
        # train, val = iterative_split(from_csv("labels.csv", "photos", label_column="tags"), [0.9, 0.1])
        train, val = data.load(args.seed)
        train, val, left_out = usable(train, val, data, args.seed, args.max_image_pixels)
        train = add_noise(train, noise, data.follow_links)
    names = class_names(train)
    say(args, f"{len(train):,} training and {len(val):,} evaluation images, {len(names)} classes, noise: {noise}.")
    frozen = freeze_backbone(model_args, train, val, args)  # None without --frozen_...
    if frozen is not None:
        train, val = frozen.train, frozen.evaluation

    results = {}
    for method in model_args.methods:  # --method; each under the same conditions
        say(args, f"\n== {method}: {METHODS[method]}")
        parts = draw_model(method, model_args, train, args) if frozen is None else frozen.draw(args)
        own_args = args_of(method, model_args, args)  # a folder of the method's name
        if method == "balancemix":
            trainer = BalanceMixTrainer(args=own_args, train_dataset=train, eval_dataset=val, **parts)
        else:  # what it is compared with
            parts["method_args"] = model_args.args_by_method.get(method)
            trainer = trainer_for(method, own_args, train_dataset=train, eval_dataset=val, **parts)

        output = trainer.train(resume_from_checkpoint=args.checkpoint)
        metrics = trainer.evaluate()
        if frozen is not None:
            trainer.model = frozen.image_model(trainer.model)  # what is saved takes images
        trainer.save_model()
        trainer.create_model_card()
        results[method] = figures_of(trainer, output, metrics)
    print_results(results, args, left_out)


if __name__ == "__main__":
    run(main)
