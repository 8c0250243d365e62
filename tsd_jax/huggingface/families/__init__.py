"""What each `model_type` of config.json is: its network, its fields, its names."""
