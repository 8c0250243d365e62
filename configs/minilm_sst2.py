"""LoRA-TSD on all-MiniLM-L6-v2 (BERT, 22M) and 2,000 sentences of SST-2.

Command:  python train.py --config configs/minilm_sst2.py --workdir runs/minilm
"""

from configs import default


def get_config():
    """Give the settings."""
    config = default.get_config()
    config.model.path = "sentence-transformers/all-MiniLM-L6-v2"
    config.method.launch_step = 40
    config.adapter.rank = 8
    config.adapter.alpha = 16.0
    config.data.kind = "classification"
    config.data.path = "../shared/data/glue/sst2/train.json"
    config.data.eval_path = "../shared/data/glue/sst2/dev.json"
    config.data.length = 48
    config.eval.metric = "scores"
    config.eval.batch_size = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.gain_learning_rate = 1e-3
    config.optimizer.warmup = 10
    config.optimizer.decay = "linear"
    config.train.steps = 160
    config.train.batch_size = 16
    config.train.log_every = 20
    return config
