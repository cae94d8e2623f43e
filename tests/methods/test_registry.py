"""The arguments of the methods' own: by name, type and value, and whose they are."""

from __future__ import annotations

import pytest

from hf_balancemix.methods import METHODS
from hf_balancemix.methods.registry import arguments_by_method, check_method_args

ALL = {  # the arguments that each method has
    "focal": {"gamma": 1, "alpha": None},
    "asl": {"gamma_neg": 2.5, "gamma_pos": 1, "margin": 0, "detach_weight": False},
    "ll-r": {"delta": 0.1, "across_ranks": False},
    "ll-ct": {"delta": 1, "across_ranks": False},
    "ll-cp": {"delta": 0, "across_ranks": True},
    "spl-hill": {"lam": 1.5, "margin": -1, "gamma": 0.5},
    "splc": {"threshold": 0.65, "margin": 0.5, "gamma": 1, "first_epoch": 3},
    "db-loss": {
        "alpha": 0.2, "beta": 5, "mu": 0.3, "negative_scale": 5, "kappa": 0.1, "gamma": 1, "focal_scale": 1,
    },
    "co-teaching": {"scored": "mean"},
    "elr": {"lam": 7, "beta": 0.9},
    "nar": {
        "lam": 1.5, "beta": 0, "flip_negative": 0.9, "drop_negative": 0.6, "flip_positive": 0.05, "drop_positive": 0.3,
        "min_share": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_its_own_arguments_and_no_others(method):
    own = ALL.get(method, {})
    check_method_args(method, own)
    foreign = {name: value for other in ALL.values() for name, value in other.items()}
    foreign |= {"reduction": "mean", "mode": "correct", "class_counts": [1], "num_instances": 3, "peer": None, "x": 1}
    for name in foreign.keys() - own:
        assert refused(method, **{name: foreign[name]}).startswith(f"{name} is not an argument of {method}; ")


def refused(method: str, **own) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller reads the message
        check_method_args(method, own)
    return str(error.value)


def test_the_nearest_name_is_suggested():
    assert refused("asl", gama_neg=4) == "gama_neg is not an argument of asl; did you mean gamma_neg?"
    assert refused("focal", zzz=4) == "zzz is not an argument of focal; it must be one of gamma, alpha."
    assert "it takes none" in refused("balancemix", relabel_threshold=0.9)


@pytest.mark.parametrize(
    ("method", "own", "message"),
    [
        ("asl", {"gamma_neg": "4"}, "gamma_neg of asl is '4'; it must be a number."),
        ("asl", {"gamma_neg": True}, "gamma_neg of asl is True; it must be a number."),
        ("asl", {"gamma_neg": None}, "gamma_neg of asl is None; it must be a number."),
        ("asl", {"gamma_neg": [4]}, "gamma_neg of asl is [4]; it must be a number."),
        ("asl", {"margin": float("nan")}, "margin of asl is nan; it must be a number."),
        ("spl-hill", {"margin": float("inf")}, "margin of spl-hill is inf; it must be a number."),
        ("asl", {"detach_weight": "false"}, "detach_weight of asl is 'false'; it must be true or false."),
        ("asl", {"detach_weight": 0}, "detach_weight of asl is 0; it must be true or false."),
        ("focal", {"alpha": "no"}, "alpha of focal is 'no'; it must be a number or null."),
        ("splc", {"first_epoch": 1.5}, "first_epoch of splc is 1.5; it must be a whole number."),
        ("co-teaching", {"scored": "third"}, "scored of co-teaching is 'third'; it must be 'first' or 'second' or"),
        ("focal", {"alpha": 2}, "alpha is 2; it must be in [0, 1]."),
        ("db-loss", {"negative_scale": 0}, "negative_scale is 0; it must be positive and finite."),
        ("ll-cp", {"delta": -0.1}, "delta is -0.1; both must be 0 or more, and finite."),
        ("elr", {"lam": -1}, "lam is -1; it must be finite and at least 0."),
        ("nar", {"lam": True}, "lam of nar is True; it must be a number."),
        ("nar", {"drop_negative": 0.95}, "the first must not be the smaller one"),
    ],
)
def test_wrong_types_and_values_are_refused(method, own, message):
    assert message in refused(method, **own)


def test_with_several_methods_it_is_clear_whose_the_arguments_are():
    given = {"asl": {"gamma_neg": 2}, "splc": {"margin": 0.5}}
    assert arguments_by_method(["bce", "asl", "splc"], given) == given
    assert arguments_by_method(["bce", "asl"], {}) == {}
    # Either form for one.
    assert arguments_by_method(["asl"], {"gamma_neg": 2}) == arguments_by_method(["asl"], {"asl": {"gamma_neg": 2}})
    for methods, own in ((["bce", "asl"], {"gamma_neg": 2}), (["bce", "asl"], {"focal": {}}), (["asl"], {"asl": 2})):
        with pytest.raises(ValueError, match=r"it must map a method's name to its arguments, as in \{\"asl\": \{"):
            arguments_by_method(methods, own)
    with pytest.raises(ValueError, match="gama_neg is not an argument of asl"):
        arguments_by_method(["bce", "asl"], {"asl": {"gama_neg": 2}})
    with pytest.raises(ValueError, match=r"method_args is \[4\]; it must map"):
        arguments_by_method(["asl"], [4])
