r"""Train BalanceMix on COCO, or, without --data_dir, on the built-in sample beside BCE and Mixup.

    python examples/run_coco.py
    python examples/run_coco.py --data_dir DIR --year 2017 --model_name_or_path timm/resnet50.tv_in1k \
        --image_size 448 --noise mislabel --noise_rate 0.4 --preset paper --bf16 --output_dir outputs/coco

Every training argument is a flag; --config FILE takes them from YAML or JSON.
"""

from __future__ import annotations

from hf_balancemix import BalanceMixTrainer, load_coco, make_scenes
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
    data, noise, model_args, args = parse_script("coco", argv, description=__doc__)
    if data.data_dir is None:
        say(args, "No --data_dir given: using the built-in sample (small drawn scenes, made once into your cache).")

    # Data: datasets with `image`, `labels` and `image_id`. The noise keeps `clean_labels` beside.
    with args.main_process_first():  # the other ranks then find what rank 0 has made
        root = data.data_dir or make_scenes()
        options = {"year": data.year, "keep_unlabelled": data.keep_unlabelled, "on_bad_image": data.on_bad_image}
        options["follow_links"] = data.follow_links
        train = load_coco(root, split="train", **options)
        val = load_coco(root, split="val", **options)
        train, val, left_out = usable(train, val, data, args.seed, args.max_image_pixels)
        train = add_noise(train, noise, data.follow_links)
    names = class_names(train)
    say(args, f"{len(train):,} training and {len(val):,} evaluation images, {len(names)} classes, noise: {noise}.")

    # With --frozen_backbone or --frozen_stages, features that are computed once replace the images; otherwise None.
    frozen = freeze_backbone(model_args, train, val, args)
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
    if data.data_dir is None:
        say(args, "or your own data in COCO format:\n    python examples/run_coco.py --data_dir DIR --help")


if __name__ == "__main__":
    run(main)
