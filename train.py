"""Fine-tune a decoder or an encoder with LoRA, LoRA-Dash, LoRA-Init or LoRA-TSD.

    python train.py --config configs/demo.py --workdir runs/demo
    python train.py --config configs/llama_tsd.py --config.model.path=FOLDER --dry-run

The same workdir goes on from its last checkpoint. Exit code 2 means bad input.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it misses torch aloud

import jax
import jax.numpy as jnp
from absl import flags, logging
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict, config_flags

import tsd_jax as tsd
from tsd_jax import huggingface
from tsd_jax.app.model import with_head, with_tokens
from tsd_jax.app.plan import describe
from tsd_jax.app.run import Base, Run, execute
from tsd_jax.app.task import (
    Data,
    DataSettings,
    EvalContext,
    EvalSettings,
    make_evaluation,
    read_data,
)
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.extraction.devices import host_device
from tsd_jax.extraction.launch import check_deltas
from tsd_jax.huggingface.full_tensors import check_modules
from tsd_jax.training import loop, processes, sharding
from tsd_jax.training.auto_launch import AutoLaunchConfig

Config = Any  # a ConfigDict; type checkers know nothing of its fields

_CONFIG = config_flags.DEFINE_config_file("config", None, "a file of configs/")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; made, or gone on in"
)
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "print what would be trained, and stop")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "one process of several: see the next three"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first process, or JAX_COORDINATOR_ADDRESS"
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "how many there are, or JAX_NUM_PROCESSES"
)
_PROCESS_ID = flags.DEFINE_integer(
    "process-id", None, "which of them this is, from 0, or JAX_PROCESS_ID"
)


def open_model(config: Config, data: DataSettings) -> Base:
    """Read the model's config, its files' headers and its tokenizer; no weights.

    It gets the head that the data asks for, and rows for added tokens.
    """
    if not config.path:
        raise InputError("model.path is empty; name a folder or a hub id")
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype {config.dtype!r} must be float32 or bfloat16")
    dtype = jnp.dtype(config.dtype)
    folder = huggingface.resolve(config.path)
    found = huggingface.read_config(folder)
    found, labels = with_head(found, data, new=config.new_head)
    huggingface.check_checkpoint(folder, found, new_head=config.new_head)
    tokenizer = huggingface.load_tokenizer(folder)
    found, added = with_tokens(found, tokenizer, config.added_tokens)
    family = huggingface.family_of(found)
    network = family.kind.network(
        found, dtype, dtype, scan_layers=config.scan_layers, remat=config.remat
    )
    shapes = huggingface.abstract_params(found, scan_layers=config.scan_layers)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    quantization = quantization_of(config)
    if quantization is not None:
        params = tsd.quantize(params, quantization, family.kind.linear)
    local = Path(config.path).expanduser().is_dir()
    name = str(folder.resolve()) if local else config.path
    return Base(
        name=name,
        folder=folder,
        network=network,
        tokenizer=tokenizer,
        params=params,
        apply=tsd.adapted(network.apply),
        family=family,
        labels=labels,
        new_head=config.new_head,
        added=added,
        quantization=quantization,
    )


def quantization_of(config: Config) -> tsd.Quantization | None:
    """Say how the base's linear layers are quantized."""
    if not config.quantization:
        if config.quantization_tile:
            raise InputError("model.quantization_tile needs a model.quantization")
        return None
    quantization = tsd.Quantization(
        format=config.quantization, tile=config.quantization_tile
    )
    if not config.remat:
        raise InputError(
            f"model.quantization={config.quantization!r} without model.remat=True "
            "would keep the kernels of all layers as floats for the gradient: add "
            "--config.model.remat=True"
        )
    return quantization


