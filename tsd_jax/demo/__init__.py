"""The embedded demo: its world, its tokenizer, its pretrained model, its task."""
