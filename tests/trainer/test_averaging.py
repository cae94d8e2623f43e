"""The moving average of the weights: what it is, who sees it, and that a resumed run has the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import NAMES, arguments, flat, tiny_resnet, tiny_vit
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback

from hf_balancemix import BalanceMixTrainer, Mislabel, MultiLabelTrainer
from hf_balancemix.methods import trainer_for
from hf_balancemix.trainer import checkpoints
from hf_balancemix.trainer.averaging import check_average

DECAY = 0.8
# As in the recipe, but with steps that a short run notices.
RECIPE = {"preset": "ml-decoder", "ema_decay": DECAY, "learning_rate": 0.01}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Diary(TrainerCallback):
    """The weights that are trained, before the first step and after each, and what `at` does after a step."""

    def __init__(self, at=None) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.at = at

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))
        if self.at is not None:
            self.at(state.global_step)


def averages(diary: Diary, decay: float = DECAY) -> list[dict[str, torch.Tensor]]:
    """Of what the diary holds, by hand and in double precision."""
    found = [diary.weights[0]]
    for after in diary.weights[1:]:
        found.append(
            {
                name: decay * found[-1][name].double() + (1 - decay) * value.double()
                if value.is_floating_point()
                else value
                for name, value in after.items()
            }
        )
    return found


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), two[name].double(), rtol=1e-5, atol=1e-6, msg=name)
        else:
            assert torch.equal(value, two[name]), name


def noisy(dataset):
    return Mislabel(rate=0.4, seed=0).add_to(dataset)


def run(method: str, dataset, folder: Path, model, at=None, **changes):
    changes = {"ema_decay": DECAY} | changes
    trainer = trainer_for(method, arguments(folder, **changes), model=model, train_dataset=dataset)
    diary = Diary(at)
    trainer.add_callback(diary)
    trainer.train()
    return trainer, diary


# ---- what it is ----


@pytest.mark.parametrize(
    ("method", "make", "changes"),
    [
        ("bce", tiny_resnet, {}),
        ("bce", tiny_resnet, {"gradient_accumulation_steps": 3, "ema_decay": 0.3, "channels_last": True}),
        ("balancemix", tiny_resnet, {}),
        ("t-estimator", tiny_vit, {}),
    ],
)
def test_it_is_the_average_by_hand_and_training_does_not_notice(method, make, changes, dataset, tmp_path):
    data = noisy(dataset)
    trainer, diary = run(method, data, tmp_path / "averaged", make(), **changes)
    steps = 2 * 24 // (4 * changes.get("gradient_accumulation_steps", 1))
    assert len(diary.weights) == 1 + steps
    expected = averages(diary, changes.get("ema_decay", DECAY))[-1]
    # After training it is the model's weights.
    assert_close(weights(trainer.model), expected)
    counters = [name for name, value in expected.items() if not value.is_floating_point()]
    assert bool(counters) == (make is tiny_resnet)
    for name in counters:  # as they are, not a mean that is rounded down
        assert expected[name] == 2 * 24 // 4
    last = diary.weights[-1]
    moved = [name for name, value in expected.items() if not torch.allclose(value.float(), last[name].float())]
    assert any("running_var" in name for name in moved) == (make is tiny_resnet)
    assert any(name.endswith("weight") for name in moved)

    plain, other = run(method, data, tmp_path / "plain", make(), **changes | {"ema_decay": 0.0})
    for one, two in zip(diary.weights, other.weights, strict=True):
        assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert_close(weights(plain.model), other.weights[-1])


def test_a_second_training_begins_a_new_average(dataset, tmp_path):
    trainer, first = run("bce", dataset, tmp_path, tiny_resnet())
    end = weights(trainer.model)
    second = Diary()
    trainer.remove_callback(first)
    trainer.add_callback(second)
    trainer.train()
    assert_close(second.weights[0], end)
    assert_close(weights(trainer.model), averages(second)[-1])


# ---- who sees it ----


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_evaluation_and_save_model_use_it_in_mid_training(make, dataset, tmp_path):
    seen = {}

    def look(step: int) -> None:
        if step == 8:
            before = weights(trainer.model)
            seen["logits"] = trainer.predict(dataset).predictions
            seen["mAP"] = trainer.evaluate()["eval_mAP"]
            trainer.save_model(tmp_path / "saved")
            assert all(torch.equal(value, before[name]) for name, value in weights(trainer.model).items())

    trainer = MultiLabelTrainer(
        model=make(), args=arguments(tmp_path / "o", ema_decay=DECAY), train_dataset=dataset, eval_dataset=dataset
    )
    diary = Diary(look)
    trainer.add_callback(diary)
    trainer.train()
    assert len(diary.weights) == 13
    expected = averages(diary)
    assert_close(weights(trainer.model), expected[-1])  # what came between changed nothing

    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    assert_close(weights(saved), expected[8])
    assert not (tmp_path / "saved" / "ema.safetensors").exists()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    with torch.no_grad():
        logits = saved(**processor([row["image"] for row in dataset], return_tensors="pt")).logits
    torch.testing.assert_close(torch.from_numpy(seen["logits"]), logits, rtol=1e-4, atol=1e-4)
    other = MultiLabelTrainer(model=saved, args=arguments(tmp_path / "p"), eval_dataset=dataset)
    assert other.evaluate()["eval_mAP"] == pytest.approx(seen["mAP"], abs=1e-6)


def test_the_methods_own_scan_is_of_the_weights_that_are_trained(dataset, tmp_path):
    """What BalanceMix knows of the labels is the same with an average and without, to the last scan."""
    states = []
    for decay in (0.0, 0.9):
        args = arguments(tmp_path / str(decay), ema_decay=decay)
        trainer = BalanceMixTrainer(model=tiny_resnet(), args=args, train_dataset=noisy(dataset))
        trainer.train()
        states.append(trainer.balance_mix.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_model_has_its_own_weights_again_after_an_error(dataset, tmp_path):
    failed = []

    def look(step: int) -> None:
        before = weights(trainer.model)

        def broken(*args, **kwargs):
            assert not torch.equal(flat(trainer.model), torch.cat([v.float().flatten() for v in before.values()]))
            raise MemoryError

        step_of, trainer.prediction_step = trainer.prediction_step, broken
        with pytest.raises(MemoryError):
            trainer.evaluate()
        trainer.prediction_step = step_of
        assert all(torch.equal(value, before[name]) for name, value in weights(trainer.model).items())
        failed.append(step)

    args = arguments(tmp_path, ema_decay=DECAY, num_train_epochs=1)
    trainer = MultiLabelTrainer(model=tiny_resnet(), args=args, train_dataset=dataset, eval_dataset=dataset)
    diary = Diary(look)
    trainer.add_callback(diary)
    trainer.train()
    assert failed == [1, 2, 3, 4, 5, 6]
    assert_close(weights(trainer.model), averages(diary)[-1])


def test_before_training_there_is_no_average(dataset, tmp_path):
    model = tiny_resnet()
    before = weights(model)
    trainer = MultiLabelTrainer(
        model=model, args=arguments(tmp_path / "o", ema_decay=DECAY), train_dataset=dataset, eval_dataset=dataset
    )
    assert trainer.evaluate()["eval_mAP"] > 0
    with torch.no_grad():  # weights that were loaded meanwhile
        for parameter in model.parameters():
            parameter.add_(0.5)
    changed = weights(model)
    trainer.save_model()
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "o")
    assert_close(weights(saved), changed)
    diary = Diary()
    trainer.add_callback(diary)
    trainer.train()
    assert_close(diary.weights[0], changed)
    assert not torch.equal(changed["classifier.1.weight"], before["classifier.1.weight"])
    assert_close(weights(trainer.model), averages(diary)[-1])


# ---- checkpoints ----


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_a_checkpoint_holds_both_and_a_push_only_the_average(make, dataset, tmp_path):
    args = arguments(tmp_path / "o", ema_decay=DECAY, save_strategy="steps", save_steps=5)
    trainer = MultiLabelTrainer(model=make(), args=args, train_dataset=dataset)
    diary = Diary()
    trainer.add_callback(diary)
    args.push_to_hub = True  # from here on, but to a folder

    def push(checkpoint: str) -> None:
        folder = tmp_path / "pushed" / Path(checkpoint).name
        folder.mkdir(parents=True)
        trainer._set_model_aside(Path(checkpoint), folder)

    trainer._push_from_checkpoint, trainer._finish_current_push = push, lambda: None
    trainer.train()
    expected = averages(diary)
    for step in (5, 10):
        folder = tmp_path / "o" / f"checkpoint-{step}"
        assert checkpoints.check(folder) is None
        assert "ema.safetensors" in json.loads((folder / checkpoints.MANIFEST).read_text())["files"]
        raw = AutoModelForImageClassification.from_pretrained(folder)
        assert all(torch.equal(value, diary.weights[step][name]) for name, value in weights(raw).items())
        assert_close(load_file(folder / "ema.safetensors"), expected[step])

        pushed = tmp_path / "pushed" / folder.name
        assert_close(weights(AutoModelForImageClassification.from_pretrained(pushed)), expected[step])
        files = {path.name for path in pushed.iterdir()}
        assert {"model.safetensors", "config.json", "preprocessor_config.json"} <= files
        assert not files & {"ema.safetensors", "optimizer.pt", "run.json", "training_args.bin"}
    assert_close(weights(trainer.model), expected[12])


def test_without_an_average_a_checkpoint_is_as_before(dataset, tmp_path):
    run("bce", dataset, tmp_path, tiny_resnet(), ema_decay=0.0, save_strategy="epoch", num_train_epochs=1)
    folder = tmp_path / "checkpoint-6"
    assert not (folder / "ema.safetensors").exists()
    # Checkpoints from before there was an average have no such fact, and are resumed.
    facts = json.loads((folder / "run.json").read_text())
    del facts["ema_decay"]
    (folder / "run.json").write_text(json.dumps(facts))
    checkpoints.write_manifest(folder)
    args = arguments(tmp_path, save_strategy="epoch")
    trainer = MultiLabelTrainer(model=tiny_resnet(), args=args, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
    args = arguments(tmp_path, save_strategy="epoch", num_train_epochs=3, ema_decay=0.9)
    trainer = MultiLabelTrainer(model=tiny_resnet(), args=args, train_dataset=dataset)
    with pytest.raises(ValueError, match=r"its ema_decay is None, this run's is 0\.9"):
        trainer.train(resume_from_checkpoint=True)


def die_at(step: int):
    def at(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    return at


@pytest.mark.parametrize(
    ("method", "make", "changes"),
    [
        ("bce", tiny_resnet, {}),
        ("balancemix", tiny_resnet, RECIPE),
        ("balancemix", tiny_vit, RECIPE | {"eval_strategy": "steps", "eval_steps": 3}),
    ],
)
def test_killed_and_resumed_is_bit_equal_in_weights_and_average(method, make, changes, dataset, tmp_path):
    data = noisy(dataset)

    def trainer_in(folder: str, at=None, start: int = 0):
        args = arguments(
            tmp_path / folder, **{"ema_decay": DECAY, "save_strategy": "steps", "save_steps": 2} | changes
        )
        trainer = trainer_for(method, args, model=make(seed=start), train_dataset=data, eval_dataset=dataset)
        diary = Diary(at)
        trainer.add_callback(diary)
        return trainer, diary

    whole, diary = trainer_in("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer_in("killed", die_at(9))[0].train()
    assert checkpoints.last_whole_checkpoint(tmp_path / "killed").name == "checkpoint-8"  # two steps into the second
    resumed, later = trainer_in("killed", start=1)  # from other weights, which the checkpoint's replace
    resumed.train(resume_from_checkpoint=True)

    assert len(later.weights) == 1 + 4
    for one, two in zip(diary.weights[8:], later.weights, strict=True):
        assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert torch.equal(flat(whole.model), flat(resumed.model))
    assert_close(weights(whole.model), averages(diary)[-1])
    for step in (10, 12):
        for name in ("model", "ema"):
            one, two = (
                load_file(tmp_path / folder / f"checkpoint-{step}" / f"{name}.safetensors")
                for folder in ("whole", "killed")
            )
            assert one.keys() == two.keys()
            assert all(torch.equal(value, two[key]) for key, value in one.items())
    figures = [[line["eval_mAP"] for line in t.state.log_history if "eval_mAP" in line] for t in (whole, resumed)]
    assert figures[0] == figures[1]
    assert len(figures[0]) == (4 if "eval_strategy" in changes else 0)


def test_the_best_checkpoints_average_is_left_in_the_model(dataset, tmp_path):
    scores = iter([0.3, 0.9, 0.1, 0.2])
    args = arguments(
        tmp_path, ema_decay=DECAY, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3,
        load_best_model_at_end=True, metric_for_best_model="mAP", greater_is_better=True,
    )  # fmt: skip
    trainer = MultiLabelTrainer(
        model=tiny_resnet(), args=args, train_dataset=dataset, eval_dataset=dataset,
        compute_metrics=lambda prediction: {"mAP": next(scores)},
    )  # fmt: skip
    diary = Diary()
    trainer.add_callback(diary)
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-6"
    stored = load_file(tmp_path / "checkpoint-6" / "ema.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in weights(trainer.model).items())
    assert_close(stored, averages(diary)[6])
    # The next training begins with what was left.
    args.eval_strategy, args.load_best_model_at_end = "no", False
    again = Diary()
    trainer.add_callback(again)
    trainer.train()
    assert_close(again.weights[0], stored)


# ---- what cannot be averaged ----


def plain_module() -> torch.nn.Module:
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_vit()
            self.config = self.net.config

        def forward(self, pixel_values):
            return self.net(pixel_values=pixel_values)

    return Plain()


REFUSED = {
    "a Plain": lambda **given: MultiLabelTrainer(model=plain_module(), **given),
    "a TwoNetworks": lambda **given: trainer_for("co-teaching", model=tiny_resnet(), **given),
    "model_init": lambda **given: MultiLabelTrainer(model_init=lambda: tiny_vit(), **given),
    "half precision": lambda **given: MultiLabelTrainer(model=tiny_vit().to(torch.bfloat16), **given),
    "save_only_model": lambda **given: MultiLabelTrainer(model=tiny_vit(), **given),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_averaged_is_refused_with_the_way_out(why, dataset, tmp_path):
    def build(decay: float):
        args = arguments(tmp_path, ema_decay=decay, save_only_model=why == "save_only_model")
        return REFUSED[why](args=args, train_dataset=dataset)

    with pytest.raises(ValueError, match=why) as error:
        build(0.9)
    message = str(error.value)
    assert message.startswith("ema_decay is 0.9, but ")
    assert message.endswith("Set ema_decay to 0, which averages nothing.")
    assert "\n" not in message
    assert build(0.0).model is not None  # the way out


@pytest.mark.parametrize("switch", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_split_models_are_refused(switch, dataset, tmp_path):
    trainer = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path, ema_decay=0.5), train_dataset=dataset)
    check_average(trainer)
    setattr(trainer, switch, True)
    with pytest.raises(ValueError, match=r"FSDP and DeepSpeed.*Set ema_decay to 0"):
        check_average(trainer)


def test_weights_in_single_precision_under_bf16_are_averaged(dataset, tmp_path):
    trainer, diary = run("bce", dataset, tmp_path, tiny_vit(), bf16=True, num_train_epochs=1)
    assert trainer.model.dtype == torch.float32
    assert_close(weights(trainer.model), averages(diary)[-1])
    assert trainer.model.config.num_labels == len(NAMES)
