"""Every parameter is a linear weight or is kept with a reason, never both, never neither."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modulora_core.errors import OptionError
from modulora_core.models.conversion import build_skeleton
from modulora_core.models.sites import LinearSite, decoder_linears, find_sites
from modulora_core.tests.tiny_models import ARCHITECTURES, tiny_config, tiny_model

LLAMA_LAYER = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}


def by_name(sites: list[LinearSite]) -> dict[str, LinearSite]:
    return {site.name: site for site in sites}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_in_exactly_one_list(architecture: str) -> None:
    model = tiny_model(architecture)
    sites = find_sites(model)
    linears = [site.name for site in sites.linears]
    assert len(linears) == len(set(linears))
    assert not set(linears) & set(sites.kept)
    assert set(linears) | set(sites.kept) == {
        n for n, _ in model.named_parameters(remove_duplicate=False)
    }
    assert all(sites.kept.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_kept_is_a_small_part(architecture: str) -> None:
    """Head and embeddings aside, less than a tenth of a decoder is kept: no kind of weight is missed."""
    model = tiny_model(architecture)
    sites = find_sites(model)
    kept = [
        n
        for n, reason in sites.kept.items()
        if reason not in ("embedding", "output head") and "tied" not in reason
    ]
    weights = sum(site.numel for site in sites.linears)
    assert sum(model.get_parameter(name).numel() for name in kept) < weights / 10, kept


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_site_says_what_its_parameter_is(architecture: str) -> None:
    model = tiny_model(architecture)
    for site in decoder_linears(model):
        matrix = (site.out_features, site.in_features)
        stored = matrix[::-1] if site.transposed else matrix
        shape = stored if site.experts is None else (site.experts, *stored)
        assert tuple(model.get_parameter(site.name).shape) == shape, site
        assert site.name.startswith(site.module + ".")
        assert (
            model.get_submodule(site.module)._parameters[site.name.removeprefix(site.module + ".")]
            is not None
        )
        assert site.numel == model.get_parameter(site.name).numel()


def test_the_linears_of_a_llama() -> None:
    modules = {
        f"model.layers.{layer}.{m}": shape for layer in range(2) for m, shape in LLAMA_LAYER.items()
    }
    sites = find_sites(tiny_model("llama"))
    assert set(sites.linears) == {
        LinearSite(
            f"{module}.weight", module, "linear", *shape, experts=None, transposed=False, bias=False
        )
        for module, shape in modules.items()
    }
    assert sites.kept["lm_head.weight"] == "output head"
    assert sites.kept["model.embed_tokens.weight"] == "embedding"
    assert sites.kept["model.norm.weight"] == "norm"


def test_biases_are_told_and_kept() -> None:
    sites = find_sites(tiny_model("llama-biased"))
    assert all(site.bias for site in sites.linears)
    assert sites.kept["model.layers.0.mlp.up_proj.bias"] == "bias"


def test_gpt2s_conv1d_is_a_transposed_linear_layer() -> None:
    model = tiny_model("gpt2")
    site = by_name(decoder_linears(model))["transformer.h.0.mlp.c_fc.weight"]
    assert (site.kind, site.out_features, site.in_features, site.transposed, site.bias) == (
        "conv1d",
        128,
        32,
        True,
        True,
    )
    module = model.get_submodule(site.module)
    x = torch.randn(3, site.in_features)
    assert torch.allclose(
        module(x), nn.functional.linear(x, module.weight.t(), module.bias), atol=1e-5
    )


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_fused_experts_are_stacks_of_matrices(architecture: str) -> None:
    sites = by_name(decoder_linears(tiny_model(architecture)))
    inner = 48 if architecture == "mixtral" else 24
    up, down = (
        sites[f"model.layers.1.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj")
    )
    assert (up.kind, up.experts, up.out_features, up.in_features, up.transposed) == (
        "experts",
        4,
        2 * inner,
        32,
        False,
    )
    assert (down.kind, down.experts, down.out_features, down.in_features) == (
        "experts",
        4,
        32,
        inner,
    )


@pytest.mark.parametrize("architecture", ["gpt_oss", "llama4_text"])
def test_experts_may_be_stored_transposed(architecture: str) -> None:
    """GPT-OSS says so by a decorator; Llama 4 doesn't, and hidden_size tells."""
    sites = [site for site in decoder_linears(tiny_model(architecture)) if site.kind == "experts"]
    assert {(s.transposed, s.experts, s.out_features, s.in_features) for s in sites} == {
        (True, 4, 96, 32),
        (True, 4, 32, 48),
    }
    assert {site.bias for site in sites} == {architecture == "gpt_oss"}


