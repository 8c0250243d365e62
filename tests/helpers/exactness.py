"""One adapter of stock PEFT against this library: in, out again, and merged.

Each answer is the largest difference of logits, or the line that refuses. Needs torch
and PEFT.
"""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers
from safetensors.torch import load_file, save_file

from tests.helpers import decoders, encoders
from tests.helpers.compiled import QUICK
from tests.helpers.peft_draws import BASES, Modules, Saving, draw, draw_base
from tsd_jax import huggingface
from tsd_jax.app.model import facts_of
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core.adapter import merge
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.merge import to_merged
from tsd_jax.huggingface.merge_encoder import Trained, write_merged
from tsd_jax.huggingface.peft.files import read_files
from tsd_jax.huggingface.peft.merge import full_in_folder, merge_peft
from tsd_jax.huggingface.peft.modules import modules_of
from tsd_jax.huggingface.peft.read import from_peft
from tsd_jax.huggingface.peft.write import to_peft

Answer = float | str


class Pair:
    """One base, as the stock model and as ours."""

    def __init__(self, name: str, folder: Path):
        self.folder, self.published = folder, BASES[name]
        self.encoder = name in encoders.PUBLISHED
        write = encoders.write_encoder if self.encoder else decoders.write_decoder
        write(folder, self.published)
        self.config = huggingface.read_config(folder)
        self._auto = (
            transformers.AutoModelForSequenceClassification
            if self.encoder
            else transformers.AutoModelForCausalLM
        )
        self._stock = self.loaded(folder)
        self._params: dict[bool, Any] = {}
        self.apply = jax.jit(self.model(scan_layers=True).apply, compiler_options=QUICK)
        self.given = self._inputs()

    def _inputs(self) -> tuple[Any, ...]:
        """Return what both models are called with: tokens, positions, mask, types."""
        if self.encoder:
            tokens, mask, types = encoders.inputs(self.published, 10)
            return tokens, None, mask, types
        return (decoders.inputs(10)[0],)

    def loaded(self, folder: Path) -> Any:
        """Return the stock model of a folder."""
        return self._auto.from_pretrained(folder, dtype=torch.float32).eval()

    def stock(self) -> Any:
        """Return a fresh copy of the stock base."""
        return copy.deepcopy(self._stock)

    def model(self, *, scan_layers: bool) -> Any:
        """Return our model."""
        network = huggingface.family_of(self.config).kind.network
        return network(self.config, scan_layers=scan_layers)

    def params(self, *, scan_layers: bool) -> Any:
        """Return our parameters."""
        if scan_layers not in self._params:
            self._params[scan_layers] = huggingface.load_params(
                self.folder, self.config, scan_layers=scan_layers
            )
        return self._params[scan_layers]

    def theirs(self, model: Any) -> np.ndarray:
        """Return the logits of a torch model."""
        tokens, *rest = (None if x is None else torch.from_numpy(x) for x in self.given)
        more = {}
        if self.encoder:
            mask: Any = rest[1]
            more = {"attention_mask": mask.long(), "token_type_ids": rest[2]}
        with torch.no_grad():
            return model(tokens, **more).logits.numpy()

    def ours(self, params: Any, trees: Any, *, scan_layers: bool) -> np.ndarray:
        """Return our logits: merged and compiled where scanned, else adapted."""
        if scan_layers:
            return np.asarray(
                self.apply({"params": merge(params, *trees)}, *self.given)
            )
        apply = adapted(self.model(scan_layers=False).apply)
        return np.asarray(apply({"params": bind(params, *trees)}, *self.given))

    @functools.cached_property
    def modules(self) -> Modules:
        """Names of the stock model's modules."""

        def named(kind: str) -> tuple[str, ...]:
            found = self._stock.named_modules()
            return tuple(n for n, each in found if kind in type(each).__name__)

        embeddings = [n for n in named("Embedding") if "embed_tokens" in n]
        words = [n for n in named("Embedding") if n.endswith("word_embeddings")]
        return Modules(
            named("Linear"),
            tuple(embeddings or words),
            named("Norm"),
            stacked=getattr(self.config, "experts", None) is not None,
            encoder=self.encoder,
            tied=bool(self.published.get("tie_word_embeddings")),
        )


