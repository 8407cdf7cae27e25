"""A consolidated model holds what training holds, and transformers and peft load it by themselves."""

from __future__ import annotations

import json
import logging
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from mama.data.batches import tokenise
from mama.errors import ConfigError
from mama.export import frozen_weights, model_tensors
from mama.export.classifier_folder import Named, load_classifier, new_classifier, save_classifier
from mama.export.consolidate import Export, consolidate
from mama.export.model_folder import load_model, read_model, weights_digest
from mama.model.mama_model import MamaModel, build
from mama.run import checkpoints
from mama.run.files import read_object, write_json
from mama.run.model_state import digests
from mama.run.run_tokenizer import load_tokenizer
from mama.settings.schema import Config, HeadsConfig, VisionConfig
from tests.support import saved_run
from tests.support.cohort import SIZE, write_shards
from tests.support.saved_run import save_run
from tests.support.tiny_backbones import KERNEL, TEXT, VISION
from tests.support.tiny_run import config_of
from tests.support.word_tokenizer import tokenizer

CPU = torch.device("cpu")
ROWS = 40  # of the token embeddings of pretrained language models; the words of the tokenizer are fewer
TEXTS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("consolidate")
    write_shards(folder / "shards", {"train": 3, "test": 2})
    return folder


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Config:
    """The settings of a run of random weights; `save_run` makes its folder."""
    config = config_of(shards, "tiny")
    return replace(config, runs=str(tmp_path / "runs"), data=replace(config.data, workers=0))


def live(config: Config) -> MamaModel:
    """What an engine is started with at the newest checkpoint, merged by peft."""
    model = build(config, load_tokenizer(config.run_folder), KERNEL)
    found = checkpoints.newest(config.run_folder)
    assert found
    checkpoints.load_weights(model, found, digests(model))
    model.text.merge_adapters()
    return model.eval()


def require_equal(
    config: Config, dtype: torch.dtype = torch.float32, folder: Path | None = None, **load: Any
) -> MamaModel:
    """The model that is loaded from a folder, which is equal to that of the run in every bit of its dtype."""
    one, two = live(config), load_model(folder or config.run_folder / "model", CPU, **load)[0]
    expected, found = one.state_dict(), two.state_dict()
    assert found.keys() == expected.keys()
    exact = {name for name in found if name.endswith(("scale.log", "running_mean", "running_var"))}
    for name, tensor in found.items():
        if tensor.numel():
            assert tensor.dtype == (torch.float32 if name in exact else dtype), name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    buffers = dict(one.named_buffers())
    assert all(torch.equal(tensor, buffers[name].to(tensor.dtype)) for name, tensor in two.named_buffers())
    return two


def pretrained(folder: Path, kind: str, **save: Any) -> str:
    """A folder as a hub has it, with a tokenizer of our six words."""
    torch.manual_seed(5)
    rows = {"vocab_size": ROWS} if kind in TEXT else {}
    shape = AutoConfig.for_model(**((TEXT | VISION)[kind] | rows))
    model = AutoModel.from_config(shape, **without_pooler(kind))
    model.save_pretrained(folder, **save)
    if kind in TEXT:
        tokenizer().save(folder)
    return str(folder)


def without_pooler(kind: str) -> dict[str, bool]:
    return {"add_pooling_layer": False} if kind in ("bert", "vit") else {}


CASES = [*((kind, "gpt2", "lora") for kind in VISION), ("bare", "gpt2", "full"), ("dinov2", "llama", "lora"),
         ("dinov2", "llama", "frozen"), ("dinov2", "bert", "lora"), ("dinov2", "bert", "full")]  # fmt: skip


