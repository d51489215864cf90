"""A published model's folder as one thing: its config, weights, tokenizer, chat template and generation settings.

    config.json                    the decoder's numbers and switches
    *.safetensors                  its parameters, perhaps in shards with an index
    tokenizer.json, .model         text to ids, with tokenizer_config.json
    chat_template.jinja            how conversations are written, here or in tokenizer_config.json
    generation_config.json         the ids that end an answer

Only JSON, text and safetensors are read; code that a folder brings along is left alone.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itjax.base import tree
from itjax.base.files import building
from itjax.hub import configs, names, tensors, weights
from itjax.models.config import ModelConfig
from itjax.models.model import build
from itjax.text import jinja, tokenizer
from itjax.text.jinja import ChatTemplate
from itjax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from itjax.models.model import Params

CONFIG, GENERATION = "config.json", "generation_config.json"
SPARE_ROWS = 1024  # rows without an id that any embedding may have
SPARE_SHARE = 0.1  # and as a share of its rows
SAMPLE = 64  # bytes of every tensor that a fingerprint looks at, at its beginning and in its middle


@dataclass(frozen=True)
class Folder:
    """What a model's folder holds. Weights are read by `load`, everything else when it is asked for."""

    path: Path
    fields: Mapping[str, Any]  # config.json as it stands
    config: ModelConfig

    @classmethod
    def open(cls, path: str | Path) -> "Folder":
        """Reads config.json. Raises ValueError for a folder that is none of a model, or of one that is not known."""
        folder = Path(path)
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder}: there is no {CONFIG}; give the folder of a published model")
        fields = tensors.parse_json((folder / CONFIG).read_bytes(), str(folder / CONFIG))
        try:
            return cls(folder, fields, configs.read(fields))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's own tokenizer."""
        return tokenizer.open(self.path)

    @property
    def num_ids(self) -> int:
        """How many ids its tokenizer has; where it has none, every row of the embedding is one."""
        has_one = any((self.path / name).is_file() for name in tokenizer.FOLDER_FILES)
        return self.tokenizer.size if has_one else self.config.vocab

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The folder's own chat template; None where it has none."""
        return ChatTemplate.open(self.path, self.tokenizer) if jinja.is_in(self.path) else None

    @cached_property
    def generation(self) -> Mapping[str, Any]:
        """generation_config.json; empty where there is none."""
        file = self.path / GENERATION
        return tensors.parse_json(file.read_bytes(), str(file)) if file.is_file() else {}

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer, as the folder says; a sampler stops at these and at those of the format."""
        name = "eos_token_id"
        file, fields = (GENERATION, self.generation) if name in self.generation else (CONFIG, self.fields)
        ids = fields.get(name)
        found = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(id) is int and 0 <= id < self.config.vocab for id in found):
            raise ValueError(
                f"{self.path / file}: {name}: {ids!r}; it should be ids below {self.config.vocab}, one or a list"
            )
        return frozenset(found)

    def check(self) -> None:
        """Raises one ValueError that lists every tensor that is not as config.json says. Only headers are read.

        And for ids that end an answer and are none: an export would be refused for them when all is trained.
        """
        _ = self.stop_ids
        found = tensors.of_folder(self.path)
        abstract = tree.flatten(build(self.config, dtype="float32", attention="auto", remat="none").abstract)
        weights.check(
            self.path,
            names.entries(self.config, found.keys()),
            {path: leaf.shape for path, leaf in abstract.items()},
            found,
            repeats=names.duplicates(self.config, found.keys()),
        )

    def load(
        self,
        like: "Params",
        *,
        num_ids: int | None = None,
        convert: weights.Convert | None = None,
        kept: "Params | None" = None,
    ) -> "Params":
        """The parameters with the shapes, dtypes and shardings of `like`; see `weights.load`.

        `num_ids` is how many ids the run's tokenizer has: rows of those that the folder's does not have begin as the mean
        of the others. None: as many as the folder's.
        """
        self.check()
        known = min(self.num_ids, self.config.vocab) if num_ids is not None else self.config.vocab
        present = tensors.of_folder(self.path).keys()
        return weights.load(
            self.path,
            names.entries(self.config, present),
            like,
            ids=(known, max(known, num_ids or 0)),
            repeats=names.duplicates(self.config, present),
            convert=convert,
            kept=kept,
        )

    def fingerprint(self) -> str:
        """A short name of this model: another where the config, a tensor's shape or what a tensor begins with differs.

        Small parts of every tensor are looked at and not all bytes, so that it takes seconds for any model. Copies of a
        folder have the same.
        """
        known = hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode())
        found = tensors.of_folder(self.path)
        with contextlib.ExitStack() as opened:
            files = {file: opened.enter_context(file.open("rb")) for file in {one.file for one in found.values()}}
            for name, tensor in sorted(found.items()):
                known.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
                for at in (0, tensor.num_bytes // 2):
                    files[tensor.file].seek(tensor.start + at)
                    known.update(files[tensor.file].read(min(SAMPLE, tensor.num_bytes - at)))
        return known.hexdigest()[:16]


def check_vocabulary(num_ids: int, rows: int, *, place: str) -> None:
    """Whether a tokenizer's ids have rows in the embedding, and use most of them. Raises ValueError where they do not."""
    if num_ids > rows:
        raise ValueError(
            f"{place}: the tokenizer has {num_ids} ids and the embedding {rows} rows; take the model's own tokenizer, "
            "or name the tokens that are new in config.new_tokens, which gives them rows"
        )
    if rows - num_ids > max(SPARE_ROWS, SPARE_SHARE * rows):
        raise ValueError(
            f"{place}: the tokenizer has {num_ids} ids and the embedding {rows} rows, so this is probably the tokenizer of "
            "another model; take the model's own"
        )


@contextlib.contextmanager
def new(out: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when everything went well, and else is gone.

    Raises ValueError where `out` holds something already.
    """
    path = Path(out)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: is there already and not empty; name a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with building(path.parent) as folder:
        yield folder
        folder.chmod(0o777 & ~_umask())  # it was private while it was being written
        folder.rename(path)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
