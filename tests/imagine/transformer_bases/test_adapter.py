"""The adapter on each family of transformers: attached exactly, on the target tokens only, with nothing mixed."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.errors import ConfigError, WeightsError
from imagine.inspection import inspect
from imagine.records import Conditioning, Tokens, take
from imagine.transformer_bases.adapter import TransformerAdapter, attached_adapters, prepare
from imagine.transformer_bases.families import FAMILIES, family_of, sites_of
from tests import tiny_stock, tiny_transformers
from tests.tiny_transformers import GRID, TEXT, TOKEN_WIDTH, conditioned, predict, tokens, transformer

NAMES = tuple(tiny_transformers.FAMILIES)
WITH_REFERENCES = tuple(name for name, tiny in tiny_transformers.FAMILIES.items() if tiny.references)
METADATA = {"base": "tiny", "encoder": "tiny", "feature_layer": "-2", "tokens": "6", "licence": "none"}


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether both are equal up to rounding, by which a batch may differ from a single row."""
    return one.shape == other.shape and bool((one - other).abs().max() < 1e-5)


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    return transformer(name)


def test_each_tiny_model_is_of_a_family_of_its_own():
    families = [family_of(transformer(name)) for name in NAMES]
    assert len(set(map(id, families))) == len(families) == len(FAMILIES)


@torch.no_grad()
def test_attach_and_detach_are_exact(name: str, model: Any):
    bare, state = predict(name, model), {key: each.clone() for key, each in model.state_dict().items()}
    hooks = [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()]
    adapter = tiny_transformers.adapter(model)
    assert torch.equal(predict(name, model), bare)
    with adapter.attach(model):
        assert list(model.state_dict()) == list(state) and attached_adapters(model) == [adapter]
        assert torch.equal(predict(name, model), bare)  # without a conditioning
        assert not same(predict(name, model, conditioned()), bare)
    assert torch.equal(predict(name, model), bare)
    assert [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()] == hooks
    assert all(torch.equal(each, state[key]) for key, each in model.state_dict().items())
    with pytest.raises(WeightsError, match="not attached"):
        adapter.detach(model)


@torch.no_grad()
def test_a_fresh_adapter_and_scale_zero_change_no_bit(name: str, model: Any):
    bare = predict(name, model)
    fresh = tiny_transformers.adapter(model, fresh=True)
    assert not fresh.active
    with fresh.attach(model):
        assert torch.equal(predict(name, model, conditioned()), bare)
    with tiny_transformers.adapter(model).attach(model):
        assert torch.equal(predict(name, model, conditioned(scales={"vision": 0.0})), bare)


@torch.no_grad()
def test_rows_of_a_batch_do_not_mix(name: str, model: Any):
    """Each row is drawn as if all rows had its tokens; a row without a person is drawn bare, bit for bit."""
    people, bare = tokens(3), predict(name, model, rows=3)
    mask = torch.ones(3, people.values.shape[1], dtype=torch.bool)
    mask[1], mask[2, 4:] = False, False
    with tiny_transformers.adapter(model).attach(model):
        batch = Conditioning({"vision": Tokens(people.values, mask)})
        for given in (batch, prepare(model, batch)):
            drawn = predict(name, model, given, rows=3)
            assert torch.equal(drawn[1], bare[1]) and not same(drawn[0], bare[0])
            for row, length in ((0, 6), (2, 4)):
                alone = Conditioning({"vision": Tokens(people.values[[row] * 3, :length])})
                assert same(drawn[row], predict(name, model, alone, rows=3)[row])


