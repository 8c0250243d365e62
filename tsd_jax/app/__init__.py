"""What a command-line run puts together: data, model, evaluation, artifacts."""