def make_spec(config: Config, base: Base) -> tsd.Spec:
    """Match the kernels and fix the method."""
    method = tsd.get_method(
        config.method.name,
        keep=config.method.keep,
        ranking=config.method.ranking or None,
        start=config.method.start or None,
    )
    rule = tsd.Rule(
        pattern=config.adapter.pattern,
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        directions=config.adapter.directions,
        auto_directions=config.adapter.auto_directions,
        dropout=config.adapter.dropout,
        scaling=config.adapter.scaling,
        dora=config.adapter.dora,
    )
    rules = [*head_rules(config, base), rule, *full_rules(config, base)]
    tokens = jax.ShapeDtypeStruct((1, config.data.length), jnp.int32)
    variables = {"params": base.params}
    spec = tsd.make_spec(base.network.apply, variables, rules, tokens, method=method)
    check_modules(spec.full, spec.paths)
    return spec


def full_rules(config: Config, base: Base) -> list[tsd.Full]:
    """Say what trains whole: what is asked for, and the rows of added tokens."""
    pattern = config.adapter.full_params
    rules = [tsd.Full(pattern=pattern)] if pattern else []
    rows = base.added.rows if base.added else None
    flat = paths.flatten(base.params)
    for path, axis in huggingface.TOKEN_AXES.items():
        taken = pattern and re.fullmatch(pattern, path)
        if rows and path in flat and not taken:
            rules.append(tsd.Full(pattern=re.escape(path), rows=rows, axis=axis))
    return rules


def head_rules(config: Config, base: Base) -> list[tsd.Full]:
    """Train the head of a classification whole, unless told not to."""
    if base.labels is None:
        return []
    if config.adapter.train_head:
        return [tsd.Full(pattern=base.family.head)]
    if base.absent:
        raise InputError(
            f"the checkpoint has no {base.absent[0]}, which starts at random: leave "
            "adapter.train_head True"
        )
    return []


def optimizer_of(
    config: Config, plan: loop.LoopConfig
) -> tuple[Any, dict[str, Callable]]:
    """Build the optimizer and its schedules, by name for the log."""
    settings = config.optimizer
    if settings.restart and plan.launch_step is None:
        raise InputError(
            "optimizer.restart=True needs a launch whose step is known beforehand, "
            f"and method {config.method.name!r} has none here"
        )
    names = ["learning_rate", "gain_learning_rate"]
    if settings.full_learning_rate:
        names.append("full_learning_rate")
    rates = {
        name: tsd.make_schedule(
            settings[name],
            steps=plan.steps,
            warmup=settings.warmup,
            decay=settings.decay,
            restart=plan.launch_step if settings.restart else None,
        )
        for name in names
    }
    optimizer = tsd.make_optimizer(
        **rates,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm or None,
    )
    return optimizer, rates


def discovery_batches(config: Config, spec: tsd.Spec) -> int:
    """Count the batches of the gradient directions are found by; 0 for none."""
    settings = config.method
    if settings.discovery not in ("prelaunch", "gradient"):
        raise InputError(
            f"unknown method.discovery {settings.discovery!r}; "
            "choose 'prelaunch' or 'gradient'"
        )
    if settings.discovery == "prelaunch":
        return 0
    if not spec.method.launches:
        raise InputError(
            "method.discovery='gradient' has no meaning for method "
            f"{spec.method.name!r}, which launches nothing"
        )
    check_deltas(spec.method)
    if settings.auto_launch:
        raise InputError(
            "method.auto_launch=True waits for what pre-launch changes to settle, but "
            "method.discovery='gradient' does not look at it; choose one of them"
        )
    if settings.discovery_batches < 1:
        raise InputError(
            f"method.discovery_batches must be at least 1, not "
            f"{settings.discovery_batches}"
        )
    return settings.discovery_batches


def auto_launch_config(config: Config, spec: tsd.Spec) -> AutoLaunchConfig | None:
    """Say when directions have settled, where that decides when to launch."""
    if not config.method.auto_launch:
        return None
    method, settings = spec.method, config.auto_launch
    if not method.launches or method.ranking != "rates":
        reason = f"ranks by {method.ranking!r}" if method.launches else "has no launch"
        raise InputError(
            f"method.auto_launch=True waits for change rates to settle, but method "
            f"{method.name!r} {reason}"
        )
    return AutoLaunchConfig(
        launch_min=settings.launch_min,
        launch_max=settings.launch_max or config.train.steps // 2,
        every=settings.every,
        threshold=settings.threshold,
        patience=settings.patience,
        matrices=settings.matrices,
    )