@torch.no_grad()
def test_threads_do_not_mix(name: str, model: Any):
    with tiny_transformers.adapter(model).attach(model):
        given: list[Conditioning | None] = [conditioned(seed=seed) for seed in (3, 4)] + [None]
        wanted = [predict(name, model, each) for each in given]
        start, drawn = threading.Barrier(3), dict[int, list[Tensor]]()

        @torch.no_grad()
        def draw(number: int) -> None:
            start.wait()
            drawn[number] = [predict(name, model, given[number]) for _ in range(4)]

        threads = [threading.Thread(target=draw, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, want in enumerate(wanted):
        assert all(torch.equal(each, want) for each in drawn[number])


@torch.no_grad()
def test_only_target_tokens_change(name: str, model: Any):
    """At the first site, everything except the target's part of the output stays bit-identical."""
    site = next(iter(sites_of(model).values()))
    references = 2 if tiny_transformers.FAMILIES[name].references else 0
    adapter, seen = tiny_transformers.adapter(model, every=100), list[tuple[Tensor, ...]]()
    assert len(adapter.layers()) == 1
    with adapter.attach(model):
        handle = site.attention.register_forward_hook(
            lambda _, __, out: seen.append(tuple(each.clone() for each in (out if isinstance(out, tuple) else (out,))))
        )
        predict(name, model, references=references)
        predict(name, model, conditioned(), references=references)
        handle.remove()
    for bare, changed in zip(seen[0][1:], seen[1][1:], strict=True):
        assert torch.equal(bare, changed)  # the text
    differs = (seen[0][0] != seen[1][0]).any(2).any(0)
    assert differs[:GRID].all() and not differs[GRID:].any()  # Z-Image: padding and text; others: references


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux2", "flux"])
def test_joint_sites_change_only_target_tokens(name: str):
    model = transformer(name, num_layers=1, num_single_layers=1)
    adapter, seen = tiny_transformers.adapter(model), list[Tensor]()
    site = sites_of(model)["single_transformer_blocks.0.attn"]
    torch.nn.init.zeros_(adapter.get_parameter("sites.transformer_blocks.0.attn.vision.gate"))
    with adapter.attach(model):
        handle = site.attention.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
        predict(name, model, references=2)
        predict(name, model, conditioned(), references=2)
        handle.remove()
    differs = (seen[0] != seen[1]).any(2).any(0)
    assert differs[TEXT : TEXT + GRID].all()
    assert not differs[:TEXT].any() and not differs[TEXT + GRID :].any()


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_REFERENCES)
def test_native_references_work_beside_the_adapter(name: str):
    model = transformer(name)
    with tiny_transformers.adapter(model).attach(model):
        drawn = {
            (references, given): predict(name, model, conditioned() if given else None, references=references)[:, :GRID]
            for references in (0, 2)
            for given in (False, True)
        }
    pairs = [(one, other) for one in drawn for other in drawn if one < other]
    assert all(not same(drawn[one], drawn[other]) for one, other in pairs)


@torch.no_grad()
def test_flux2_references_in_front_and_their_cached_keys():
    """The KV pipeline puts references first, caches their keys in one step, and leaves them out of the later steps."""
    model = transformer("flux2")
    given = tiny_transformers.flux2_inputs(2, references=1)
    target = {key: given[key][:, :GRID] for key in ("hidden_states", "img_ids")}
    first = {key: torch.cat([given[key][:, GRID:], target[key]], 1) for key in target}
    extract = {**given, **first, "kv_cache_mode": "extract", "num_ref_tokens": 4, "return_dict": False}

    def steps(conditioning: Conditioning | None) -> list[Tensor]:
        kwargs = {"joint_attention_kwargs": {} if conditioning is None else {"conditioning": conditioning}}
        out, cache = model(**extract, **kwargs)
        later = {**given, **target, "kv_cache": cache, "kv_cache_mode": "cached", "return_dict": False}
        return [out, model(**later, **kwargs)[0]]

    bare = steps(None)
    with tiny_transformers.adapter(model).attach(model):
        assert all(map(torch.equal, steps(None), bare))
        for one, other in zip(steps(conditioned()), bare, strict=True):
            assert one.shape == other.shape and not same(one, other)


# --- gradients ------------------------------------------------------------------------------------------------------


def gradients(name: str, model: Any, adapter: TransformerAdapter, in_thread: bool = False) -> dict[str, Tensor]:
    """Return the gradients of two forward passes with different people, of which the first one is walked back last."""
    adapter.zero_grad()
    losses = [predict(name, model, conditioned(seed=seed)).square().mean() for seed in (3, 4)]

    def backward() -> None:
        for loss in reversed(losses):
            loss.backward()

    if in_thread:  # as the autograd engine does on a GPU
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    else:
        backward()
    sites = {key: each for key, each in adapter.named_parameters() if key.startswith("sites")}
    return {key: each.grad.clone() for key, each in sites.items() if each.grad is not None}


@pytest.mark.parametrize("in_thread", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, in_thread: bool):
    model = transformer(name)
    model.requires_grad_(False)
    adapter = tiny_transformers.adapter(model)
    with adapter.attach(model):
        plain = gradients(name, model, adapter)
        model.train()
        model.enable_gradient_checkpointing()
        before = model._gradient_checkpointing_func
        checkpointed = gradients(name, model, adapter, in_thread)
        model.eval()
    assert len(plain) == sum(key.startswith("sites") for key, _ in adapter.named_parameters())
    assert all(each.any() for each in plain.values())
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)
    assert model._gradient_checkpointing_func is before and model.gradient_checkpointing


