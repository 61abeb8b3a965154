"""Every parameter is a linear weight or stays dense for a reason, never both, never neither."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, RwkvConfig

from modulora_core.errors import OptionError
from modulora_core.hf.load_model import load_model
from modulora_core.layers import QuantLinear
from modulora_core.models.sites import find_sites
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.tiny_models import (
    EVERY_ARCHITECTURE,
    tiny_model,
)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def sites_of(architecture):
    return {site.name: site for site in find_sites(tiny_model(architecture)).linears}


@EVERY_ARCHITECTURE
def test_every_parameter_is_in_one_list_and_few_weights_stay_dense(architecture):
    model = tiny_model(architecture)
    sites = find_sites(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    linears = {site.name: site for site in sites.linears}
    assert len(linears) == len(sites.linears)
    assert not linears.keys() & sites.dense.keys()
    assert linears.keys() | sites.dense.keys() == parameters.keys()
    ends = {
        n for n, why in sites.dense.items() if why in ("embedding", "output head") or "tied" in why
    }
    kept = sum(parameters[name].numel() for name in sites.dense.keys() - ends)
    assert kept < sum(site.numel for site in sites.linears) / 10, "a kind of weight is missed"
    for name, site in linears.items():
        matrix = (site.out_features, site.in_features)
        stored = matrix[::-1] if site.transposed else matrix
        shape = stored if site.experts is None else (site.experts, *stored)
        assert tuple(parameters[name].shape) == shape
        assert site.numel == parameters[name].numel()
        assert name.rpartition(".")[0] == site.module


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_linear_is_judged_by_its_product():
    assert sites_of("falcon")["transformer.h.0.mlp.dense_h_to_4h.weight"].kind == "linear"
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = _Doubled(32, 48, bias=False)
    model.model.conv = nn.Conv1d(32, 32, 4, groups=32)
    kept = find_sites(model).dense
    assert kept["model.layers.0.mlp.up_proj.weight"] == "_Doubled isn't called as a linear layer"
    assert kept["model.conv.weight"] == "3-D parameter of Conv1d, not a linear weight"


@pytest.mark.parametrize(
    ("config", "read"),
    [
        (MambaConfig(hidden_size=32, state_size=4), {"mixer.dt_proj"}),
        (RwkvConfig(hidden_size=32), {"attention.output", "feed_forward.value"}),
    ],
)
def test_a_layer_whose_weight_the_model_reads_stays_dense(config, read, toy, tmp_path):
    """Mamba computes ``self.dt_proj.weight @ x``, and RWKV scales weights in place."""
    config.vocab_size, config.num_hidden_layers = 96, 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    quantize(str(tmp_path / "dense"), tmp_path / "packed", "toy")
    model = load_model(tmp_path / "packed", device="cpu")
    kept = {".".join(path.split(".")[-2:]) for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and not isinstance(module, QuantLinear)}  # fmt: skip
    assert {path for path in kept if "head" not in path} == read
    found = model.eval()(torch.arange(3, 12)[None]).logits
    dense = model.dequantize()(torch.arange(3, 12)[None]).logits
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)


def test_a_weight_that_two_layers_share_is_kept_under_both_names():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    kept = find_sites(model).dense
    assert (kept[first], kept[second]) == (f"shared with {second}", f"tied to {first}")


def test_include_and_exclude_choose_modules_or_parameters(llama):
    sites = find_sites(llama, include=["*.mlp.*", "lm_head"], exclude=["model.layers.0.*"])
    assert {site.module for site in sites.linears} == {
        "lm_head", *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))
    }  # fmt: skip
    assert sites.dense["model.layers.0.self_attn.q_proj.weight"] == "not in --include"
    assert (
        sites.dense["model.layers.0.mlp.up_proj.weight"] == "excluded by --exclude model.layers.0.*"
    )
    moe = find_sites(tiny_model("mixtral"), exclude=["*.experts.gate_up_proj"]).linears
    assert {s.name.rpartition(".")[2] for s in moe if s.kind == "experts"} == {"down_proj"}
    assert find_sites(llama, exclude=["lm_head*"]) == find_sites(llama), "it is kept anyway"


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(("pattern", "near"), [("*.upproj", "up_proj"), ("lm_haed", "lm_head")])
def test_a_pattern_that_matches_nothing_names_near_misses(llama, option, pattern, near):
    with pytest.raises(OptionError, match=rf"^--{option} .*: matches none of the .*near: .*{near}"):
        find_sites(llama, **{option: [pattern]})


def test_including_a_weight_that_cannot_be_quantized_is_refused(llama):
    expected = r"--include model\.norm: expected linear weights.*got model\.norm\.weight \(norm\)"
    with pytest.raises(OptionError, match=expected):
        find_sites(llama, include=["model.norm"])
    tied = tiny_model("llama-tied")
    with pytest.raises(OptionError, match=r"lm_head\.weight \(tied to model\.embed_tokens"):
        find_sites(tied, include=["lm_head"])
