"""How the demo's assets are made: a world, a tokenizer, a pretrained model, a task.

`python -m examples.village.make` makes them; see `examples.village.make`.
"""
