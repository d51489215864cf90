"""A run becomes a folder that is read again before it is there; what cannot be exported is one message."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax import export, parts
from itjax.base import freeze, schema, tree
from itjax.base.freeze import Fault
from itjax.base.records import DataPosition
from itjax.hub import configs, names, weights
from itjax.hub.folder import Folder
from itjax.models.model import build
from itjax.parallel.mesh import mesh_for
from itjax.text import formats, tokenizer
from itjax.train import checkpoint, loop
from itjax.train.checkpoint import Checkpoints
from tests.fakes import TINY

pytest.importorskip("tokenizers")

SMALL = schema.Architecture(layers=2, dim=32, heads=2, kv_heads=1, head_size=16, ffn=48)
TEXTS = ["What is the capital of France? Paris.", "Name a colour. Green.", "Answer in one word."] * 3


@pytest.fixture(scope="module")
def chatml() -> bytes:
    return tokenizer.train(TEXTS, size=300, controls=formats.CHATML_CONTROLS)


def published(place: Path, chatml: bytes, *, spare: int = 0) -> Path:
    """A llama with a chat tokenizer, from nobody."""
    place.mkdir()
    size = tokenizer.SentencePiece(chatml).size + spare
    config = dataclasses.replace(TINY, vocab=size)
    rng = np.random.default_rng(1)
    abstract = build(config, dtype="float32", attention="auto", remat="none").abstract
    params = jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape) * 0.3, jnp.float32), abstract)
    weights.save(place, params, names.entries(config), dtype="float32")
    fields = configs.write(config, dtype="float32", bos=2, eos=3, pad=0, length=64)
    (place / "config.json").write_text(json.dumps(fields))
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7], "temperature": 0.6}))
    (place / "tokenizer.model").write_bytes(chatml)
    return place


def trained(run_dir: Path, chatml: bytes, *, steps: tuple[int, ...] = (4,), **settings) -> tuple[schema.Run, dict]:
    """A run folder as training leaves it: parameters from the seed (or the folder), every one of them moved a little."""
    run = schema.Run(
        run_dir=str(run_dir), length=64, **{"steps": 4, "files": "none.jsonl", "architecture": SMALL, **settings}
    )
    run_dir.mkdir()
    (run_dir / "config.json").write_text(freeze.to_json(run))
    (run_dir / "tokenizer.model").write_bytes(chatml)
    mesh, began = mesh_for(run.parallel), parts.model_folder(run)
    config = parts.model_config(run, tokenizer.SentencePiece(chatml).size, began)
    network = parts.model_of(run, config)
    compiled = loop.compile_step(run, network, mesh, num_steps=4)
    rng = np.random.default_rng(2)

    def moved(leaf):
        near = np.asarray(rng.normal(size=leaf.shape) * 0.2 + (0.5 if leaf.ndim < 3 else 0), leaf.dtype)
        return jax.device_put(near, leaf.sharding)

    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), compiled.abstract)
    params = jax.tree.map(moved, compiled.abstract.params)
    state = dataclasses.replace(state, params=params, frozen={})
    if run.optimizer.average:
        state = dataclasses.replace(state, average=jax.tree.map(lambda leaf: leaf / 2, params))
    if run.optimizer.kind == "schedule_free_adamw":
        state = dataclasses.replace(state, opt_state=compiled.tx.init(params))
    every = schema.Checkpoint(keep=9, asynchronous=False)
    with contextlib.closing(Checkpoints(run_dir / "checkpoints", every)) as saved:
        for step in steps:
            numbered = dataclasses.replace(state, step=jnp.int32(step))
            saved.save(
                numbered, DataPosition(step, "plan"), {checkpoint.BASE: began.fingerprint() if began else ""}, {}
            )
    return run, tree.flatten(params)


def settings(run_dir: Path, out: Path, *flags: str) -> export.Settings:
    return export._settings(["export", f"--run_dir={run_dir}", f"--out={out}", *flags])


def exported(run_dir: Path, out: Path, *flags: str) -> list[str]:
    said: list[str] = []
    export.export(settings(run_dir, out, *flags), say=said.append)
    return said


def loaded(out: Path) -> tuple[Folder, dict[str, np.ndarray]]:
    opened = Folder.open(out)
    abstract = build(opened.config, dtype="float32", attention="auto", remat="none").abstract
    return opened, {path: np.asarray(leaf) for path, leaf in tree.flatten(opened.load(abstract)).items()}


def test_a_preset_from_nothing_becomes_a_llama(tmp_path, chatml):
    """`tiny` scales its embeddings and ties its head, which no Llama does: both are written out. Padding rows are cut."""
    _, params = trained(tmp_path / "run", chatml)
    said = exported(tmp_path / "run", tmp_path / "out", "--dtype=float32", "--shard_gb=0.00005")
    opened, read = loaded(tmp_path / "out")
    size = tokenizer.SentencePiece(chatml).size
    assert (opened.config.vocab, opened.config.tie_embeddings, opened.config.embed_scale) == (size, False, 1.0)
    np.testing.assert_array_equal(read["head/kernel"], params["embed/kernel"][:size])
    np.testing.assert_array_equal(read["embed/kernel"], np.asarray(params["embed/kernel"][:size]) * np.float32(3.2))
    for path in params.keys() - {"embed/kernel"}:
        np.testing.assert_array_equal(read[path], params[path])
    words = "\n".join(said)
    assert "written times 3.2, and the head, which was tied to it, apart" in words
    assert "the same to the last bit" in words
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    } <= {path.name for path in (tmp_path / "out").iterdir()}
    chatml_end = tokenizer.SentencePiece(chatml).control("<|im_end|>")
    assert opened.stop_ids == {3, chatml_end}


def test_what_is_exported_is_what_was_evaluated(tmp_path, chatml):
    """The average where a run keeps one, and the last parameters only where that is asked for."""
    _, params = trained(tmp_path / "run", chatml, optimizer=schema.Optimizer(average=0.9), steps=(2, 4))
    name = "layers/mlp/up/kernel"
    for flags, step, wanted in (
        ([], 4, params[name] / 2),
        (["--step=2"], 2, params[name] / 2),
        (["--noaverage"], 4, params[name]),
    ):
        restored = export.restored(settings(tmp_path / "run", tmp_path / "out", *flags))
        assert restored.step == step
        np.testing.assert_array_equal(tree.flatten(restored.params)[name], wanted)


def test_a_schedule_free_run_gives_its_mean(tmp_path, chatml):
    _, params = trained(tmp_path / "run", chatml, optimizer=schema.Optimizer(kind="schedule_free_adamw", b1=0.9))
    restored = export.restored(settings(tmp_path / "run", tmp_path / "out"))
    name = "layers/mlp/up/kernel"  # before the first step all its sequences are the same
    np.testing.assert_allclose(tree.flatten(restored.params)[name], params[name], rtol=1e-5)


def test_adapters_of_a_folder_go_out_merged_or_alone(tmp_path, chatml):
    base = published(tmp_path / "base", chatml)
    adapted = schema.Lora(rank=2, targets=("layers/attn/*",))
    _, params = trained(tmp_path / "run", chatml, model=str(base), lora=adapted, architecture=schema.Architecture())
    said = exported(tmp_path / "run", tmp_path / "merged", "--dtype=float32")
    opened, read = loaded(tmp_path / "merged")
    _, before = loaded(base)
    a, b = np.asarray(params["layers/attn/q/lora_a"]), np.asarray(params["layers/attn/q/lora_b"])
    wanted = before["layers/attn/q/kernel"] + 16 * np.einsum("ldr,lrnh->ldnh", a, b)
    np.testing.assert_allclose(read["layers/attn/q/kernel"], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(read["layers/mlp/up/kernel"], before["layers/mlp/up/kernel"])
    assert opened.config.tie_embeddings
    assert 7 in opened.stop_ids  # as the base's own generation config has it
    assert opened.generation["temperature"] == 0.6
    assert "those of the run move by at most" in "\n".join(said)

    exported(tmp_path / "run", tmp_path / "alone", "--adapter")
    assert json.loads((tmp_path / "alone" / "adapter_config.json").read_text())["r"] == 2
    assert (tmp_path / "alone" / "adapter_model.safetensors").stat().st_size < 20_000
    assert not (tmp_path / "alone" / "model.safetensors").exists()


def test_adapters_go_out_alone_only_with_the_rows_that_new_tokens_got(tmp_path, chatml):
    """Rows of new ids begin as a mean, which the base does not have: without them the adapter would be of another model."""
    base = published(tmp_path / "base", chatml, spare=2)
    grown = tokenizer.with_tokens(tokenizer.SentencePiece(chatml), ["<|tool|>"]).model
    few = {"model": str(base), "new_tokens": ("<|tool|>",), "architecture": schema.Architecture()}
    adapted = schema.Lora(rank=2, targets=("layers/attn/q",))
    trained(tmp_path / "fixed", grown, lora=adapted, **few)
    with pytest.raises(Fault, match=r"--adapter: config\.new_tokens gave rows of embed/kernel new values"):
        exported(tmp_path / "fixed", tmp_path / "out", "--adapter")
    assert not (tmp_path / "out").exists()
    trained(tmp_path / "moved", grown, lora=dataclasses.replace(adapted, also=("embed/*",)), **few)
    exported(tmp_path / "moved", tmp_path / "out", "--adapter")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--out=o"], "--run_dir: missing"),
        (["--run_dir=r"], "--out: missing"),
        (["--run_dir=r", "--out=o", "--dtype=int8"], "dtype: 'int8' is not written; choose one of"),
        (["--run_dir=r", "--out=o", "--shard_gb=0"], "--shard_gb: 0 is not a size"),
        (["--run_dir=r", "--out=o", "--stepp=1"], "Unknown command line flag 'stepp'"),
        (["--run_dir=r", "--out=o", "there"], "'there': not a flag"),
        (["--run_dir=r", "--out=o"], "--run_dir=r: there is no config.json; name the folder of a run"),
        (["--run_dir=r", "--out=."], "is there already and not empty; name a new folder"),
    ],
)
def test_a_mistake_is_one_message(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        export.command(["export", *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_what_a_run_does_not_have_is_said(tmp_path, chatml, monkeypatch):
    trained(tmp_path / "run", chatml)
    with pytest.raises(Fault, match=r"--step=3: there is no such checkpoint; there are 4"):
        exported(tmp_path / "run", tmp_path / "out", "--step=3")
    with pytest.raises(Fault, match=r"--adapter: .* trained no adapters"):
        exported(tmp_path / "run", tmp_path / "out", "--adapter")

    def too_late(checkpoints: Path, step: int, wanted: object) -> None:
        """A run that goes on keeps its last checkpoints only."""
        shutil.rmtree(checkpoints / str(step))
        raise FileNotFoundError("Checkpoint not found.")

    monkeypatch.setattr(export.checkpoint, "restore_part", too_late)
    with pytest.raises(Fault, match="checkpoints/4: went while it was read"):
        exported(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_reads_otherwise_is_never_there(tmp_path, chatml, monkeypatch):
    """A weight that changes on its way out."""
    trained(tmp_path / "run", chatml)
    write = weights.save

    def other_weights(out, params, entries, **kinds):
        flat = tree.flatten(params)
        flat["final_norm/scale"] = flat["final_norm/scale"].at[0].mul(1.01)
        write(out, tree.unflatten(flat), entries, **kinds)

    monkeypatch.setattr(weights, "save", other_weights)
    with pytest.raises(RuntimeError, match="the folder's logits differ"):
        exported(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_another_network_or_other_prompts_are_noticed(tmp_path, chatml):
    own = jnp.array([[[1.0, -2.0, 0.5, 9.0]]])  # the last id is none
    export._check_logits(own, own.at[..., 3].set(0), own, own, num_ids=3)
    with pytest.raises(RuntimeError, match=r"the folder's network is another: its logits differ by up to 1\.0 of 2\.0"):
        export._check_logits(own, own.at[0, 0, 0].set(2.0), own, own, num_ids=3)

    folder = published(tmp_path / "base", chatml)
    pieces = tokenizer.SentencePiece(chatml)
    fmt = formats.resolve("chatml", pieces)
    for name, content in export.published.files(pieces, fmt, max_length=64).items():
        (folder / name).write_bytes(content)
    prompts = export.prompts_of(fmt, pieces)
    assert len(prompts) == 3
    export._check_prompts(prompts, Folder.open(folder))
    template = (folder / "chat_template.jinja").read_bytes()
    (folder / "chat_template.jinja").write_bytes(template.replace(b"user\\n'", b"user '"))
    with pytest.raises(RuntimeError, match="the folder's prompts have other ids"):
        export._check_prompts(prompts, Folder.open(folder))