def loop_config(config: Config, spec: tsd.Spec) -> loop.LoopConfig:
    """Say when things happen."""
    method = spec.method
    launch_step = config.method.launch_step if method.launches else None
    auto_launch = auto_launch_config(config, spec)
    if auto_launch is not None:
        launch_step = None
    if launch_step == 0 and method.needs_delta and not discovery_batches(config, spec):
        raise InputError(
            f"method.launch_step 0: method {method.name!r} finds its directions in "
            "what training has changed, so launch after at least 1 step (or with "
            "method.discovery='gradient')"
        )
    return loop.LoopConfig(
        steps=config.train.steps,
        launch_step=launch_step,
        auto_launch=auto_launch,
        log_every=config.train.log_every,
        eval_every=config.eval.every,
        checkpoint_every=config.train.checkpoint_every,
    )


def batch_source(config: Config, data: Data, mesh: Mesh) -> Callable[[int], Any]:
    """Return the function from a step to its batch on the mesh."""
    size, parts = config.train.batch_size, config.train.micro_batches
    if size < 1 or parts < 1 or size % parts:
        raise InputError(
            f"train.batch_size {size} must be a multiple of train.micro_batches {parts}"
        )
    sharding.check_batch(size // parts, mesh)
    rows = data.rows(size)  # whole in every process: see place_batch

    def batch(step: int) -> dict[str, jax.Array]:
        arrays = rows.batch(step)
        stacked = {k: v.reshape(parts, -1, *v.shape[1:]) for k, v in arrays.items()}
        return sharding.place_batch(stacked, mesh)

    return batch


def evaluation_of(
    config: Config, settings: DataSettings, base: Base, data: Data, mesh: Mesh
):
    """Return the function from model variables to figures."""
    size = config.eval.batch_size
    sharding.check_batch(size, mesh)
    rows = PartitionSpec(*sharding.BATCH[1:])
    judge = EvalContext(
        data=data,
        settings=settings,
        eval=EvalSettings(
            metric=config.eval.metric,
            batch_size=size,
            limit=config.eval.limit,
            max_new_tokens=config.eval.max_new_tokens,
        ),
        tokenizer=base.tokenizer,
        apply_fn=base.apply,
        place=lambda batch: sharding.place_batch(batch, mesh, rows),
    )
    return make_evaluation(judge)


def data_settings(config: Config) -> DataSettings:
    """Say what is trained and evaluated on."""
    return DataSettings(**config.data, seed=config.seed)


def prepare(config: Config, workdir: Path) -> Run:
    """Check all there is to check, and read no weights; print the plan."""
    mesh = sharding.make_mesh(config.mesh)
    settings = data_settings(config)
    base = open_model(config.model, settings)
    settings = dataclasses.replace(settings, labels=base.labels)
    spec = make_spec(config, base)
    if spec.method.launches and tsd.Extraction().on_hosts(None):
        host_device()  # refuses here what it would at the launch
    plan = loop_config(config, spec)
    optimizer, rates = optimizer_of(config, plan)
    data = read_data(settings, base.tokenizer)
    run = Run(
        settings=flat_config(config),
        workdir=workdir,
        mesh=mesh,
        seed=config.seed,
        base=base,
        spec=spec,
        epsilon=config.method.epsilon,
        extraction=tsd.Extraction(store=spectra_store(config)),
        plan=plan,
        optimizer=optimizer,
        rates=rates,
        batch=batch_source(config, data, mesh),
        evaluate=evaluation_of(config, settings, base, data, mesh),
        loss_fn=data.loss(base.apply),
        discovery_batches=discovery_batches(config, spec),
    )
    if jax.process_index() == 0:
        print(
            describe(spec, base.params, plan.launch_step, plan.steps, plan.auto_launch)
        )
        print("\n".join([*base.notes, *data.notes]), flush=True)
    return run


def flat_config(config: Config) -> dict[str, Any]:
    """Return {"section.key": value}."""
    flat = {}
    for key, value in config.items():
        inner = flat_config(value) if isinstance(value, ConfigDict) else {"": value}
        flat |= {f"{key}.{name}".rstrip("."): v for name, v in inner.items()}
    return flat


def cache_folder(cache_dir: str) -> Path | None:
    """Return the folder of caches; None if there shall be none."""
    if cache_dir == "off":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_dir or Path(home) / "tsd_jax")