@pytest.mark.parametrize(("image", "language", "tune"), CASES)
def test_every_tower_is_equal_and_loads_in_transformers_alone(
    run: Config, image: str, language: str, tune: Any
) -> None:
    bare = VISION["dinov2_with_registers"] | {"num_register_tokens": 0}
    vision = VisionConfig(model=None, config=VISION.get(image, bare))
    config = replace(run, vision=vision, text=replace(run.text, config=TEXT[language], tune=tune))
    save_run(config)
    folder = consolidate(config)
    loaded = require_equal(config)
    images = torch.randn(2, 1, *SIZE)
    texts = tokenise(
        load_tokenizer(config.run_folder), [["Findings: a spiculated mass.", "BI-RADS 5."], ["Left CC."]], 64
    )
    plain, info = AutoModel.from_pretrained(folder / "vision", attn_implementation="sdpa", output_loading_info=True)
    options = {"interpolate_pos_encoding": True} if image == "vit" else {}
    pixels = images.expand(-1, plain.config.num_channels, -1, -1)
    with torch.inference_mode():
        assert torch.equal(live(config).embed_images(images)[0], loaded.embed_images(images)[0])
        assert torch.equal(live(config).embed_texts(texts), loaded.embed_texts(texts))
        patches = loaded.vision(images).patches.unflatten(0, (len(images), -1))
        states = plain.eval()(pixel_values=pixels, **options).last_hidden_state
    assert torch.equal(states[:, -patches.shape[1] :], patches)
    require_all_read(info)
    text, info = AutoModel.from_pretrained(folder / "text", output_loading_info=True)
    require_all_read(info)
    state = loaded.text.backbone.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in text.state_dict().items() if "pooler" not in name)
    consolidate(config, Export(dtype="bf16"))
    require_equal(config, torch.bfloat16)
    assert AutoModel.from_pretrained(folder / "vision").dtype == torch.bfloat16


def test_a_model_of_tissue_alone_stays_one(run: Config) -> None:
    """Consolidated, and fine-tuned."""
    config = replace(run, vision=replace(run.vision, tokens="tissue"))
    save_run(config)
    folder = consolidate(config)
    loaded = require_equal(config)
    images = torch.randn(2, 1, *SIZE)
    images[0, ..., 20:] = -1
    with torch.inference_mode():
        assert torch.equal(live(config).embed_images(images)[0], loaded.embed_images(images)[0])
        seen = loaded.vision(images)
        assert seen.counts == [24, 48]
        classifier = new_classifier(folder, 2, KERNEL).eval()
        classifier.head.weight.copy_(torch.randn(2, 24))
        save_classifier(Named(classifier, ["no", "yes"]), folder, folder.parent / "classifier")
        again = load_classifier(folder.parent / "classifier", CPU).model
        torch.testing.assert_close(classifier(images), seen.pooled @ classifier.head.weight.t(), atol=1e-5, rtol=0)
        assert torch.equal(again(images), classifier(images))


def test_patches_of_the_local_term_stay_those_of_their_block(run: Config) -> None:
    """And what another program computes by the names in config.yaml is the same."""
    loss = replace(run.loss, local_patches="tissue")
    config = replace(run, vision=replace(run.vision, local_block=1), loss=loss)
    save_run(config)
    folder = consolidate(config)
    loaded = require_equal(config)
    images = torch.rand(2, 1, *SIZE)
    images[0, ..., 20:] = -1
    plain = AutoModel.from_pretrained(folder / "vision", attn_implementation="sdpa").eval()
    with torch.inference_mode():
        found, expected = loaded.patch_embeddings(images), live(config).patch_embeddings(images)
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert (~found.isnan().any(2)).sum(1).tolist() == [24, 48]
        pixels = images.expand(-1, plain.config.num_channels, -1, -1)
        states = plain.layernorm(plain(pixel_values=pixels, output_hidden_states=True).hidden_states[1])
        assert torch.equal(states[1, -48:], loaded.vision(images).patches[48:])


@pytest.mark.parametrize("sentences", ["separator", "alone"])
def test_sentences_stay_as_the_run_read_them(run: Config, sentences: Any) -> None:
    config = replace(run, text=replace(run.text, sentences=sentences))
    save_run(config)
    consolidate(config)
    loaded, texts = require_equal(config), tokenise(tokenizer(), [["alpha beta", "gamma"], ["gamma"]], 64)
    with torch.inference_mode():
        found = loaded.sentence_embeddings(texts)
        assert torch.equal(found, live(config).sentence_embeddings(texts))
    assert torch.equal(found[0, 1], found[1, 0]) == (sentences == "alone")


