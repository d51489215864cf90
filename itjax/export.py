"""A run as a folder that other libraries open: `python -m itjax.export --run_dir=RUN --out=FOLDER`.

The parameters of a checkpoint are written as the folder of a published model: safetensors, config.json, tokenizer, chat
template, generation config. Then the folder is read again, and it is there only if it has the same prompts, id by id, and
the same logits, bit by bit.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from itjax import cli, parts
from itjax.base import freeze, schema, tree
from itjax.base.files import write_whole
from itjax.base.freeze import Fault
from itjax.base.records import Message, PackedBatch
from itjax.data.encode import Encoding
from itjax.hub import adapters, configs, folder, names, tensors, weights
from itjax.hub.folder import Folder
from itjax.models import lora
from itjax.models.config import ModelConfig
from itjax.models.model import Model, Params, build, join
from itjax.parallel import layout
from itjax.parallel.mesh import mesh_for
from itjax.text import chat, published, tokenizer
from itjax.text.chat import Writes
from itjax.text.tokenizer import Tokenizer
from itjax.train import checkpoint, loop
from itjax.train.state import TrainState, evaluated

Say = Callable[[str], None]

HELP = """Write the folder of a published model from a run, and check it by reading it again.

    python -m itjax.export --run_dir=runs/mine --out=mine-hf

  --run_dir=DIR   the run
  --out=DIR       the folder to make; it must be new, or empty
  --step=N        the checkpoint; without it the last one
  --dtype=NAME    of the weights: bfloat16 (the default), float32, float16 or float64
  --shard_gb=5    the largest file, unless one tensor is larger
  --adapter       write the adapters alone, as PEFT reads them; without it they are merged into the kernels
  --noaverage     the parameters of the last step, where the run keeps an average of them
"""
QUESTIONS: tuple[tuple[Message, ...], ...] = (  # whose prompts and logits are compared, as far as the format has them
    (Message("user", "What is the capital of France?"),),
    (Message("system", "Answer in one word."), Message("user", "Is 17 a prime?\n\n  Say yes or no.")),
    (
        Message("user", "Name a colour."),
        Message("assistant", "Green."),
        Message("user", "Another — perhaps <b>ROT</b> 42?"),
    ),
)
COMPARED = 48  # tokens of a prompt whose logits are compared
ALIKE = 1e-4  # of the largest logit: what float32 may differ by where sums are in another order
SCALES_ITSELF = ("gemma2", "gemma3_text")  # families whose embeddings have a scale


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    run_dir: Path
    out: Path
    step: int | None
    dtype: str
    shard_bytes: int
    adapter: bool
    average: bool


@dataclass(frozen=True)
class Trained:
    """A run as one of its checkpoints has it."""

    run: schema.Run
    step: int
    tokenizer: Tokenizer
    format: Writes
    folder: Folder | None  # that the run began with
    mesh: Mesh
    model: Model
    params: Params


def command(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return 0
    export(_settings(argv), say=print)
    return 0


def _settings(argv: Sequence[str]) -> Settings:
    values = flags.FlagValues()
    flags.DEFINE_string("run_dir", None, "the run", flag_values=values)
    flags.DEFINE_string("out", None, "the folder to make", flag_values=values)
    flags.DEFINE_integer("step", None, "the checkpoint", lower_bound=0, flag_values=values)
    flags.DEFINE_string("dtype", "bfloat16", "of the weights", flag_values=values)
    flags.DEFINE_float("shard_gb", 5.0, "the largest file", flag_values=values)
    flags.DEFINE_bool("adapter", False, "the adapters alone", flag_values=values)
    flags.DEFINE_bool("average", True, "the average, where there is one", flag_values=values)
    try:
        rest = values(list(argv))
    except flags.Error as error:
        raise Fault(str(error)) from None
    if rest[1:]:
        raise Fault(f"{rest[1]!r}: not a flag; e.g. python -m itjax.export --run_dir=runs/mine --out=mine-hf")
    for name in ("run_dir", "out"):
        if not getattr(values, name):
            raise Fault(f"--{name}: missing; e.g. python -m itjax.export --run_dir=runs/mine --out=mine-hf")
    if not values.shard_gb > 0:
        raise Fault(f"--shard_gb: {values.shard_gb:g} is not a size of files; give gigabytes, e.g. 5")
    return Settings(
        Path(values.run_dir),
        Path(values.out),
        values.step,
        values.dtype,
        int(values.shard_gb * 1e9),
        values.adapter,
        values.average,
    )


def export(settings: Settings, *, say: Say) -> None:
    """Makes the folder, or raises ValueError for what the user can mend and leaves nothing behind."""
    weights.code_of(settings.dtype)
    with folder.new(settings.out) as building:
        trained = restored(settings)
        with jax.set_mesh(trained.mesh):
            if settings.adapter:
                write_adapter(trained, building, say=say)
            else:
                write_model(trained, building, settings, say=say)
    say(f"done     step {trained.step} of {settings.run_dir} is in {settings.out}")


# --- the run ----------------------------------------------------------------------------------------------------------


def restored(settings: Settings) -> Trained:
    """The parameters of a checkpoint in float32 on this machine's devices, and what the run says of them.

    The base of adapters, which no checkpoint has, is read or drawn again where it is needed.
    """
    run, step = _run(settings.run_dir), _step(settings)
    if settings.adapter and not (run.lora.rank or run.lora.adapter):
        raise Fault(f"--adapter: {settings.run_dir} trained no adapters; export its whole model without the flag")
    pieces = tokenizer.open(settings.run_dir)
    mesh, began = mesh_for(run.parallel), parts.model_folder(run)
    config = parts.model_config(run, pieces.size, began)
    run = parts.with_adapter(run, config)
    model = parts.model_of(run, config)
    compiled = loop.compile_step(run, model, mesh, num_steps=1)
    like = compiled.abstract
    if settings.average and run.optimizer.average:
        wanted: dict[str, Any] = {"average": like.average}
    elif run.optimizer.kind == "schedule_free_adamw":
        wanted = {"params": like.params, "opt_state": like.opt_state}
    else:
        wanted = {"params": like.params}
    with jax.set_mesh(mesh):
        found = _read(_checkpoints(settings), step, wanted)
        frozen: Params = {}
        if like.frozen and not settings.adapter:
            now = began.fingerprint() if began else ""
            checkpoint.check_base(_checkpoints(settings), step, now, way_out="export the adapters alone with --adapter")
            read = None if began is None else parts.weights(run, began, config, mesh, num_ids=pieces.size)
            frozen = loop.first_frozen(run, model, compiled, read)
        state = TrainState(step, found.get("params", {}), frozen, found.get("opt_state", ()), found.get("average", {}))
        optimizer = run.optimizer if state.average else dataclasses.replace(run.optimizer, average=0.0)
        params = join(evaluated(state, optimizer), frozen)
    return Trained(run, step, pieces, _format(run, pieces), began, mesh, model, params)


def _read(checkpoints: Path, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of a checkpoint. Raises Fault where a run that goes on has removed it meanwhile."""
    try:
        return checkpoint.restore_part(checkpoints, step, wanted)
    except Exception as error:  # the library raises what it happens to miss
        if step in checkpoint.steps(checkpoints):
            raise
        raise Fault(
            f"{checkpoints / str(step)}: went while it was read, as the run goes on and keeps its last ones only; start "
            "the export again"
        ) from error


