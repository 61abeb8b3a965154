"""Arguments of other types are refused by name, in one sentence."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

import modulora_core
from modulora_core.arguments import checked
from modulora_core.errors import OptionError, RequestError

api = modulora_core

WRONG = {
    "bytes": (lambda _: api.load_model("a\udcff"), "model 'a\\udcff': expected a name in UTF-8"),
    "out": (
        lambda _: api.quantize("m", None, "toy"),
        "out: expected a valid string or an instance of Path, got None",
    ),
    "include": (
        lambda _: api.quantize("m", "o", "toy", include="q_proj"),
        "include: 'str' instances are not allowed as a Sequence value, got 'q_proj'",
    ),
    "nan": (lambda _: api.Sampling(temperature=float("nan")), "temperature: expected 0"),
    "bool": (lambda _: api.Sampling(top_k=True), "top_k: expected a valid integer, got True"),
    "targets": (lambda _: api.LoRASettings(targets=[5]), "targets: expected a valid string"),
    "quantizer": (lambda _: api.Choice(5).create(), "name: expected a valid string, got 5"),
    "base": (lambda _: api.LoRALinear(nn.Linear(2, 2)), "base: expected an instance of"),
    "choice": (
        lambda _: api.quantize("m", "o", "toy", head={"quantizer": "toy"}),
        "head: expected an instance of Choice, got {'quantizer': 'toy'}",
    ),
    "config": (
        lambda _: api.finetune({"model": "m", "out": "o"}),
        "config: expected an instance of FinetuneConfig, got",
    ),
    "options": (
        lambda _: api.ModuLoRAConfig("toy", 5),
        "options: expected a valid dictionary, got 5",
    ),
}

FUNCTIONS = [
    name for name in modulora_core.__all__ if hasattr(getattr(api, name, None), "__wrapped__")
]


@pytest.mark.parametrize("case", WRONG)
def test_an_argument_of_another_type_is_refused(case, tmp_path):
    call, message = WRONG[case]
    with pytest.raises(RequestError) as found:
        call(tmp_path / "out")
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def parameters_and_arguments(name, **sound):
    """The parameters of a public function, and values for those that have no default."""
    parameters = inspect.signature(getattr(api, name)).parameters
    sound |= {"tasks": ["x"], "nbytes": 1}
    if "lora" in name or "adapter" in name:
        sound["model"] = nn.Module()
    needed = [each for each in parameters.values() if each.default is each.empty]
    return parameters, {each.name: sound.get(each.name, "x") for each in needed if each.kind < 4}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_refuse_other_types_in_every_argument(name):
    function, config = getattr(api, name), api.FinetuneConfig(model="m", out="o", data="d")
    parameters, arguments = parameters_and_arguments(name, config=config)
    for parameter in parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            with pytest.raises(OptionError, match=f"^{parameter.name}: expected .*, got <object"):
                function(**{**arguments, parameter.name: object()})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_path_is_taken_where_a_string_is(name, tmp_path):
    """A missing file or folder gives one error, as a string and as a Path."""
    function, missing = getattr(api, name), tmp_path / "missing"
    parameters, arguments = parameters_and_arguments(name, out=tmp_path / "out")
    places = {"source", "out", "adapter", "path", "base", "include_path", "data"}
    if not isinstance(arguments.get("model"), nn.Module):
        places.add("model")
    for place in places & set(parameters):
        found = []
        for value in (str(missing), missing):
            config = {"config": api.FinetuneConfig(model=value, out=value)}
            with pytest.raises(RequestError) as error:
                function(**{**arguments, **(config if name == "finetune" else {}), place: value})
            assert not str(error.value).startswith(f"{place}: expected a valid string")
            found.append(str(error.value))
        assert found[0] == found[1]


def test_a_config_takes_paths_and_says_what_it_refuses():
    one, other = (
        api.FinetuneConfig(model=of("m"), out=of("o"), data=[of("a"), of("b")], adapter=of("c"),
                           lora_file=of("f"))
        for of in (str, Path)
    )  # fmt: skip
    assert one == other
    assert one.to_yaml() == other.to_yaml()
    for wrong, message in (
        ({"ranks": 4}, "FinetuneConfig: unknown option 'ranks'; did you mean 'rank'"),
        ({"out": 5}, "FinetuneConfig: option 'out': expected a valid string, got 5"),
    ):
        with pytest.raises(OptionError, match=message):
            api.FinetuneConfig(**{"model": "m", "out": "o", **wrong})


@checked
def _function(
    a: int, b: float | None = None, *, c: Sequence[str] = (), d: Mapping[str, Any] | None = None,
    e: Literal["x", False] = "x", **more: Any,
) -> int:  # fmt: skip
    return a


def test_other_values_pass():
    assert _function(3, np.float64(3), c=["a"], d={}, e=False, g=5) == 3
    assert api.Sampling(temperature=np.float64(0.5)).temperature == 0.5
    for wrong in ({"a": 1.0}, {"a": True}, {"b": "1"}, {"c": "a"}, {"c": [1]}, {"e": "y"}):
        with pytest.raises(OptionError, match=f"^{next(iter(wrong))}: .*, got "):
            _function(**{"a": 1, **wrong})
    with pytest.raises(OptionError, match=r"e: expected 'x' or False, got tensor"):
        _function(1, e=torch.zeros(1))
    with pytest.raises(TypeError, match="too many"):
        _function(1, 2.0, 3)