def require_all_read(info: dict[str, Any]) -> None:
    """A pooler, which no tower has, is the only thing that transformers may start at random."""
    assert not info["unexpected_keys"]
    assert all(name.startswith("pooler.") for name in info["missing_keys"])


def test_frozen_weights_come_from_the_files_of_their_base(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with a head, half precision, many files, other names and fewer rows than there are tokens."""

    def refused(*_: Any) -> None:
        pytest.fail("a tower was built")

    def with_head(folder: Path, kind: str) -> str:
        assert kind == "gpt2"
        GPT2LMHeadModel(GPT2Config(**TEXT[kind], vocab_size=6)).half().save_pretrained(folder)
        tokenizer().save(folder)
        return str(folder)

    makers: dict[str, Callable[[Path, str], str]] = {
        "gpt2": with_head,
        "llama": lambda folder, kind: pretrained(folder, kind, max_shard_size="20KB"),
        "bert": pretrained,
    }
    vision = VisionConfig(model=pretrained(tmp_path / "vit", "vit"), freeze_norm=True)
    for kind, make in makers.items():
        text = replace(run.text, model=make(tmp_path / kind, kind), layers=2)
        config = replace(run, name=kind, vision=vision, text=text)
        save_run(config)
        with monkeypatch.context() as patched:
            patched.setattr(frozen_weights, "build_tower", refused)
            consolidate(config)
        require_equal(config)
    assert (tmp_path / "llama" / "model.safetensors.index.json").exists()


def test_a_tower_whose_weights_are_in_no_file_is_built_and_the_log_says_so(
    run: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = Path(pretrained(tmp_path / "base", "gpt2"))
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    of_bin = replace(run, name="bin", text=replace(run.text, model=str(base)))
    for config, why in (
        (run, "the weights are random"),
        (of_bin, f"{base}: safetensors files do not hold all of them"),
    ):
        save_run(config)
        with caplog.at_level(logging.INFO, "mama.export.frozen_weights"):
            consolidate(config)
        require_equal(config)
        assert caplog.text.count(f"text.model: {why}; this tower is built in memory") == 1
        assert "vision.model" not in caplog.text, "nothing of it is frozen but zeros"


def test_another_base_than_that_of_the_training_is_refused(run: Config, tmp_path: Path) -> None:
    config = replace(run, text=replace(run.text, model=pretrained(tmp_path / "base", "gpt2")))
    save_run(config)
    other = AutoModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        other.h[1].mlp.c_fc.weight[3] += 1
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"step-000003: the frozen tensor text\.\S+c_fc\.weight is not the one that"):
        consolidate(config)
    assert not (config.run_folder / "model").exists()


@pytest.mark.parametrize("tune", ["lora", "frozen"])
@pytest.mark.parametrize("kind", list(TEXT))
def test_an_adapter_loads_in_peft_alone_and_here_as_if_it_were_merged(
    run: Config, tmp_path: Path, kind: str, tune: Any
) -> None:
    place = pretrained(tmp_path / "base", kind)
    config = replace(run, text=replace(run.text, model=place, layers=2, tune=tune))
    save_run(config)
    folder = consolidate(config, Export(lora="adapter", dtype="bf16", out=tmp_path / "apart"))
    require_equal(config, torch.bfloat16, folder, base=place)
    recorded = read_object(folder / "text" / "base.json")
    assert (recorded["name"], recorded["layers"], recorded["vocabulary"]) == ("base", 2, len(tokenizer()))
    assert not list((folder / "text").glob("model*.safetensors"))
    plain = AutoModel.from_pretrained(place)
    plain.resize_token_embeddings(recorded["vocabulary"], mean_resizing=False)
    layers = plain.get_submodule({"gpt2": "h", "llama": "layers", "bert": "encoder.layer"}[kind])
    assert isinstance(layers, nn.ModuleList)
    del layers[2:]
    adapted = PeftModel.from_pretrained(plain, folder / "text").merge_and_unload()
    state = live(config).text.backbone.state_dict()
    assert all(torch.equal(tensor, adapted.state_dict()[name]) for name, tensor in state.items())
    for base, complaint in (
        (None, "needs its base base, but text.model: base cannot be loaded"),
        (str(tmp_path / "other"), "has other weights than"),
    ):
        if base:
            changed: PreTrainedModel = AutoModel.from_pretrained(place, **without_pooler(kind))
            next(changed.parameters()).data[1] += 1  # the token embedding
            changed.save_pretrained(base)
        with pytest.raises(ConfigError, match=rf"^{folder / 'text'}: [^\n]*{complaint}[^\n]*name the place[^\n]*$"):
            load_model(folder, CPU, base)


@pytest.mark.parametrize(("change", "reason"), [({"tune": "full"}, "text.tune is full"), ({}, "text.model is null")])
def test_an_adapter_needs_a_base_that_others_have(run: Config, change: dict[str, Any], reason: str) -> None:
    config = replace(run, text=replace(run.text, **change))
    with pytest.raises(ConfigError, match=rf"^--lora adapter: {reason}[^\n]*; leave it out$"):
        consolidate(config, Export(lora="adapter"))


def test_running_statistics_and_a_scale_that_is_not_trained_are_there(run: Config) -> None:
    config = replace(run, heads=HeadsConfig(embed_dim=16, hidden_dim=16, view_hidden_dim=16, norm="batch"))
    save_run(config)
    consolidate(config, Export(dtype="bf16"))
    require_equal(config, torch.bfloat16)
    config = replace(config, name="global", loss=replace(config.loss, local=0))
    save_run(config)
    consolidate(config)
    require_equal(config)


def test_two_names_of_one_tensor_are_both_written(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def tied(*arguments: Any, **options: Any) -> MamaModel:
        model = build(*arguments, **options)
        first, second = (model.text.get_submodule(f"backbone.h.{n}.ln_1") for n in range(2))
        second.weight = first.weight
        return model

    monkeypatch.setattr(saved_run, "build", tied)
    monkeypatch.setattr(model_tensors, "build", tied)
    config = replace(run, text=replace(run.text, tune="full"))
    save_run(config)
    state = load_model(consolidate(config), CPU)[0].text.state_dict()
    assert torch.equal(state["backbone.h.0.ln_1.weight"], state["backbone.h.1.ln_1.weight"])
    assert not torch.equal(state["backbone.h.0.ln_1.weight"], torch.ones(24))


def test_files_of_a_largest_size_hold_the_same(run: Config) -> None:
    save_run(run)
    folder = consolidate(run)
    whole = weights_digest(folder)
    assert consolidate(run, Export(largest=10_000)) == folder
    pieces = sorted((folder / "text").glob("model-*.safetensors"))
    assert len(pieces) > 3
    assert max(path.stat().st_size for path in pieces) < 40_000, "the token embedding alone is larger"
    require_equal(run)
    one = AutoModel.from_pretrained(folder / "text").state_dict()
    state = live(run).text.backbone.state_dict()
    assert all(torch.equal(tensor, one[name]) for name, tensor in state.items())
    assert weights_digest(folder) != whole
    consolidate(run)
    assert weights_digest(folder) == whole, "the same bytes every time"


def test_other_weights_have_another_digest(run: Config) -> None:
    text = replace(run.text, model=pretrained(Path(run.runs) / "gpt2", "gpt2"), config={})
    run = replace(run, text=text)
    save_run(run)
    exports = [Export(), Export(dtype="bf16"), Export(lora="adapter")]
    found = [weights_digest(consolidate(run, export)) for export in exports]
    save_run(run, step=4)
    found.append(weights_digest(consolidate(run)))
    assert len(set(found)) == 4
    found.append(weights_digest(consolidate(run, Export(step=3))))
    assert found[4] == found[0], "the same every time"


def test_a_checkpoint_is_chosen_and_a_place(run: Config, tmp_path: Path) -> None:
    save_run(run)
    earlier = saved_run.save_run
    earlier(run, step=5)
    assert read_model(consolidate(run)).step == 5
    assert read_model(consolidate(run, Export(step=3))).step == 3
    place = run.run_folder / "model"
    assert "README.md" not in read_object(place / "digests.json"), "an evaluation writes it anew"
    out = tmp_path / "elsewhere" / "model"
    assert consolidate(run, Export(out=out)) == out
    assert consolidate(run, Export(out=out, step=3)) == out, "a model is replaced"
    assert read_model(out).step == 3
    with pytest.raises(ConfigError, match=rf"^{run.run_folder}: has no checkpoint of step 4; there are 3, 5$"):
        consolidate(run, Export(step=4))
    with pytest.raises(ConfigError, match=r"^--best: [^\n]*; leave one of them out$"):
        Export(step=4, best=True)
    (tmp_path / "mine").mkdir()
    consolidate(run, Export(out=tmp_path / "mine"))
    with pytest.raises(ConfigError, match=rf"^--out: {tmp_path / 'runs'} exists and is no model folder; name another$"):
        consolidate(run, Export(out=tmp_path / "runs"))


def test_a_full_disk_names_the_file(run: Config) -> None:
    save_run(run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '\S+/vision/model\.safetensors'$"):
            consolidate(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (run.run_folder / "model").exists()


@pytest.mark.parametrize("harm", ["flipped", "foreign", "torn", "gone"])
@pytest.mark.parametrize("file", ["state-00000.safetensors", "frozen.json"])
def test_a_damaged_or_foreign_file_of_a_checkpoint_is_named(run: Config, file: str, harm: str) -> None:
    save_run(run)
    place = run.run_folder / "checkpoints" / "step-000003" / file
    content = place.read_bytes()
    if harm == "flipped":
        place.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif harm == "foreign":
        other = replace(run, name="other", seed=2)
        save_run(other)
        source = other.run_folder / "checkpoints" / "step-000003" / file
        place.write_bytes(source.read_bytes()[: len(content)])
        if file == "state-00000.safetensors":
            changed = bytearray(content)
            changed[-4:] = b"\0\0\0\0"
            place.write_bytes(bytes(changed))
    elif harm == "torn":
        place.write_bytes(content[: len(content) // 2])
    else:
        place.unlink()
    with pytest.raises(ConfigError, match=rf"^{place}: [^\n]*; name another step, or restore [^\n]*$"):
        consolidate(run, Export(step=3))
    with pytest.raises(ConfigError, match=rf"^[^\n]*{place}: [^\n]*$"):
        consolidate(run)


@pytest.mark.parametrize("last", [b"\0\0\0\0", b"\xff\xff\xff\xff"])  # another number, and none
def test_damage_that_shows_after_the_model_is_written_leaves_nothing_of_it(
    run: Config, last: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The digests are compared while the tensors are read; the checkpoint before is taken."""
    save_run(run, step=1)
    consolidate(run)
    save_run(run, step=3)
    place = run.run_folder / "checkpoints" / "step-000003" / "state-00000.safetensors"
    place.write_bytes(place.read_bytes()[:-4] + last)
    assert read_model(consolidate(run)).step == 1
    assert f"{place}: its content has changed since it was written; this checkpoint is skipped" in caplog.messages
    shutil.rmtree(place.parent.with_name("step-000001"))
    with pytest.raises(ConfigError, match=r"none of 1 checkpoints is whole, the last: "):
        consolidate(run)
    with pytest.raises(ConfigError, match=rf"^{place}: its content has changed [^\n]*; name another step, or restore "):
        consolidate(run, Export(step=3))
    assert read_model(run.run_folder / "model").step == 1
    assert not [path for path in run.run_folder.iterdir() if path.name.endswith((".partial", ".old"))]


def test_the_document_of_a_model_is_read_strictly(run: Config) -> None:
    save_run(run)
    folder = consolidate(run)
    facts = json.loads((folder / "model.json").read_text())
    for change, complaint in (
        ({"format": 3}, "format 3"),
        ({"step": -1}, "edited or damaged"),
        ({"dtype": "fp8"}, "fp8"),
    ):
        write_json(folder / "model.json", facts | change)
        with pytest.raises(ConfigError, match=rf"^{folder / 'model.json'}: [^\n]*{complaint}[^\n]*consolidate[^\n]*$"):
            read_model(folder)
    (folder / "model.json").rename(folder / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"^{folder}: an earlier release wrote this model[^\n]*consolidate` again$"):
        read_model(folder)