def _run(run_dir: Path) -> schema.Run:
    """The run's settings, but for where and how fast it ran: here in float32, on whatever devices there are."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise Fault(f"--run_dir={run_dir}: there is no {path.name}; name the folder of a run")
    run = freeze.from_json(path.read_text(), path=str(path))
    here = schema.Parallel(data=1, fsdp=-1)
    return dataclasses.replace(run, parallel=here, dtype="float32", attention="auto", remat="none")


def _checkpoints(settings: Settings) -> Path:
    return settings.run_dir / "checkpoints"


def _step(settings: Settings) -> int:
    steps = checkpoint.steps(_checkpoints(settings))
    if not steps:
        raise Fault(f"--run_dir={settings.run_dir}: there is no checkpoint yet; train first, or wait for one")
    if settings.step is not None and settings.step not in steps:
        raise Fault(f"--step={settings.step}: there is no such checkpoint; there are {', '.join(map(str, steps))}")
    return steps[-1] if settings.step is None else settings.step


def _format(run: schema.Run, pieces: Tokenizer) -> Writes:
    named = run.model if run.tokenizer == "auto" else run.tokenizer
    encoding = Encoding(
        tokenizer=pieces,
        format=run.format,
        length=run.length,
        truncation=run.truncation,
        prompt_weight=run.loss.prompt_weight,
        folder=named if Path(named).is_dir() else "",
        reasoning=run.reasoning,
    )
    return encoding.fmt


# --- the folder -------------------------------------------------------------------------------------------------------


def write_model(trained: Trained, out: Path, settings: Settings, *, say: Say) -> None:
    """The whole folder, read again and compared before this returns."""
    prompts = prompts_of(trained.format, trained.tokenizer)
    rows = np.stack([np.resize(ids[:COMPARED], COMPARED) for ids in prompts]).astype(np.int32)
    own = reads(trained.model, rows)(trained.params)
    config, params = plain(trained, say=say)
    write_text(trained, config, out, dtype=settings.dtype)
    again = Folder.open(out)
    model = build(again.config, dtype="float32", attention="auto", remat="none")
    logits = reads(model, rows)
    whole = logits(params)
    params = rounded(params, settings.dtype)
    written = logits(params)
    weights.save(out, params, names.entries(again.config), dtype=settings.dtype, shard_bytes=settings.shard_bytes)
    del params
    _check_prompts(prompts, again)
    read = logits(again.load(located(model, trained.mesh)))
    _check_logits(own, whole, written, read, num_ids=trained.tokenizer.size)
    files = sorted(out.glob("*.safetensors"))
    size, largest = sum(file.stat().st_size for file in files), float(jnp.abs(own[..., : trained.tokenizer.size]).max())
    say(f"weights  {size / 1e6:,.1f} MB in {settings.dtype}, {len(files)} file{'s' if len(files) > 1 else ''}")
    say(f"prompts  read again: the same ids for {len(prompts)} conversations in format {trained.format.name}")
    say(f"logits   read again: the same to the last bit; {_moved(own, written, trained, largest)}")


def plain(trained: Trained, *, say: Say) -> tuple[ModelConfig, Params]:
    """The network as a published folder can hold it: adapters merged, rows for ids only, no scale of our own."""
    config, run = trained.model.config, trained.run
    params = lora.merge(trained.params, run.lora, dtype="float32") if run.lora.rank else trained.params
    tables = {name: params[name]["kernel"] for name in ("embed", "head") if name in params}
    num_rows = max(trained.tokenizer.size, trained.folder.config.vocab if trained.folder else 0)
    if num_rows < config.vocab:
        say(f"rows     {config.vocab - num_rows} of {config.vocab} rows pad the vocabulary and are left out")
    scale = 1.0 if config.family in SCALES_ITSELF else config.embed_scale
    tied = config.tie_embeddings and scale == 1.0
    if scale != 1.0:
        tables = {"embed": tables["embed"], "head": tables.get("head", tables["embed"])}
        say(
            f"embed    family {config.family} has no embed_scale: the embedding is written times {scale:g}"
            + (", and the head, which was tied to it, apart" if config.tie_embeddings else "")
        )
    config = dataclasses.replace(
        config, vocab=num_rows, ids=0, embed_scale=config.embed_scale / scale, tie_embeddings=tied
    )
    like = located(build(config, dtype="float32", attention="auto", remat="none"), trained.mesh)
    cut = jax.jit(
        lambda tables: {
            name: {"kernel": table[:num_rows] * (scale if name == "embed" else 1.0)} for name, table in tables.items()
        },
        out_shardings={name: jax.tree.map(lambda leaf: leaf.sharding, like[name]) for name in tables},
    )
    return config, {**params, **cut(tables)}


def located(model: Model, mesh: Mesh) -> Params:
    """The shapes of a model's parameters, and where they lie."""
    shardings = layout.shardings(model.axes, mesh, model.abstract)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s), model.abstract, shardings)


