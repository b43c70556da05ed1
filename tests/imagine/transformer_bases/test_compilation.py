"""Regional compilation with an adapter: one graph per class of blocks, whatever the tokens and strengths are."""

from typing import Any

import pytest
import torch

from imagine.errors import WeightsError
from imagine.transformer_bases.adapter import prepare
from imagine.transformer_bases.families import sites_of
from tests import tiny_transformers
from tests.tiny_transformers import conditioned, predict, transformer


@torch.no_grad()
@pytest.mark.parametrize("name", tiny_transformers.FAMILIES)
def test_regional_compilation(name: str):
    torch._dynamo.reset()
    sizes: dict[str, Any] = {"n_layers": 2} if name == "z_image" else {"num_layers": 2}
    model = transformer(name, **sizes)
    adapter, graphs = tiny_transformers.adapter(model), list[int]()
    blocks = [model.get_submodule(site.rpartition(".")[0]) for site in sites_of(model)]
    kinds = len({(type(block), getattr(block, "use_dual_attention", False)) for block in blocks})

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph

    with adapter.attach(model):
        given = [conditioned(seed=3), conditioned(seed=4), conditioned(scales={"vision": torch.tensor([0.0, 0.5])})]
        wanted = [predict(name, model, each) for each in given]
        bare = predict(name, model)
        for block in blocks:
            block.compile(backend=backend, fullgraph=True)
        for each, want in zip(given, wanted, strict=True):
            assert (predict(name, model, prepare(model, each)) - want).abs().max() < 1e-5
        # The last block of SD3 has no text output; the first single block of FLUX.1 gets whole tensors, others slices.
        assert len(graphs) <= kinds + (name in ("sd3", "flux"))
        assert (predict(name, model) - bare).abs().max() < 1e-5
    with pytest.raises(WeightsError, match="compiled already"):
        adapter.attach(model)
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux2", "qwen"])
def test_strengths_that_differ_by_block_are_compiled_once(name: str):
    torch._dynamo.reset()
    model = transformer(name, num_layers=4)
    adapter, graphs, sites = tiny_transformers.adapter(model), list[int](), list(sites_of(model))

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph

    with adapter.attach(model):
        strengths = [{site: 0.5 for site in sites[::2]}, {sites[-1]: torch.tensor([1.0, 0.0])}]
        given = [conditioned(scales={"vision": each}) for each in strengths]
        wanted = [predict(name, model, each) for each in given]
        blocks = [model.get_submodule(site.rpartition(".")[0]) for site in sites]
        for block in blocks:
            block.compile(backend=backend, fullgraph=True)
        for each, want in zip(given, wanted, strict=True):
            assert (predict(name, model, prepare(model, each)) - want).abs().max() < 1e-5
        assert len(graphs) <= len({type(block) for block in blocks}) + (name == "flux2")
    torch._dynamo.reset()
