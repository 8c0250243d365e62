"""All keys and their defaults; the other configs change some of them.

It is not a run by itself: it names no model and no data.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> Any:
    """Return all keys with their defaults."""
    config: Any = ConfigDict()
    config.seed = 0
    # Devices along data, fsdp and tensor; one of them may be -1, for all the others.
    config.mesh = (-1, 1, 1)
    # Folder for compiled programs; "" is $XDG_CACHE_HOME/tsd_jax, "off" keeps none.
    config.cache_dir = ""
    # Keep spectra of the base's kernels there too, so that the next launch on the same
    # base need not decompose them: 4 n^2 bytes for a kernel whose shorter side is n.
    config.cache_spectra = False
    config.cache_spectra_gb = 32.0  # at most

    # Compare the model with its adapters to the merged model before step 1; what has
    # passed is noted in cache_dir, and not compared again.
    config.check = True

    config.model = ConfigDict()
    config.model.path = ""  # a local folder in Hugging Face format, or a hub id
    config.model.revision = ""  # of a hub id: a branch, tag or commit; "": main
    config.model.dtype = "float32"  # of the frozen base: float32 or bfloat16
    # How the frozen base's linear layers are quantized: "" (not), int8 or nf4; needs
    # remat.
    config.model.quantization = ""
    config.model.quantization_tile = (
        0  # inputs that share a scale; 0: 128, or 64 for nf4
    )
    config.model.scan_layers = True
    config.model.remat = False
    # classification: start the head's last layer anew, even if the checkpoint has one.
    config.model.new_head = False
    # Tokens to add to the tokenizer, ("<a>", "<b>"); their embedding rows train.
    config.model.added_tokens = ()

    config.method = ConfigDict()
    config.method.name = "tsd"  # lora, dash, init or tsd; pissa, milora, random
    config.method.keep = False  # init, tsd: keep what pre-launch learned
    config.method.ranking = ""  # rates, largest, smallest, random; "": its own
    config.method.start = ""  # init, tsd: sigma, sigma+p or zero; "": its own
    # Optimizer steps of pre-launch; may be 0 if the ranking ignores its change.
    config.method.launch_step = 100
    config.method.epsilon = 1e-6  # of the change rate
    # What change directions are ranked by: the one that pre-launch made ("prelaunch"),
    # or the gradient of some batches ("gradient"), which needs no pre-launch.
    config.method.discovery = "prelaunch"
    config.method.discovery_batches = 1
    # Launch when the top directions have settled, instead of at launch_step.
    config.method.auto_launch = False

    # With method.auto_launch: the directions have settled once the mean overlap between
    # two checks has reached the threshold `patience` times in a row.
    config.auto_launch = ConfigDict()
    config.auto_launch.launch_min = 10  # fewest steps of pre-launch
    config.auto_launch.launch_max = 0  # most steps; 0 for half of the run
    config.auto_launch.every = 5  # steps between checks
    config.auto_launch.threshold = (
        0.8  # in (0, 1]; 0.875 if one of 8 directions changed
    )
    config.auto_launch.patience = 3
    config.auto_launch.matrices = 16  # number watched, spread over kernels and layers

    config.adapter = ConfigDict()
    # In decoders all but o and gate (qkv and gate_up are Phi-3's), and no experts of
    # mixtures; in encoders query, key, value, intermediate and both outputs.
    config.adapter.pattern = (
        r"layers[^/]*/((self_attn|mlp)/(q|k|v|qkv|up|gate_up|down)_proj"
        r"|attention/self/(query|key|value)(_proj)?"
        r"|intermediate/dense|(attention/)?output/dense)/kernel"
    )
    config.adapter.train_head = True  # classification: in full, with the adapters
    config.adapter.rank = 8
    config.adapter.alpha = 16.0
    config.adapter.directions = 8
    # Train only those before the knee of the change rates, and at most `directions`.
    config.adapter.auto_directions = False
    config.adapter.dropout = 0.0
    config.adapter.scaling = "lora"  # lora: alpha/r; rslora: alpha/sqrt(r)
    config.adapter.dora = False  # train the norms of the kernels' columns separately
    # Parameters that train in full, with the adapters: a regular expression over their
    # paths, such as r"norm/scale|lm_head/kernel"; "" for none.
    config.adapter.full_params = ""
    # Known tokens whose rows of embedding and head train, too, such as ("</s>",); their
    # ids must be one run.
    config.adapter.train_tokens = ()
    # Adapter to start from, instead of one without effect: a PEFT adapter's folder or
    # hub id, or a finished run or its adapter.safetensors. What the keys above say must
    # be what it adapts; the error line has the flags that make it so.
    config.adapter.start = ""

    config.data = ConfigDict()
    config.data.kind = "instructions"  # instructions, text or classification
    config.data.path = ""
    config.data.eval_path = ""  # "": hold out a share of `path`
    config.data.held_out = 0.1  # that share, below 1; 0: nothing, and no evaluation
    # classification or regression; "": as the labels suggest.
    config.data.problem = ""
    # classification: of two classes the one whose F1 is reported; "": label 1, or of
    # words the last by alphabet, which is said.
    config.data.positive = ""
    config.data.template = "alpaca"  # instructions: alpaca or plain
    config.data.length = 256  # tokens per example
    config.data.train_on_prompt = False

    config.eval = ConfigDict()
    # nll, choices or generate; for classification, scores.
    config.eval.metric = "nll"
    # generate: how answers are found in texts: number (the last), options (the first of
    # the item's own), exact, normalized, or a regular expression whose first group is
    # the answer; "": for each item as its own output suggests.
    config.eval.answer = ""
    config.eval.batch_size = 16
    config.eval.limit = 0  # items; 0 for all
    # For generate: greedy; with a temperature sampling, with more beams a beam search.
    config.eval.max_new_tokens = 32
    config.eval.num_beams = 1
    config.eval.temperature = 0.0  # above 0, draw tokens from softmax(z / temperature)
    config.eval.top_k = 0  # draw among so many likeliest tokens; 0 for all
    config.eval.top_p = 1.0  # draw among the fewest whose chances reach this
    # Strings that end a text, ("\n\n", "###"), besides the model's end tokens.
    config.eval.stop = ()
    config.eval.every = 0  # steps; 0: only before and after training

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-4  # of A and B
    config.optimizer.gain_learning_rate = 2e-4  # of the gains along the directions
    config.optimizer.full_learning_rate = 0.0  # of full_params; 0: learning_rate
    config.optimizer.warmup = 0
    config.optimizer.decay = "linear"  # constant, linear or cosine
    config.optimizer.restart = False  # warm up and decay once more after the launch
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0  # 0 for no clipping
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8

    config.train = ConfigDict()
    config.train.steps = 1000
    config.train.batch_size = 16  # examples per optimizer step, over all devices
    config.train.micro_batches = 1  # that a batch is accumulated from
    config.train.log_every = 10
    config.train.checkpoint_every = 0  # steps; 0: only at the end
    return config