def use_cache(cache_dir: str) -> None:
    """Keep compiled programs from run to run, at most 2 GB of them."""
    folder = cache_folder(cache_dir)
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
        jax.config.update("jax_compilation_cache_max_size", 2 * 1024**3)


def spectra_store(config: Config) -> tsd.SpectraFolder | None:
    """Keep the base's spectra from run to run, where asked to."""
    if not config.cache_spectra:
        return None
    folder = cache_folder(config.cache_dir)
    if folder is None:
        raise InputError("cache_spectra needs a cache_dir, which is 'off'")
    if config.cache_spectra_gb <= 0:
        raise InputError(
            f"cache_spectra_gb must be positive, not {config.cache_spectra_gb}"
        )
    size = int(config.cache_spectra_gb * 2**30)
    return tsd.SpectraFolder(folder / "spectra", size)


def config_keys(file: str) -> list[str]:
    """Load a config file for its keys, and tell what is wrong with it."""
    if not Path(file).is_file():
        raise InputError(f"config file {file} does not exist; see configs/")
    try:
        return list(flat_config(runpy.run_path(file)["get_config"]()))
    except Exception as error:  # whatever a config file may raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"config file {file} cannot be loaded ({reason})") from None


def unknown_key(argv: list[str], known: list[str]) -> str | None:
    """Say which --config.KEY the config does not have, and the nearest it has."""
    for argument in argv:
        key = argument.lstrip("-").partition("=")[0].removeprefix("config.")
        if argument.lstrip("-").startswith("config.") and key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            return f"the config has no key {key!r}; did you mean {near!r}?"
    return None


def _file_in(argv: list[str]) -> str:
    """Find the config file among the arguments."""
    found = None
    for name, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = name.lstrip("-").partition("=")
        if name.startswith("-") and flag == "config":
            found = value if equals else following
    if found is not None:
        return found
    raise InputError("give a config: --config configs/demo.py")


def parse(argv: list[str]) -> None:
    """Parse the flags; any fault in them is bad input."""
    known = config_keys(_file_in(argv))
    try:
        rest = flags.FLAGS(argv)[1:]
    # ml_collections looks keys up while flags are parsed: an unknown one comes as
    # whatever that lookup raised.
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        told = unknown_key(argv, known) or " ".join(str(error).split())
        raise InputError(told) from None
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; flags start with --")
    if _WORKDIR.value is None and not _DRY_RUN.value:
        raise InputError(
            "give a folder for the run: --workdir runs/NAME (or --dry-run)"
        )


def connect() -> None:
    """Join the other processes of the run, where there are some."""
    settings = (_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value:
        processes.connect(*settings)
    elif any(setting is not None for setting in settings):
        raise InputError(
            "--coordinator, --processes and --process-id need --distributed"
        )


def main(argv: list[str]) -> int:
    """Run the command line; give the exit code."""
    logging.set_verbosity(logging.ERROR)
    if {"-h", "--help"} & set(argv):
        print(__doc__, flags.FLAGS.main_module_help(), sep="\n")
        return 0
    try:
        parse(argv)
        connect()
        use_cache(_CONFIG.value.cache_dir)
        run = prepare(_CONFIG.value, Path(_WORKDIR.value or "."))
        if not _DRY_RUN.value:
            execute(run)
    except InputError as error:
        return processes.exit_run(2, str(error))
    except loop.StopRequested as error:
        print(
            f"train.py: {error}; the same command goes on from there", file=sys.stderr
        )
        return 130
    except BaseException as error:
        if processes.is_single_process():
            raise
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        return processes.exit_run(1, line, traceback.format_exc())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
