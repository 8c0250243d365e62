"""Adapters in the format of Hugging Face PEFT, written and read."""