def test_the_bias_of_experts_is_kept() -> None:
    assert (
        find_sites(tiny_model("gpt_oss")).kept["model.layers.0.mlp.experts.down_proj_bias"]
        == "bias"
    )


@pytest.mark.parametrize(
    "architecture", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3"]
)
def test_routers_are_kept(architecture: str) -> None:
    kept = find_sites(tiny_model(architecture)).kept
    routers = [name for name in kept if name.endswith(("mlp.gate.weight", "router.weight"))]
    assert routers
    assert {kept[name] for name in routers} == {"router"}


def test_falcons_own_linear_class_is_linear() -> None:
    sites = by_name(decoder_linears(tiny_model("falcon")))
    assert sites["transformer.h.0.mlp.dense_h_to_4h.weight"].kind == "linear"


def test_a_subclass_that_computes_something_else_is_kept() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = Doubled(32, 48, bias=False)
    kept = find_sites(model).kept
    assert kept["model.layers.0.mlp.up_proj.weight"] == "Doubled isn't called as a linear layer"


def test_a_weight_that_two_layers_share_is_kept_under_both_names() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    sites = find_sites(model)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    assert [sites.kept[name] for name in names] == [
        f"shared with {names[1]}",
        f"tied to {names[0]}",
    ]


def test_a_convolution_is_not_a_stack_of_experts() -> None:
    model = tiny_model("llama")
    model.model.conv = nn.Conv1d(32, 32, 4, groups=32)
    assert find_sites(model).kept["model.conv.weight"] == "convolution kernel"


def test_the_meta_device_gives_the_same_sites() -> None:
    skeleton = build_skeleton(tiny_config("falcon"), torch.float32)
    assert find_sites(skeleton) == find_sites(tiny_model("falcon"))


# -- include and exclude


def test_include_takes_only_what_it_names() -> None:
    sites = find_sites(tiny_model("llama"), include=["*.mlp.*"])
    assert {site.module.split(".")[3] for site in sites.linears} == {"mlp"}
    assert sites.kept["model.layers.0.self_attn.q_proj.weight"] == "not in --include"
    assert sites.kept["lm_head.weight"] == "not in --include"


def test_the_head_is_taken_when_it_is_named() -> None:
    head = by_name(
        list(find_sites(tiny_model("llama"), include=["model.layers.*", "lm_head"]).linears)
    )["lm_head.weight"]
    assert (head.out_features, head.in_features) == (96, 32)


def test_a_tied_head_cannot_be_taken() -> None:
    model = tiny_model("llama-tied")
    assert find_sites(model).kept["lm_head.weight"] == "tied to model.embed_tokens.weight"
    with pytest.raises(
        OptionError, match=r"--include lm_head: .*got lm_head\.weight \(tied to model\.embed_tokens"
    ):
        find_sites(model, include=["lm_head"])


def test_exclude_moves_linears_to_what_is_kept() -> None:
    sites = find_sites(tiny_model("llama"), exclude=["model.layers.0.*", "*.down_proj"])
    assert (
        sites.kept["model.layers.0.mlp.up_proj.weight"] == "excluded by --exclude model.layers.0.*"
    )
    assert sites.kept["model.layers.1.mlp.down_proj.weight"] == "excluded by --exclude *.down_proj"
    assert "model.layers.1.mlp.up_proj.weight" in by_name(list(sites.linears))


def test_exclude_may_name_one_of_a_modules_parameters() -> None:
    sites = find_sites(tiny_model("mixtral"), exclude=["*.experts.gate_up_proj"])
    assert {site.name.rpartition(".")[2] for site in sites.linears if site.kind == "experts"} == {
        "down_proj"
    }


def test_excluding_what_is_kept_anyway_is_no_error() -> None:
    assert find_sites(tiny_model("llama"), exclude=["lm_head*"]) == find_sites(tiny_model("llama"))


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "near"),
    [("*.upproj", "up_proj"), ("lm_haed", "lm_head"), ("model.layers.0.mlp.up", "up_proj")],
)
def test_a_pattern_that_matches_nothing_names_near_misses(
    option: str, pattern: str, near: str
) -> None:
    with pytest.raises(OptionError) as caught:
        find_sites(tiny_model("llama"), **{option: [pattern]})
    message = str(caught.value)
    assert message.startswith(f"--{option} {pattern}: matches none of the ")
    assert near in message.partition("near: ")[2]


def test_including_what_is_not_linear_is_an_error() -> None:
    with pytest.raises(
        OptionError,
        match=r"--include model\.norm: expected linear weights.*got model\.norm\.weight \(norm\)",
    ):
        find_sites(tiny_model("llama"), include=["model.norm"])