def test_a_fresh_adapter_learns(name: str):
    """Its gates get gradients, and the tokens get them once the gates are open."""
    model = transformer(name)
    fresh = tiny_transformers.adapter(model, fresh=True)
    with fresh.attach(model):
        predict(name, model, conditioned()).square().mean().backward()
    gates = [each for key, each in fresh.named_parameters() if key.endswith("gate")]
    assert all(each.grad is not None and each.grad.any() for each in gates)


# --- beside other features ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_lora_beside_the_adapter(name: str):
    from peft import LoraConfig

    model = transformer(name)
    if not hasattr(model, "add_adapter"):
        pytest.skip("diffusers loads no LoRA into PixArt")
    adapter, state = tiny_transformers.adapter(model), None
    with adapter.attach(model):
        drawn, state = predict(name, model, conditioned()), list(adapter.state_dict())
        torch.manual_seed(2)
        targets = ["to_q", "to_k", "to_v", "to_qkv_mlp_proj", "to_out.0"]
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        both = predict(name, model, conditioned())
        assert not same(both, drawn) and not same(both, predict(name, model))
        assert list(adapter.state_dict()) == state  # no LoRA landed in the branches
        model.unload_lora()
        assert torch.equal(predict(name, model, conditioned()), drawn)


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_first_block_cache(name: str):
    """A step that the cache skips gives what it gives on the same step computed, since the input is the same."""
    from diffusers import FirstBlockCacheConfig

    model = transformer(name)
    with tiny_transformers.adapter(model).attach(model):
        wanted = predict(name, model, conditioned())
        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with model.cache_context("cond"):
            assert same(predict(name, model, conditioned()), wanted)  # computed
        calls = list[int]()
        last = list(sites_of(model).values())[-1].attention
        handle = last.register_forward_hook(lambda *_: calls.append(1))
        with model.cache_context("cond"):
            assert same(predict(name, model, conditioned()), wanted)  # skipped, from the cached residual
        handle.remove()
        assert not calls
        model.disable_cache()


@torch.no_grad()
def test_base_stored_in_eight_bits(name: str):
    """Layerwise casting stores the base in float8; the adapter's weights stay as they are."""
    model = transformer(name)
    if name == "z_image":  # its embedding of the timestep reads the dtype of its own weights
        pytest.skip("diffusers skips no layer of Z-Image that its own code needs in full precision")
    adapter = tiny_transformers.adapter(model)
    with adapter.attach(model):
        full = predict(name, model, conditioned())
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        drawn, bare = predict(name, model, conditioned()), predict(name, model)
    assert any(each.dtype == torch.float8_e4m3fn for each in model.parameters())
    assert all(each.dtype == torch.float32 for each in adapter.parameters())
    assert (drawn - full).abs().max() < (drawn - bare).abs().max()