def with_peft(pair: Pair, folder: Path) -> Any:
    """Load an adapter on the stock base; keys that do not fit are an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        return peft.PeftModel.from_pretrained(pair.stock(), folder).eval()


def made_by_peft(
    pair: Pair, folder: Path, settings: dict[str, Any], saving: Saving
) -> tuple[np.ndarray, np.ndarray]:
    """Let PEFT make and save an adapter; return its logits before and after."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**copy.deepcopy(settings))
        model = peft.get_peft_model(pair.stock(), config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.15 * torch.randn(parameter.shape))
        model.save_pretrained(str(folder), save_embedding_layers=saving.embeddings)
    if saving.half:
        file = folder / "adapter_model.safetensors"
        tensors = {
            name: each.to(torch.bfloat16) if ".lora_" in name else each
            for name, each in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
    return pair.theirs(model), pair.theirs(with_peft(pair, folder))


def answered(work: Callable[[], np.ndarray], wanted: np.ndarray) -> Answer:
    """Return the largest difference to the wanted logits, or what refuses."""
    try:
        return float(np.abs(work() - wanted).max())
    except InputError as error:
        return f"refused: {error}"


def _read(pair: Pair, folder: Path, *, scan_layers: bool) -> tuple[Any, Any]:
    """Return our parameters, and the adapter of a folder in our form."""
    params = pair.params(scan_layers=scan_layers)
    kind = pair.config.model_type
    found = from_peft(
        folder,
        huggingface.module_paths(params, kind),
        huggingface.tensor_paths(params, kind),
        params,
    )
    model = pair.model(scan_layers=scan_layers)
    spec = make_spec(
        model.apply, {"params": params}, found.rules(), *pair.given, method="lora"
    )
    return params, found.start(jax.random.key(0), spec, params=params)


def _merge_read(pair: Pair, out: Path, adapter: Path) -> None:
    """Merge an adapter's folder into the base."""
    files = read_files(adapter)
    if not pair.encoder:
        merge_peft(out, files, base_folder=pair.folder)
        return
    factors = {name: each.factors for name, each in modules_of(files).items()}
    full = full_in_folder(files, pair.folder)
    write_merged(out, pair.folder, pair.config, Trained(factors, full))


def _answers(pair: Pair, folder: Path, wanted: np.ndarray, scan: bool) -> Any:
    """Return {way: answer} for the adapter in folder/"peft"."""
    adapter, again, merged, direct = (
        folder / name for name in ("peft", "again", "merged", "direct")
    )
    name = functools.partial(huggingface.module_name, model_type=pair.config.model_type)
    read: list[Any] = []

    def peft_in() -> np.ndarray:
        params, trees = _read(pair, adapter, scan_layers=scan)
        logits = pair.ours(params, trees, scan_layers=scan)
        read.extend([params, trees])
        return logits

    def peft_out() -> np.ndarray:
        params, trees = read
        to_peft(
            again,
            trees[0],
            trees[1],
            name,
            base_model=str(pair.folder),
            params=params,
            task_type=facts_of(pair.config).peft_task,
        )
        return pair.theirs(with_peft(pair, again))

    def merged_out() -> np.ndarray:
        trainable, directions = read[1]
        to_merged(merged, trainable, directions, name, base_folder=pair.folder)
        return pair.theirs(pair.loaded(merged))

    def merged_directly() -> np.ndarray:
        _merge_read(pair, direct, adapter)
        return pair.theirs(pair.loaded(direct))

    answers = {"peft in": answered(peft_in, wanted)}
    if read:
        answers["peft out"] = answered(peft_out, wanted)
        if not pair.encoder:
            answers["merged"] = answered(merged_out, wanted)
    answers["merged directly"] = answered(merged_directly, wanted)
    return answers


# An adapter of every linear module, at two ranks.
PLAIN: dict[str, Any] = {
    "target_modules": "all-linear",
    "r": 4,
    "lora_alpha": 6,
    "rank_pattern": {r".*\.1\..*": 2},
}


def of_family(name: str, root: Path) -> dict[str, Answer]:
    """Return {way: difference} of a plain adapter of one base.

    "merged bf16" compares the stock model and ours on one rounded checkpoint.

    Args:
      name: of the base.
      root: an empty folder.
    """
    (root / "base").mkdir()
    pair, folder = Pair(name, root / "base"), root / "peft"
    task = "SEQ_CLS" if pair.encoder else "CAUSAL_LM"
    _, wanted = made_by_peft(
        pair, folder, {**PLAIN, "task_type": task}, Saving("auto", half=False)
    )
    answers = _answers(pair, root, wanted, scan=True)
    answers.setdefault("merged", answers.pop("merged directly"))
    if not pair.encoder:
        out = root / "bf16"
        merge_peft(out, read_files(folder), base_folder=pair.folder, dtype="bfloat16")
        params = huggingface.load_params(out, pair.config)
        ours = np.asarray(pair.apply({"params": params}, *pair.given))
        answers["merged bf16"] = float(
            np.abs(ours - pair.theirs(pair.loaded(out))).max()
        )
    return answers


class Draws:
    """Draws on bases that are made once.

    Args:
      root: an empty folder for bases and adapters.
    """

    def __init__(self, root: Path):
        self._root = root
        self._pairs: dict[str, Pair] = {}

    def pair(self, name: str) -> Pair:
        """Return both models of a base."""
        if name not in self._pairs:
            folder = self._root / name.replace(" ", "_")
            folder.mkdir()
            self._pairs[name] = Pair(name, folder)
        return self._pairs[name]

    def run(self, seed: int) -> dict[str, Any]:
        """Return what a draw was, and {way: answer}.

        What PEFT itself cannot make, save and load is drawn again.
        """
        name = draw_base(seed)
        pair = self.pair(name)
        for attempt in itertools.count():
            settings, saving = draw(f"{seed}/{attempt}", pair.modules)
            with tempfile.TemporaryDirectory(dir=self._root) as folder:
                adapter = Path(folder) / "peft"
                try:
                    made, wanted = made_by_peft(pair, adapter, settings, saving)
                except Exception:  # of PEFT, which has as many as settings
                    continue
                answers = _answers(pair, Path(folder), wanted, scan=bool(seed % 2))
            return {
                "seed": seed,
                "attempt": attempt,
                "base": name,
                "settings": settings,
                "saving": saving._asdict(),
                "lost by PEFT": float(np.abs(made - wanted).max()),
                "answers": answers,
            }
        raise AssertionError