def rounded(params: Params, dtype: str) -> Params:
    """The parameters with the precision of a dtype, in place; they stay float32."""
    precision = jnp.finfo(dtype)
    if precision.nmant >= jnp.finfo(jnp.float32).nmant:
        return params

    def as_kept(params: Params) -> Params:
        return jax.tree.map(lambda leaf: jax.lax.reduce_precision(leaf, precision.nexp, precision.nmant), params)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(as_kept, donate_argnums=0, out_shardings=shardings)(params)


def write_text(trained: Trained, config: ModelConfig, out: Path, *, dtype: str) -> None:
    """config.json, tokenizer, template and generation config."""
    pieces, run = trained.tokenizer, trained.run
    stops = sorted(chat.stop_ids(trained.format, pieces) | (trained.folder.stop_ids if trained.folder else set()))
    fields = configs.write(config, dtype=dtype, bos=pieces.bos, eos=stops, pad=pieces.pad, length=run.length)
    found = published.files(pieces, trained.format, max_length=config.max_length or run.length)
    published_with = trained.folder.generation if trained.folder else {}  # temperature and the like stay as they were
    written = tensors.parse_json(found[folder.GENERATION], folder.GENERATION)
    generation = {**published_with, **written, "eos_token_id": stops}
    found |= {
        folder.CONFIG: tensors.dump_json(fields).encode(),
        folder.GENERATION: tensors.dump_json(generation).encode(),
    }
    for name, content in found.items():
        write_whole(out / name, content)


