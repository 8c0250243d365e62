"""LoRA-TSD on LLaMA-7B or Llama-3-8B, the paper's commonsense settings.

Command:  python train.py --config configs/llama_tsd.py --workdir runs/llama \
            --config.model.path=FOLDER_OR_HUB_ID \
            --config.data.path=commonsense_170k.json
Hardware: one 80 GB accelerator, or --config.mesh="(1,8,1)" on eight smaller ones.
Settings: arXiv:2409.01035 and the authors' scripts: r = 32, alpha = 64, dropout 0.05,
  q, k, v, up, down; AdamW, 2e-4 (use 1e-4 for Llama 3), 100 steps of warm-up, linear
  decay, 3 epochs of batches of 16, loss on the prompt too; launch after 100 steps.
Expected: the paper reports averages over eight commonsense sets for LoRA-Dash at
  r = 32: 78.4 for LLaMA-7B and 85.4 for Llama-3-8B. Not run by us.
"""

from configs import default


def get_config():
    """Return the paper's settings; the steps are 3 epochs of about 170,000 items."""
    config = default.get_config()
    config.model.path = "huggyllama/llama-7b"
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.method.launch_step = 100
    config.adapter.pattern = r"layers.*/(q|k|v|up|down)_proj/kernel"
    config.adapter.rank = 32
    config.adapter.alpha = 64.0
    config.adapter.directions = 8
    config.adapter.dropout = 0.05
    config.data.kind = "instructions"
    config.data.path = "commonsense_170k.json"
    config.data.held_out = 0.0007  # about 120 items
    config.data.template = "alpaca"
    config.data.length = 256
    config.data.train_on_prompt = True
    config.optimizer.learning_rate = 2e-4
    config.optimizer.gain_learning_rate = 2e-4
    config.optimizer.warmup = 100
    config.optimizer.clip_norm = 1.0
    config.train.steps = 32_000
    config.train.batch_size = 16
    config.train.log_every = 20
    config.train.checkpoint_every = 1000
    return config
