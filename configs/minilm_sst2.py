"""LoRA-TSD on all-MiniLM-L6-v2, a BERT of 22M parameters, and 2,000 texts of SST-2.

Command:  python train.py --config configs/minilm_sst2.py --workdir runs/minilm
Hardware: two CPU cores, 16 minutes while they were also doing other work.
It needs the model, from the hub or a folder, and two JSON files; name your own with
  --config.model.path=FOLDER --config.data.path=FILE --config.data.eval_path=FILE
Expected: accuracy on the 872 sentences of the development set, 0.475 before (the head
  starts at random), 0.797 after with seed 0; plain LoRA (--config.method.name=lora)
  0.820. The paper launches after 100 of thousands of steps, this after 40 of 160.
"""

from configs import default


def get_config():
    """Return the settings: 160 steps of 16 x 48 tokens, launch at 40, r = 8."""
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
