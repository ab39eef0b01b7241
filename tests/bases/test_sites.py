from __future__ import annotations

import pytest
import torch

from helpers import tiny_bert, tiny_llama
from veneer.bases import SiteMap
from veneer.errors import TargetError


def test_llama_roles_groups_and_layers() -> None:
    sites = SiteMap(tiny_llama())
    assert len(sites) == 14
    first = sites.resolve("model.layers.0.self_attn.k_proj")[0]
    assert (first.role, first.group, first.layer) == ("k", "attention", 0)
    assert (first.in_features, first.out_features) == (32, 16)
    assert {site.role for site in sites.resolve("mlp")} == {"gate", "up", "down"}
    assert len(sites.resolve(["q", "v"])) == 4


def test_bert_roles_and_what_all_linear_leaves_out() -> None:
    sites = SiteMap(tiny_bert())
    assert {site.role for site in sites.resolve("all-linear")} == {"q", "k", "v", "o", "up", "down"}
    assert "classifier" not in {site.path for site in sites}  # heads belong to tasks
    assert not any("pooler" in site.path for site in sites.resolve("all-linear"))
    assert [site.path for site in sites.resolve("pooler.dense")] == ["bert.pooler.dense"]


def test_plain_module_without_layers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(3, 4), "second": torch.nn.Linear(4, 2)})
    assert [site.path for site in SiteMap(model).resolve("all-linear")] == ["first", "second"]


def test_unmatched_target_names_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"'q_porj' matches nothing.*Did you mean 'q_proj'"):
        SiteMap(tiny_llama()).resolve(["v_proj", "q_porj"])
    with pytest.raises(TargetError, match="No targets"):
        SiteMap(tiny_llama()).resolve([])


@pytest.mark.parametrize("targets", ["all-linear", "attention", ["q", "v"], "layers.1.mlp.up_proj"])
def test_shortest_names_pick_the_same_sites_as_endings(targets: str | list[str]) -> None:
    for model in (tiny_llama(), tiny_bert()):
        sites = SiteMap(model)
        if targets == "layers.1.mlp.up_proj" and "bert" in type(model).__name__.lower():
            continue
        chosen = sites.resolve(targets)
        names = tuple("." + name for name in sites.shortest_names(chosen))
        paths = [path for path, _ in model.named_modules() if ("." + path).endswith(names)]
        assert paths == [site.path for site in chosen]


def test_regular_expressions_exclusions_and_layers() -> None:
    sites = SiteMap(tiny_llama())
    assert [site.path for site in sites.resolve(r"/layers\.1\..*(q|v)_proj$/")] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert {site.role for site in sites.resolve("all-linear", exclude=["attention", "gate"])} == {"up", "down"}
    assert {site.layer for site in sites.resolve("all-linear", layers="1:")} == {1}
    assert {site.layer for site in sites.resolve("mlp", layers="-2:-1")} == {0}
    for options, message in (
        ({"exclude": ["all-linear"]}, "Nothing is left"),
        ({"layers": "5:"}, "picks none of this base's 2 layers, 0 to 1"),
        ({"layers": "first"}, "is no slice"),
        ({"exclude": ["mpl"]}, "Did you mean 'mlp'"),
    ):
        with pytest.raises(TargetError, match=message):
            sites.resolve("all-linear", **options)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="no regular expression"):
        sites.resolve("/(/")


def test_embeddings_and_convolutions_are_picked_by_name_only() -> None:
    sites = SiteMap(tiny_bert())
    assert [site.kind for site in sites.resolve("word_embeddings")] == ["embedding"]
    assert all(site.kind == "linear" for site in sites.resolve("all-linear"))
