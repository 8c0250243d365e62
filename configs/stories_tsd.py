"""LoRA-TSD on a real 3M-parameter Llama and 1.1 MB of Shakespeare.

Command:  python train.py --config configs/stories_tsd.py --workdir runs/stories
Hardware: two CPU cores, about two minutes.
It needs a model folder and a text file; name your own with
  --config.model.path=FOLDER --config.data.path=FILE
Expected: NLL per token on the last 10 % of the text, 5.888 before; plain LoRA
  (--config.method.name=lora) ends at 3.910 with seed 0.
"""

from configs import default


def get_config():
    """Return the settings: 150 steps of 8 x 128 tokens, launch at 20, r = 8."""
    config = default.get_config()
    config.model.path = "../shared/models/stories3M"
    config.method.launch_step = 20
    config.adapter.pattern = r"layers.*/(q|k|v|o|gate|up|down)_proj/kernel"
    config.adapter.rank = 8
    config.adapter.alpha = 16.0
    config.data.kind = "text"
    config.data.path = "../shared/data/text/tinyshakespeare.txt"
    config.data.length = 128
    config.data.held_out = 0.1
    config.optimizer.learning_rate = 3e-3
    config.optimizer.gain_learning_rate = 3e-3
    config.optimizer.warmup = 10
    config.optimizer.decay = "linear"
    config.train.steps = 150
    config.train.log_every = 5
    config.train.batch_size = 8
    return config
