"""The embedded demo: a tiny model of a village learns a task it cannot do yet.

Command:  make demo
Hardware: two CPU cores, under 90 s for this run and its plain-LoRA twin.
Expected: accuracy from about 25 % (chance) to 85 % or more.
"""

from configs import default

ASSETS = "tsd_jax/demo/assets"


def get_config():
    """Return the demo's settings."""
    config = default.get_config()
    config.model.path = f"{ASSETS}/model"
    config.method.launch_step = 24
    config.adapter.pattern = r"layers.*/(q|k|v|o|gate|up|down)_proj/kernel"
    config.adapter.rank = 8
    config.adapter.alpha = 16.0
    config.data.path = f"{ASSETS}/task/train.json"
    config.data.eval_path = f"{ASSETS}/task/test.json"
    config.data.template = "plain"
    config.data.length = 16
    config.eval.metric = "choices"
    config.eval.batch_size = 128
    config.optimizer.learning_rate = 5e-3
    config.optimizer.gain_learning_rate = 5e-3
    config.optimizer.decay = "linear"
    config.train.steps = 120
    config.train.batch_size = 32
    config.train.log_every = 10
    return config