def write_adapter(trained: Trained, out: Path, *, say: Say) -> None:
    """The adapters as PEFT reads them, with the tokenizer beside them; read again and compared before this returns."""
    run, config, began = trained.run, trained.model.config, trained.folder
    if began is None:
        raise Fault(
            f"--adapter: {run.run_dir} began with numbers from the seed, so there is no base to adapt; leave it out"
        )
    if config.vocab != began.config.vocab:
        raise Fault(
            f"--adapter: {began.path} has {began.config.vocab} rows and the run {config.vocab}, as config.new_tokens grew "
            "it; export the merged model, without the flag"
        )
    if trained.tokenizer.size > began.num_ids and (still := _untrained_tables(trained)):
        raise Fault(
            f"--adapter: config.new_tokens gave rows of {' and '.join(still)} new values, which {began.path} does not have "
            "and adapters do not hold; export the merged model, without the flag, or train with them in config.lora.also"
        )
    adapters.write_peft(out, trained.params, run.lora, config, base=str(began.path.absolute()))
    for name, content in published.files(trained.tokenizer, trained.format, max_length=run.length).items():
        if name != folder.GENERATION:
            write_whole(out / name, content)
    settings, leaves = adapters.read_peft(out, config)
    ours = tree.flatten(trained.params)
    differ = [path for path, leaf in ours.items() if not np.array_equal(leaf, leaves.get(path, np.empty(0)))]
    if differ or lora.scale(settings) != lora.scale(run.lora):
        raise RuntimeError(f"the folder's adapters differ: {differ or settings}")
    size = (out / adapters.WEIGHTS).stat().st_size
    say(f"adapters {size / 1e6:,.1f} MB in float32, for {began.path}; read again: the same to the last bit")


def _untrained_tables(trained: Trained) -> list[str]:
    """Of embedding and head those that no adapter's folder would hold."""
    tables = [path for path in weights.TABLES if path in tree.flatten(trained.model.abstract)]
    return [path for path in tables if not tree.matches(path, trained.run.lora.also)]


# --- the proof --------------------------------------------------------------------------------------------------------


def prompts_of(fmt: Writes, pieces: Tokenizer) -> list[list[int]]:
    """The ids of the prompts of all questions that the format has a place for; empty ones for the others."""
    found: list[list[int]] = []
    for messages in QUESTIONS:
        try:
            segments = chat.prompt(messages, fmt)
        except ValueError:
            continue
        found.append([int(id) for id in chat.encode(segments, pieces)[0]])
    if not found:
        raise Fault(f"format {fmt.name}: it can write none of the conversations that an export is compared with")
    return found


def _check_prompts(prompts: list[list[int]], again: Folder) -> None:
    assert again.template is not None
    if (read := prompts_of(again.template, again.tokenizer)) != prompts:
        pairs = [(ours, theirs) for ours, theirs in zip(prompts, read, strict=False) if ours != theirs]
        raise RuntimeError(f"the folder's prompts have other ids: {pairs or (len(prompts), len(read))}")


def reads(model: Model, tokens_BT: np.ndarray) -> Callable[[Params], jax.Array]:
    """Parameters to float32 logits_BTV of these rows; compiled once for all that are asked about."""
    B, T = tokens_BT.shape
    ones, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    batch = PackedBatch(tokens_BT, tokens_BT, ones, positions, ones.astype(np.float32), ones)
    return jax.jit(lambda params: model.unembed(params, model.features(params, batch).x_BTD))


def _check_logits(own: jax.Array, whole: jax.Array, written: jax.Array, read: jax.Array, *, num_ids: int) -> None:
    """`own` of the run, `whole` of what is written before it is rounded, `written` after it, `read` of the folder."""
    if not jnp.array_equal(written, read):
        raise RuntimeError(f"the folder's logits differ by up to {float(jnp.abs(written - read).max())}")
    own, whole = own[..., :num_ids], whole[..., :num_ids]
    apart, largest = float(jnp.abs(own - whole).max()), float(jnp.abs(own).max())
    if not apart <= ALIKE * largest:
        raise RuntimeError(f"the folder's network is another: its logits differ by up to {apart} of {largest}")


def _moved(own: jax.Array, written: jax.Array, trained: Trained, largest: float) -> str:
    ids = slice(trained.tokenizer.size)
    moved = float(jnp.abs(own[..., ids] - written[..., ids]).max())
    if moved == 0:
        return "and those of the run, to the last bit"
    return f"those of the run move by at most {moved:.2g} (the largest is {largest:.3g})"


if __name__ == "__main__":
    cli.run(command)