@torch.no_grad()
def test_group_offload(name: str):
    model = transformer(name)
    with tiny_transformers.adapter(model).attach(model):
        wanted = predict(name, model, conditioned())
        cpu = torch.device("cpu")
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        assert torch.equal(predict(name, model, conditioned()), wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux2", "flux", "qwen"])
def test_other_attention_settings_keep_the_adapter(name: str):
    model = transformer(name)
    with tiny_transformers.adapter(model).attach(model):
        wanted = predict(name, model, conditioned())
        model.set_attention_backend("_native_math")
        assert same(predict(name, model, conditioned()), wanted)
        model.reset_attention_backend()
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
        if name == "flux":
            model.fuse_qkv_projections()
            assert same(predict(name, model, conditioned()), wanted)


# --- several people -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_router_keeps_people_apart(name: str, model: Any):
    """One person is drawn as without a router, bit for bit; two get half each at first; the order of people counts."""
    routed, plain = (tiny_transformers.adapter(model, spec={"router": each}) for each in (True, False))
    plain.load_state_dict({key: each for key, each in routed.state_dict().items() if ".router." not in key})
    two, present = tokens(2, length=8), torch.ones(2, 2, dtype=torch.bool)
    with plain.attach(model):
        alone = [predict(name, model, Conditioning({"vision": Tokens(each)})) for each in two.values.chunk(2, 1)]
    record: dict[str, list[Tensor]] = {}
    with routed.attach(model):
        one_person = torch.tensor([[True, False]] * 2)
        mask = torch.arange(8).expand(2, 8) < 4
        masked = Conditioning({"vision": Tokens(two.values, mask)}, groups={"vision": one_person})
        assert same(predict(name, model, masked), alone[0])
        both = Conditioning({"vision": two}, groups={"vision": present}, record=record)
        drawn = predict(name, model, both)
        assert torch.equal(drawn, predict(name, model, prepare(model, both)))
    assert not same(drawn, alone[0]) and not same(drawn, alone[1])
    shares = record[f"router {next(iter(sites_of(model)))}"][0].exp()
    assert shares.shape == (2, 3, GRID) and (shares[:, :2] - 0.5).abs().max() < 0.01


@torch.no_grad()
def test_regions_limit_people(name: str, model: Any):
    """At the first site, each half of the picture gets what it gets from its person alone."""
    adapter = tiny_transformers.adapter(model, every=100)
    site, seen = next(iter(sites_of(model).values())), list[Tensor]()
    left = torch.zeros(1, 4, 4)
    left[:, :, :2] = 1
    regions = torch.stack([left, 1 - left], 1).expand(2, -1, -1, -1)
    two = tokens(2, length=8)
    given = [
        Conditioning({"vision": Tokens(two.values[:, :4])}), Conditioning({"vision": Tokens(two.values[:, 4:])}),
        Conditioning({"vision": two}, regions={"vision": regions}),
        Conditioning(
            {"vision": two}, regions={"vision": regions}, groups={"vision": torch.ones(2, 2, dtype=torch.bool)}
        ),
    ]  # fmt: skip
    with adapter.attach(model):
        handle = site.attention.register_forward_hook(
            lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out)[:, :GRID].clone())
        )
        for each in given:
            predict(name, model, each)
        handle.remove()
    wanted = torch.where(left.flatten().bool()[None, :, None], seen[0], seen[1])
    assert same(seen[2], wanted) and same(seen[3], wanted) and not same(seen[0], seen[1])


# --- caches, files and errors ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_keys_and_values_are_computed_once_per_picture(name: str, model: Any):
    adapter, calls = tiny_transformers.adapter(model), list[int]()
    for layer in adapter.layers().values():
        layer.branches()["vision"].to_k.register_forward_hook(lambda *_: calls.append(1))
    with adapter.attach(model):
        wanted = predict(name, model, conditioned())
        calls.clear()
        prepared = prepare(model, conditioned())
        assert all(torch.equal(predict(name, model, prepared), wanted) for _ in range(3))
    assert len(calls) == len(adapter.layers()) == len(sites_of(model))


@torch.no_grad()
def test_save_and_load(name: str, model: Any, tmp_path: Any):
    adapter = tiny_transformers.adapter(model, every=2)
    adapter.save(tmp_path, METADATA)
    loaded = TransformerAdapter.load(tmp_path, model)
    assert loaded.metadata["family"] == adapter.family and loaded.every == 2
    described = inspect(tmp_path / "adapter.safetensors")
    assert described["family"] == adapter.family and described["problems"] == []
    with adapter.attach(model):
        wanted = predict(name, model, conditioned())
    with loaded.attach(model):
        assert torch.equal(predict(name, model, conditioned()), wanted)


@torch.no_grad()
def test_two_adapters_at_once(name: str, model: Any):
    one, other = tiny_transformers.adapter(model), tiny_transformers.adapter(model, seed=2, name="style")
    both = Conditioning({"vision": tokens(2), "style": tokens(2, seed=8)})
    drawn = []
    for first, second in ((one, other), (other, one)):
        with first.attach(model), second.attach(model):
            drawn.append(predict(name, model, both))
            with pytest.raises(WeightsError, match="also has a branch"):
                tiny_transformers.adapter(model).attach(model)
    assert torch.equal(*drawn)
    with one.attach(model):
        assert not same(predict(name, model, conditioned()), drawn[0])
        with pytest.raises(WeightsError, match="No attached adapter reads the branch 'style'"):
            prepare(model, both)


