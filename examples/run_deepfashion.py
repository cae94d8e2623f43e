r"""Train BalanceMix on DeepFashion's fine-grained attributes (26 classes) with the paper's settings.

    python examples/run_deepfashion.py --data_dir DIR --image_size 448 --preset paper \
        --noise flip --noise_rate 0.2

DIR is the Category and Attribute Prediction benchmark with Anno_fine/ and Img/. The paper's 16,000 training images are
train+val, its 4,000 test images the test split. The images may not be passed on: push no data set made from them.
"""

from __future__ import annotations

from hf_balancemix import BalanceMixTrainer, load_deepfashion
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
    data, noise, model_args, args = parse_script("deepfashion", argv, description=__doc__)
    say(args, f"Training on DeepFashion {data.train_split}, evaluating on {data.eval_split}.")

    with args.main_process_first():  # the other ranks then find what rank 0 has made
        options = {"on_bad_image": data.on_bad_image, "follow_links": data.follow_links}
        train = load_deepfashion(data.data_dir, split=data.train_split, **options)
        val = load_deepfashion(data.data_dir, split=data.eval_split, **options)
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