def test_wrong_bases_are_named(tmp_path: Any):
    flux2 = transformer("flux2")
    tiny_transformers.adapter(flux2).save(tmp_path, METADATA)
    with pytest.raises(WeightsError, match=r"was made for FLUX\.2, but this transformer is Z-Image"):
        TransformerAdapter.load(tmp_path, transformer("z_image"))
    with pytest.raises(WeightsError, match="with 5 branches, but this one has width 32 and place for 7"):
        TransformerAdapter.load(tmp_path, transformer("flux2", num_layers=4))
    with pytest.raises(WeightsError, match=r"made for FLUX\.2, but this transformer is FLUX\.1"):
        tiny_transformers.adapter(flux2).attach(transformer("flux"))
    unet = tiny_stock.unet(False)
    with pytest.raises(WeightsError, match=r"UNet2DConditionModel cannot take this adapter: use a transformer of FLUX"):
        tiny_transformers.adapter(unet)
    with pytest.raises(WeightsError, match=r"family FLUX\.2, but this denoiser is a UNet2DConditionModel"):
        Adapter.load(tmp_path, unet)
    tiny_stock.identity(unet).save(tmp_path / "unet", METADATA)
    with pytest.raises(WeightsError, match="adapter for a U-Net, but this denoiser is a Flux2Transformer2DModel"):
        TransformerAdapter.load(tmp_path / "unet", flux2)


def test_damaged_files_are_named(tmp_path: Any):
    from safetensors.torch import load_file, save_file

    model = transformer("flux2")
    adapter = tiny_transformers.adapter(model)
    adapter.save(tmp_path, METADATA)
    file = tmp_path / "adapter.safetensors"
    tensors = load_file(file)
    missing = dict(list(tensors.items())[1:])
    for wrong, words in ((missing, "lacks"), ({**tensors, "more": torch.zeros(1)}, "more")):
        save_file(wrong, file, adapter.metadata)
        with pytest.raises(WeightsError, match=words):
            TransformerAdapter.load(tmp_path, model)


def test_wrong_conditionings_are_named():
    model = transformer("flux2")
    with tiny_transformers.adapter(model).attach(model):
        with pytest.raises(ConfigError, match="are for 3 pictures, but the transformer computes 2"):
            predict("flux2", model, conditioned(rows=3))
        ids = tiny_transformers.flux2_inputs(2)["img_ids"] + 1
        with pytest.raises(ConfigError, match="first coordinate must be 0"):
            given = {**tiny_transformers.flux2_inputs(2), "img_ids": ids}
            model(**given, joint_attention_kwargs={"conditioning": conditioned()})
        predict("flux2", model)  # a failed pass leaves nothing behind
    z_image = transformer("z_image")
    with tiny_transformers.adapter(z_image).attach(z_image):
        given = tiny_transformers.z_image_inputs(2)
        more = {"joint_attention_kwargs": {"conditioning": conditioned()}}
        with pytest.raises(ConfigError, match="omni mode"):
            z_image(**{**given, "x": [[each, each] for each in given["x"]]}, **more)
        with pytest.raises(ConfigError, match="must have one size"):
            z_image(**{**given, "x": [given["x"][0], given["x"][1][:, :, :4]]}, **more)
    with pytest.raises(ConfigError, match="concatenated"):
        tiny_transformers.adapter(model, spec={"fusion": "concatenated"})
    with pytest.raises(ConfigError, match="at least 1"):
        TransformerAdapter(model, [BranchSpec("vision", TOKEN_WIDTH)], every=0)


def test_a_conditioning_may_depend_on_the_rows():
    """A call may give a function of the number of rows, for passes that compute only some of the pictures."""
    model, asked = transformer("flux2"), list[int]()

    def given(rows: int) -> Conditioning | None:
        asked.append(rows)
        return None if rows == 1 else Conditioning({"vision": take(tokens(3), slice(rows))})

    with torch.no_grad(), tiny_transformers.adapter(model).attach(model):
        bare = predict("flux2", model, rows=1)
        assert torch.equal(predict("flux2", model, given, rows=1), bare)
        assert not same(predict("flux2", model, given, rows=2), predict("flux2", model, rows=2))
    assert asked == [1, 2]
